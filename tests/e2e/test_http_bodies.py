"""Request bodies over HTTP: kinds, sizes, rubbish, and refused uploads that see why."""

from __future__ import annotations

import gc
import json
import tracemalloc
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import httpx
import pytest
import trio
import trio.testing
from hypercorn.config import Config

from rkvlmd.front.http import connection, serve
from rkvlmd.settings import HttpSettings
from tests.fakes.house import connected, running, settings

BODY = b'{"messages":[{"role":"user","content":"hi"}]}'
CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (["content-type: application/json; charset=utf-8"], 200),
        (["content-type: application/vnd.api+json"], 200),
        (["content-type: text/plain"], 200),
        (["content-type: application/x-www-form-urlencoded"], 200),  # curl -d without a header
        ([], 200),
        (["content-encoding: identity"], 200),
        (["content-type: multipart/form-data; boundary=x"], 415),
        (["content-type: application/json", "content-encoding: gzip"], 415),
        (["content-type: text/plain", "origin: https://evil.example"], 415),
        (["origin: https://evil.example"], 415),
    ],
)
async def test_media_types(head: list[str], status: int) -> None:
    async with running() as house, connected(house) as client:
        with trio.fail_after(60):
            lines = [f"POST {CHAT} HTTP/1.1", "host: localhost", f"content-length: {len(BODY)}"]
            await client.send("\r\n".join([*lines, *head, "", ""]).encode() + BODY)
            reply = await client.reply()
            assert reply.status == status
            if status != 200:
                assert reply.code() == "unsupported_media_type"


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_is_too_large(chunked: bool) -> None:
    async with running(settings(max_body_bytes=2000)) as house:
        with trio.fail_after(60):
            async with connected(house) as client:
                data = b'{"x":"' + b"y" * 3000 + b'"}'
                if chunked:
                    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked"
                    await client.send(f"{head}\r\n\r\n{len(data):x}\r\n".encode() + data)
                    await client.send(b"\r\n0\r\n\r\n")
                else:
                    await client.post(data)
                reply = await client.reply()
                assert (reply.status, reply.code()) == (413, "request_too_large")
                assert await client.rest() == b""
            async with connected(house) as client:
                await client.post(BODY)
                assert (await client.reply()).status == 200
                assert house.scheduler.gate.bytes == 0


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "invalid_json"),
        (b"nonsense", "invalid_json"),
        (b"[" * 5000 + b"]" * 5000, "invalid_json"),
        (b"[]", "invalid_request"),
        (b"{}", "invalid_request"),
        (b'{"messages":[]}', "invalid_request"),
        (b'{"messages":[{"role":"user","content":"x"}],"n":2}', "unsupported_parameter"),
    ],
)
async def test_bad_bodies_and_the_next_good_one(data: bytes, expected: str) -> None:
    async with running() as house, connected(house) as client:
        with trio.fail_after(60):
            await client.post(data)
            reply = await client.reply()
            assert (reply.status, reply.code()) == (400, expected)
            await client.post(BODY)  # on the same connection
            assert (await client.reply()).status == 200


# --- refused uploads ---------------------------------------------------------------------

UPLOAD = b'{"x":"' + b"y" * (20 << 20) + b'"}'


def full() -> Any:
    chosen = settings()
    return replace(chosen, queue=replace(chosen.queue, max_jobs=0))


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_refused_upload_sees_its_503(chunked: bool) -> None:
    async with running(full()) as house, connected(house) as client:
        with trio.fail_after(60):
            # all of it is sent before anything is read, as simple clients do
            if chunked:
                head = (
                    f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
                )
                await client.send(f"{head}{len(UPLOAD):x}\r\n".encode() + UPLOAD + b"\r\n0\r\n\r\n")
            else:
                await client.post(UPLOAD)
            reply = await client.reply()
            assert (reply.status, reply.code()) == (503, "server_is_overloaded")
            assert reply.headers["connection"] == "close"
            assert 1 <= int(reply.headers["retry-after"]) <= 120
            assert await client.rest() == b""


async def test_a_refused_upload_with_an_ordinary_client() -> None:
    async with running(full()) as house:
        with trio.fail_after(60):
            async with httpx.AsyncClient(base_url=house.http_address, timeout=120) as client:
                for path, status in ((CHAT, 503), ("/nothing", 404), ("/livez", 405)):
                    answer = await client.post(path, content=UPLOAD)
                    assert answer.status_code == status


async def test_discarding_is_bounded_in_time(patient_clock: trio.testing.MockClock) -> None:
    async with running(full()) as house, connected(house) as client:
        start = trio.current_time()
        await client.post(b"{", length=1000)
        reply = await client.reply()  # at once, though the upload is not over
        assert reply.status == 503
        assert trio.current_time() == start
        assert await client.rest() == b""
        assert trio.current_time() - start == pytest.approx(2, abs=0.1)


async def test_discarding_is_bounded_in_bytes() -> None:
    chosen = full()
    chosen = replace(chosen, http=replace(chosen.http, discard_bytes=1 << 20, discard_seconds=60.0))
    async with running(chosen) as house, connected(house) as client:
        with trio.fail_after(60):
            with pytest.raises(trio.BrokenResourceError):
                await client.post(b"", length=1 << 40)
                while True:
                    await client.send(b"y" * 65536)


async def test_a_flood_does_not_hold_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library hands over what arrives before it can close; somebody has to take it."""

    def short_queue(http: HttpSettings) -> Config:
        config = connection.server_config(http)
        config.max_app_queue_size = 1
        return config

    monkeypatch.setattr(serve, "server_config", short_queue)
    chosen = full()
    chosen = replace(chosen, http=replace(chosen.http, discard_bytes=0))
    async with running(chosen) as house, connected(house) as client:
        with trio.fail_after(60):
            with pytest.raises(trio.BrokenResourceError):
                await client.post(b"y" * (8 << 20), length=1 << 40)
                await client.rest()


async def test_a_body_where_none_is_expected_does_not_stop_the_connection() -> None:
    async with running() as house:
        with trio.fail_after(60):
            async with connected(house) as client:
                await client.post(b"x" * 10, "/livez")
                assert (await client.reply()).status == 405
                assert await client.rest() == b""
            async with connected(house) as client:
                big = b"x" * (2 << 20)
                await client.get("/livez", "host: localhost", f"content-length: {len(big)}")
                await client.send(big)
                assert (await client.reply()).status == 200
                assert await client.rest() == b""


async def test_a_waiting_request_does_not_hold_its_body() -> None:
    """What was parsed and is of no use is gone while the request waits for its turn."""
    waits = trio.Event()

    async def work(job: Any) -> None:
        await waits.wait()
        job.finish("stop")

    clients, size = 4, 400_000
    body = json.dumps(
        {"messages": [{"role": "user", "content": "hi"}], "unheard": "x" * size}
    ).encode()
    async with running(script=work) as house:
        with trio.fail_after(60):
            async with connected(house) as first:  # whatever is made once is made now
                await first.post(body)
                await house.scheduler.until(admitted=1, submitted=1)
                tracemalloc.start()
                try:
                    async with AsyncExitStack() as stack:
                        for number in range(clients):
                            client = await stack.enter_async_context(connected(house))
                            await client.post(body)
                            await house.scheduler.until(admitted=2 + number, submitted=2 + number)
                        await trio.testing.wait_all_tasks_blocked()
                        gc.collect()
                        held, _ = tracemalloc.get_traced_memory()
                        waits.set()
                finally:
                    tracemalloc.stop()
    assert held < size, f"{held} bytes for {clients} bodies of {size}"
