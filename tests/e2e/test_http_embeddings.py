"""``/v1/embeddings`` over a real connection; the job behind it is a script."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest
import trio

from rkvlmd.actors.job import Job
from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import EmbeddingsRequest
from tests.fakes.house import connected, running

VECTORS = [base64.b64encode(struct.pack("<2f", i, 0.5)).decode() for i in range(3)]
PATH = "/v1/embeddings"


async def three(job: Job) -> None:
    job.prompt_tokens = 7
    job.checked.set()
    # Cut anywhere: the reader takes what is there.
    whole = "\n".join(VECTORS) + "\n"
    for piece in (whole[:3], whole[3:20], whole[20:]):
        job.outbox.put(piece)
        await trio.lowlevel.checkpoint()
    job.finish("stop")


async def ask(script: Any, **more: Any) -> tuple[int, Any]:
    with trio.fail_after(60):
        async with running(script=script) as house, connected(house) as client:
            body = json.dumps({"input": ["a", "b", "c"], **more}).encode()
            await client.post(body, PATH)
            reply = await client.reply()
            if house.scheduler.requests:
                assert isinstance(house.scheduler.requests[0], EmbeddingsRequest)
            await house.scheduler.until(admitted=0)
            return reply.status, json.loads(reply.body)


async def test_vectors_come_back_in_order() -> None:
    status, body = await ask(three)
    assert status == 200
    assert [d["embedding"] for d in body["data"]] == [[0.0, 0.5], [1.0, 0.5], [2.0, 0.5]]
    assert [d["index"] for d in body["data"]] == [0, 1, 2]
    assert (body["model"], body["usage"]["prompt_tokens"]) == ("demo", 7)


async def test_base64_is_passed_on() -> None:
    _, body = await ask(three, encoding_format="base64")
    assert [d["embedding"] for d in body["data"]] == VECTORS


async def test_an_end_that_is_bad_is_an_error_and_no_half_list() -> None:
    async def dies(job: Job) -> None:
        job.outbox.put(VECTORS[0] + "\n")
        job.finish("engine_died")

    status, body = await ask(dies)
    assert (status, body["error"]["code"]) == (500, "engine_died")


async def test_errors_name_their_field() -> None:
    async def refuses(job: Job) -> None:
        job.finish("error", RkvlmdError("invalid_request", "no.", param="input[1]"))

    status, body = await ask(refuses)
    assert (status, body["error"]["param"]) == (400, "input[1]")
    status, body = await ask(three, encoding_format="int8")
    assert (status, body["error"]["param"]) == (400, "encoding_format")
    status, body = await ask(three, model="nobody")
    assert (status, body["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_only_post(method: str) -> None:
    with trio.fail_after(60):
        async with running() as house, connected(house) as client:
            await client.get(PATH, method=method)
            reply = await client.reply()
            assert (reply.status, reply.headers["allow"]) == (405, "post")


async def test_a_client_that_leaves_ends_its_job() -> None:
    async def waits(job: Job) -> None:
        job.checked.set()
        await trio.sleep_forever()

    with trio.fail_after(60):
        async with running(script=waits) as house:
            async with connected(house) as client:
                await client.post(json.dumps({"input": "a"}).encode(), PATH)
                await house.scheduler.until(admitted=1, submitted=1)
            await house.scheduler.until(admitted=0, submitted=1)
            end = house.scheduler.jobs[0].outbox.end
            assert end is not None
            assert end.reason == "client_gone"
