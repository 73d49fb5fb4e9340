"""Chat over HTTP: the shapes, the order of a stream, and every way in which a job may end."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
import trio

from rkvlmd.actors.job import Job
from rkvlmd.errors import RkvlmdError
from rkvlmd.wire import sse
from tests.fakes.house import Client, FakeHouse, connected, held, running, settings

ASK = {"messages": [{"role": "user", "content": "hi"}]}


def body(**more: Any) -> bytes:
    return json.dumps({**ASK, **more}).encode()


def events(data: bytes) -> list[Any]:
    found = sse.Decoder().feed(data)
    return [json.loads(e) if e != b"[DONE]" else "[DONE]" for e in found]


async def ask(house: FakeHouse, *head: str, **more: Any) -> Any:
    with trio.fail_after(60):
        async with connected(house) as client:
            await client.post(body(**more), "/v1/chat/completions", *head)
            return await client.reply()


async def test_whole_answer() -> None:
    async with running() as house:
        reply = await ask(house, "x-request-id: abc-1", model="demo")
        assert reply.status == 200
        assert reply.headers["content-type"] == "application/json"
        assert reply.headers["x-request-id"] == "abc-1"
        answer = json.loads(reply.body)
        created, timings = answer.pop("created"), answer.pop("timings")
        assert created > 1_700_000_000
        assert timings["total"] >= 0
        assert answer == {
            "id": "chatcmpl-abc-1",
            "object": "chat.completion",
            "model": "demo",
            "system_fingerprint": "rkvlmd-0123456789ab",
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "logprobs": None,
                    "message": {"role": "assistant", "content": "Hello there", "refusal": None},
                }
            ],
            "usage": {
                "prompt_tokens": 5,
                "completion_tokens": 2,
                "total_tokens": 7,
                "prompt_tokens_details": {
                    "cached_tokens": 0,
                    "image_tokens": 0,
                    "text_tokens": 5,
                    "audio_tokens": 0,
                },
                "completion_tokens_details": {"reasoning_tokens": 0},
            },
        }


async def test_stream() -> None:
    async with running() as house:
        reply = await ask(house, stream=True)
        assert reply.status == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["cache-control"] == "no-cache"
        assert reply.headers["x-accel-buffering"] == "no"
        first, *texts, last, done = events(reply.body)
        assert done == "[DONE]"
        assert first["choices"] == [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": ""},
                "finish_reason": None,
                "logprobs": None,
            }
        ]
        assert "".join(t["choices"][0]["delta"]["content"] for t in texts) == "Hello there"
        assert last["choices"][0]["delta"] == {}
        assert last["choices"][0]["finish_reason"] == "stop"
        chunks = [first, *texts, last]
        assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
        assert len({(c["id"], c["created"], c["model"]) for c in chunks}) == 1
        assert not any("usage" in c for c in chunks)


async def test_usage_chunk_only_on_request() -> None:
    async with running() as house:
        reply = await ask(house, stream=True, stream_options={"include_usage": True})
        *chunks, usage, done = events(reply.body)
        assert done == "[DONE]"
        assert all(c["usage"] is None and c["choices"] for c in chunks)
        assert usage["choices"] == []
        assert usage["usage"]["total_tokens"] == 7


async def test_each_take_is_one_chunk_and_text_is_merged() -> None:
    go = trio.Event()

    async def script(job: Job) -> None:
        job.checked.set()
        await go.wait()
        job.outbox.put("a")
        job.outbox.put("b\u2028\n")
        await trio.testing.wait_all_tasks_blocked()
        job.outbox.put("c")
        job.finish("length")

    async with running(script=script) as house, connected(house) as client:
        with trio.fail_after(60):
            await client.post(body(stream=True))
            await client.head()
            assert b'"role"' in await client.chunk()
            go.set()
            (one,) = events(await client.chunk())
            assert one["choices"][0]["delta"] == {"content": "ab\u2028\n"}
            two, last, done = events(await client.chunk())
            assert two["choices"][0]["delta"] == {"content": "c"}
            assert last["choices"][0]["finish_reason"] == "length"
            assert done == "[DONE]"
            assert await client.chunk() == b""


async def think(job: Job) -> None:
    job.prompt_tokens, job.completion_tokens, job.reasoning_tokens = 5, 4, 3
    job.checked.set()
    job.outbox.put("", "Let me")
    job.outbox.put("Yes", " see.")
    job.outbox.put(".")
    job.finish("stop")


async def test_thoughts_are_no_content() -> None:
    async with running(script=think) as house:
        reply = await ask(house)
        choice = json.loads(reply.body)["choices"][0]
        assert choice["message"] == {
            "role": "assistant", "content": "Yes.", "refusal": None,
            "reasoning_content": "Let me see.", "reasoning": "Let me see.",
        }  # fmt: skip
        usage = json.loads(reply.body)["usage"]
        assert usage["completion_tokens_details"] == {"reasoning_tokens": 3}
        reply = await ask(house, stream=True)
        deltas = [c["choices"][0]["delta"] for c in events(reply.body)[:-1]]
        assert deltas == [
            {"role": "assistant", "content": ""},
            {"reasoning_content": "Let me see.", "reasoning": "Let me see."},
            {"content": "Yes."},
            {},
        ]


async def test_an_answer_of_nothing_but_thoughts() -> None:
    async def script(job: Job) -> None:
        job.outbox.put("", "hm")
        job.finish("length")

    async with running(script=script) as house:
        choice = json.loads((await ask(house)).body)["choices"][0]
        assert (choice["message"]["content"], choice["message"]["reasoning"]) == ("", "hm")
        assert choice["finish_reason"] == "length"
        chunks = events((await ask(house, stream=True)).body)
        assert [c["choices"][0]["delta"] for c in chunks[1:-1]] == [
            {"reasoning_content": "hm", "reasoning": "hm"}, {},
        ]  # fmt: skip


async def test_pings_until_the_first_token(patient_clock: trio.testing.MockClock) -> None:
    go = trio.Event()

    async def script(job: Job) -> None:
        job.checked.set()
        await go.wait()
        job.outbox.put("a")
        await trio.sleep(100)
        job.outbox.put("b")
        job.finish("stop")

    async with running(script=script) as house, connected(house) as client:
        await client.post(body(stream=True))
        await client.head()
        await client.chunk()
        start = trio.current_time()
        assert await client.chunk() == sse.PING
        assert await client.chunk() == sse.PING
        assert trio.current_time() - start == pytest.approx(20)
        go.set()
        assert b'"a"' in await client.chunk()
        assert b'"b"' in await client.chunk()


async def test_an_error_before_the_headers_has_a_status() -> None:
    async def script(job: Job) -> None:
        await trio.testing.wait_all_tasks_blocked()
        job.finish("error", RkvlmdError("invalid_image", "It is none.", param="messages[0]"))

    async with running(script=script) as house:
        for stream in (True, False):
            reply = await ask(house, stream=stream)
            assert reply.status == 400
            assert json.loads(reply.body)["error"] == {
                "message": "It is none.",
                "type": "invalid_request_error",
                "param": "messages[0]",
                "code": "invalid_image",
            }


@pytest.mark.parametrize("first", ["", "Hel"])
async def test_an_error_after_the_headers_is_an_event_and_no_done(first: str) -> None:
    async def script(job: Job) -> None:
        job.checked.set()
        job.outbox.put(first)
        await trio.testing.wait_all_tasks_blocked()
        job.finish("engine_died")

    async with running(script=script) as house:
        reply = await ask(house, stream=True)
        assert reply.status == 200
        *chunks, last = events(reply.body)
        assert last["error"]["code"] == "engine_died"
        assert last["error"]["type"] == "server_error"
        assert all(c["choices"][0]["finish_reason"] is None for c in chunks)
        assert b"[DONE]" not in reply.body


async def test_headers_leave_after_a_while(patient_clock: trio.testing.MockClock) -> None:
    async def script(job: Job) -> None:
        await trio.sleep(60)
        job.finish("error", RkvlmdError("invalid_image", "It is none."))

    async with running(script=script) as house, connected(house) as client:
        start = trio.current_time()
        await client.post(body(stream=True))
        assert (await client.head()).status == 200
        assert trio.current_time() - start == pytest.approx(10)
        data = b""
        while piece := await client.chunk():
            data += piece
        assert events(data)[-1]["error"]["code"] == "invalid_image"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("reason", "status", "code", "retry"),
    [
        ("deadline", 504, "deadline_exceeded", "false"),
        ("cancelled", 499, "cancelled", "false"),
        ("engine_died", 500, "engine_died", None),
        ("engine_wedged", 500, "engine_wedged", None),
        ("model_unloaded", 503, "model_unloaded", "false"),
        ("shutdown", 503, "shutting_down", "true"),
        ("error", 500, "server_error", None),
    ],
)
async def test_bad_ends_before_anything_was_sent(
    stream: bool, reason: Any, status: int, code: str, retry: str | None
) -> None:
    async def script(job: Job) -> None:
        job.finish(reason)

    async with running(script=script) as house:
        reply = await ask(house, stream=stream)
        assert (reply.status, json.loads(reply.body)["error"]["code"]) == (status, code)
        assert reply.headers.get("x-should-retry") == retry
        assert ("retry-after" in reply.headers) == (code == "shutting_down")


async def test_ignored_parameters_are_named() -> None:
    async def script(job: Job) -> None:
        job.ignored = ("seed",)
        job.checked.set()
        job.finish("stop")

    async with running(script=script) as house:
        for stream in (True, False):
            reply = await ask(house, stream=stream, verbosity="low", seed=1, user="me")
            assert reply.headers["x-rkvlmd-ignored"] == "verbosity, seed"
        reply = await ask(house, user="me")
        assert reply.headers["x-rkvlmd-ignored"] == "seed"


async def test_models_by_name_alias_and_default() -> None:
    async with running() as house:
        for name, expected in [
            ("other", "other"),
            (None, "demo"),
            ("", "demo"),
            ("default", "demo"),
        ]:
            assert json.loads((await ask(house, model=name)).body)["model"] == expected
        reply = await ask(house, model="gpt-9")
        assert reply.status == 404
        error = json.loads(reply.body)["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert house.scheduler.gate.jobs == 0


async def test_a_bug_is_a_500_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as house:
        house.scheduler.submit = None  # type: ignore[assignment, method-assign]
        reply = await ask(house)
        assert reply.status == 500
        assert json.loads(reply.body)["error"]["code"] == "server_error"
        assert b"NoneType" not in reply.body
        assert "NoneType" in caplog.text
        assert house.scheduler.gate.jobs == 0


async def test_a_full_queue_and_the_next_good_request() -> None:
    go, chosen = trio.Event(), settings()
    chosen = replace(chosen, queue=replace(chosen.queue, max_jobs=1))
    async with running(chosen, held(go)) as house, connected(house) as first:
        with trio.fail_after(60):
            await first.post(body(stream=True))
            await first.head()
            reply = await ask(house)
            assert reply.status == 503
            error = json.loads(reply.body)["error"]
            assert error["code"] == "server_is_overloaded"
            assert error["type"] == "service_unavailable_error"
            assert 1 <= int(reply.headers["retry-after"]) <= 120
            go.set()
            while await first.chunk():
                pass
            assert (await ask(house)).status == 200
            assert house.scheduler.gate.jobs == house.scheduler.gate.bytes == 0


async def test_unknown_fields_are_counted_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "rkvlmd.front.http.intake")
    async with running() as house:
        for _ in range(3):
            assert (await ask(house, zzz=1)).status == 200
        assert caplog.text.count("'zzz'") == 1
        assert house.scheduler.requests[0].unknown == ("zzz",)


async def test_a_chunked_body_and_an_ordinary_client() -> None:
    async def pieces() -> Any:
        data = body(model="demo")
        for start in range(0, len(data), 7):
            yield data[start : start + 7]

    async with running() as house:
        with trio.fail_after(60):
            async with httpx.AsyncClient(base_url=house.http_address, timeout=120) as client:
                answer = await client.post("/v1/chat/completions", content=pieces())
                assert answer.status_code == 200
                again = await client.post("/v1/chat/completions", json=ASK)
                assert again.json()["choices"][0]["message"]["content"] == "Hello there"
            assert house.scheduler.requests[0].model == "demo"


async def test_models_and_health() -> None:
    async def get(client: Client, path: str, method: str = "GET") -> Any:
        await client.get(path, method=method)
        return await client.reply()

    async with running() as house, connected(house) as client:
        with trio.fail_after(60):
            listing = json.loads((await get(client, "/v1/models")).body)
            assert listing["object"] == "list"
            assert [m["id"] for m in listing["data"]] == ["demo", "other"]
            card = json.loads((await get(client, "/v1/models/demo")).body)
            assert card == listing["data"][0]
            assert card == {
                "id": "demo",
                "object": "model",
                "created": 1_700_000_000,
                "owned_by": "rkvlmd",
                "root": "demo",
                "parent": None,
                "max_model_len": 512,
                "aliases": ["default"],
                "meta": {"n_ctx": 512},
                "architecture": {
                    "input_modalities": ["text", "image"],
                    "output_modalities": ["text"],
                },
                "capabilities": ["completion", "vision"],
            }
            assert json.loads((await get(client, "/v1/models/default")).body)["id"] == "demo"
            missing = await get(client, "/v1/models/none")
            assert missing.status == 404
            assert json.loads(missing.body)["error"]["code"] == "model_not_found"
            for path in ("/livez", "/readyz", "/health", "/v1/health"):
                assert (await get(client, path)).status == 200
            house.residency.can_serve = False
            assert (await get(client, "/livez")).status == 200
            for path in ("/readyz", "/health", "/v1/health"):
                reply = await get(client, path)
                assert reply.status == 503
                assert json.loads(reply.body)["error"]["code"] == "model_not_loaded"
            house.stopping = True
            assert (
                json.loads((await get(client, "/readyz")).body)["error"]["code"] == "shutting_down"
            )
            await client.get("/livez", method="HEAD")
            assert (await client.head()).status == 200
            assert (await get(client, "/livez")).status == 200


@pytest.mark.parametrize(
    ("head", "more", "priority"),
    [
        ([], {}, None),
        ([], {"priority": "batch"}, "batch"),
        (["X-Priority: interactive"], {}, "interactive"),
        (["x-priority: -1"], {"priority": 7}, "interactive"),
    ],
)
async def test_the_class_that_a_request_asks_for(
    head: list[str], more: dict[str, Any], priority: str | None
) -> None:
    async with running() as house:
        assert (await ask(house, *head, **more)).status == 200
        assert house.scheduler.requests[-1].priority == priority


async def test_the_sooner_of_two_deadlines_counts(patient_clock: trio.testing.MockClock) -> None:
    async with running() as house:
        await ask(house, "X-Request-Deadline: 20", timeout=50)
        assert house.scheduler.requests[-1].timeout == 20
        await ask(house, "x-request-deadline: 20", timeout=5)
        assert house.scheduler.requests[-1].timeout == 5
        await ask(house)
        assert house.scheduler.requests[-1].timeout is None


async def test_headers_that_are_wrong_are_refused_before_the_body() -> None:
    async with running() as house, connected(house) as client:
        for head in ("x-request-deadline: tomorrow", "x-priority: first"):
            reply = await ask(house, head)
            assert reply.status == 400
            assert json.loads(reply.body)["error"]["param"] == head.partition(":")[0]
        with trio.fail_after(60):
            await client.post(b"", "/v1/chat/completions", "x-priority: first", length=100)
            assert (await client.head()).status == 400
        assert not house.scheduler.jobs


async def test_a_body_that_comes_after_the_deadline() -> None:
    async with running() as house, connected(house) as client:
        with trio.fail_after(60):
            await client.post(b"{", "/v1/chat/completions", "x-request-deadline: 0.1", length=100)
            reply = await client.head()
        assert reply.status == 504
        assert reply.headers["x-should-retry"] == "false"
        await house.scheduler.until(admitted=0)


async def test_one_client_too_many_gets_429() -> None:
    go, chosen = trio.Event(), settings()
    chosen = replace(chosen, queue=replace(chosen.queue, max_jobs_per_client=1))
    async with running(chosen, held(go)) as house, connected(house) as client:
        with trio.fail_after(60):
            await client.post(body())
            await house.scheduler.until(admitted=1, submitted=1)
            reply = await ask(house)
            assert reply.status == 429
            assert json.loads(reply.body)["error"]["code"] == "rate_limit_exceeded"
            assert 1 <= int(reply.headers["retry-after"]) <= 120
            go.set()
            assert (await client.reply()).status == 200
