"""Connections that must really close, clients that leave, stall or dawdle, and the stop."""

from __future__ import annotations

import gc
import json
import socket
from dataclasses import replace
from typing import Any

import h11
import pytest
import trio
import trio.testing

from rkvlmd.actors.job import Job
from rkvlmd.front.http.connection import Connection
from rkvlmd.settings import Settings
from tests.fakes.house import Client, FakeHouse, connected, held, hello, running, settings

Clock = trio.testing.MockClock


def body(**more: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "hi"}], **more}).encode()


def with_queue(chosen: Settings, **queue: Any) -> Settings:
    return replace(chosen, queue=replace(chosen.queue, **queue))


# --- keep-alive really closes ------------------------------------------------------------


@pytest.mark.parametrize("path", ["/livez", "/v1/models", "/nothing"])
async def test_connection_close_is_obeyed(path: str) -> None:
    async with running() as house, connected(house) as client:
        with trio.fail_after(60):
            await client.get(path, "host: localhost", "connection: close")
            reply = await client.reply()
            assert reply.headers["connection"] == "close"
            assert await client.rest() == b""


@pytest.mark.parametrize("stream", [True, False])
async def test_connection_close_is_obeyed_after_an_answer(stream: bool) -> None:
    async with running() as house, connected(house) as client:
        with trio.fail_after(60):
            await client.post(body(stream=stream), "/v1/chat/completions", "connection: close")
            assert (await client.reply()).status == 200
            assert await client.rest() == b""


async def test_http_10_is_closed_after_the_answer() -> None:
    async with running() as house:
        with trio.fail_after(60):
            for head in (("accept: */*",), ("host: localhost",)):
                async with connected(house) as client:
                    await client.get("/livez", *head, version="1.0")
                    assert b'{"status":"ok"}' in await client.rest()


@pytest.mark.parametrize("stream", [True, False])
async def test_an_idle_connection_is_closed(stream: bool, patient_clock: Clock) -> None:
    async with running(settings(keep_alive_seconds=7.0)) as house, connected(house) as client:
        for _ in range(3):  # the connection is used again first
            await trio.sleep(6)
            await client.post(body(stream=stream))
            assert (await client.reply()).status == 200
        start = trio.current_time()
        assert await client.rest() == b""
        assert trio.current_time() - start == pytest.approx(7, abs=0.1)


async def test_a_head_that_does_not_come_is_not_waited_for(patient_clock: Clock) -> None:
    async with running(settings(keep_alive_seconds=7.0)) as house, connected(house) as client:
        start = trio.current_time()
        for letter in b"GET /livez HTT":
            await client.send(bytes([letter]))
            await trio.sleep(0.2)
        assert await client.rest() == b""
        assert trio.current_time() - start == pytest.approx(7, abs=0.1)


async def test_a_body_that_does_not_come_is_a_408(patient_clock: Clock) -> None:
    async with running() as house, connected(house) as client:
        start = trio.current_time()
        await client.post(b'{"me', length=100)
        reply = await client.reply()
        assert reply.status == 408
        assert json.loads(reply.body)["error"]["code"] == "request_timeout"
        assert trio.current_time() - start == pytest.approx(60, abs=0.1)
        assert await client.rest() == b""
        assert house.scheduler.gate.jobs == 0


async def test_a_quiet_stream_is_not_cut(patient_clock: Clock) -> None:
    async def script(job: Job) -> None:
        job.checked.set()
        for word in ("a", "b", "c"):
            job.outbox.put(word)
            await trio.sleep(3600)
        job.finish("stop")

    async with running(script=script) as house:
        for stream in (True, False):
            async with connected(house) as client:
                await client.post(body(stream=stream))
                reply = await client.reply()
                assert reply.status == 200
                assert (b"[DONE]" in reply.body) == stream
                assert (b'"abc"' in reply.body) != stream


async def test_requests_sent_ahead_are_answered_in_order() -> None:
    async with running() as house, connected(house) as client:
        with trio.fail_after(60):
            await client.post(body(), "/v1/chat/completions", "x-request-id: one")
            await client.post(body(stream=True), "/v1/chat/completions", "x-request-id: two")
            await client.get("/livez")
            assert (await client.reply()).headers["x-request-id"] == "one"
            assert (await client.reply()).headers["x-request-id"] == "two"
            assert (await client.reply()).body == b'{"status":"ok"}'


# --- the client leaves -------------------------------------------------------------------


async def wait_end(house: FakeHouse) -> str:
    """Wait until the one job has ended and its slot is free; return how it ended."""
    (job,) = house.scheduler.jobs
    while True:
        _, end = await job.outbox.take()
        if end is not None:
            break
    await house.scheduler.until(admitted=0)
    return end.reason


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("phase", ["unchecked", "checked", "generating"])
async def test_a_client_that_leaves_ends_its_job(phase: str, stream: bool, half: bool) -> None:
    there = trio.Event()

    async def script(job: Job) -> None:
        if phase != "unchecked":
            job.checked.set()
        if phase == "generating":
            job.outbox.put("a")
        there.set()
        await trio.sleep_forever()

    async with running(script=script) as house, connected(house) as client:
        with trio.fail_after(60):
            await client.post(body(stream=stream))
            await there.wait()
            if stream and phase != "unchecked":
                await client.head()
                await client.chunk()
                if phase == "generating":
                    await client.chunk()
            if half:
                await client.stream.send_eof()
            else:
                await client.stream.aclose()
            assert await wait_end(house) == "client_gone"


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("ahead", [b"\r\n", b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"])
async def test_a_client_that_sent_more_and_leaves_ends_its_job(
    ahead: bytes, stream: bool, half: bool
) -> None:
    """Bytes after a request, such as the line end of old clients, do not hide that it has gone."""
    there = trio.Event()

    async def script(job: Job) -> None:
        there.set()
        await trio.sleep_forever()

    async with running(script=script) as house, connected(house) as client:
        with trio.fail_after(60):
            await client.post(body(stream=stream) + ahead, length=len(body(stream=stream)))
            await there.wait()
            if half:
                await client.stream.send_eof()
            else:
                await client.stream.aclose()
            assert await wait_end(house) == "client_gone"


async def test_a_client_that_leaves_before_its_stream_begins() -> None:
    """The job ends although nobody ever asked for the first chunk."""

    async def script(job: Job) -> None:
        await trio.sleep_forever()

    async with running(script=script) as house:
        with trio.fail_after(60):
            async with connected(house) as client:
                await client.post(body(stream=True))
                await client.stream.aclose()
            await house.scheduler.until(admitted=0, submitted=1)
            assert await wait_end(house) == "client_gone"


async def test_a_client_that_leaves_in_its_body_frees_its_slot() -> None:
    async with running() as house:
        with trio.fail_after(60):
            for head in (["content-length: 1000"], ["transfer-encoding: chunked"]):
                async with connected(house) as client:
                    lines = ["POST /v1/chat/completions HTTP/1.1", "host: localhost", *head]
                    await client.send("\r\n".join([*lines, "", "5\r\n{"]).encode())
                    await house.scheduler.until(admitted=1)
                await house.scheduler.until(admitted=0)
            assert not house.scheduler.jobs
            async with connected(house) as client:
                await client.post(body())
                assert (await client.reply()).status == 200


async def test_the_end_of_an_answer_is_no_client_that_left() -> None:
    async with running() as house, connected(house) as client:
        with trio.fail_after(60):
            for stream in (True, False, True):
                await client.post(body(stream=stream))
                assert (await client.reply()).status == 200
            ends = [job.outbox.end for job in house.scheduler.jobs]
            assert [end and end.reason for end in ends] == ["stop"] * 3


# --- a client that takes nothing ---------------------------------------------------------

#: More than the kernel keeps for a client that does not read.
FLOOD = "x" * (16 << 20)


async def flood(job: Job) -> None:
    job.checked.set()
    job.outbox.put(FLOOD)
    job.finish("stop")


async def stalled(house: FakeHouse) -> Client:
    """Connect, ask for a flood, and read nothing of it."""
    sock = trio.socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await sock.connect(("127.0.0.1", house.port))
    client = Client(trio.SocketStream(sock))
    await client.post(body(stream=True, user="stalled"))
    await house.scheduler.until(admitted=0, submitted=1)
    return client


async def test_a_client_that_stops_reading_blocks_nobody() -> None:
    async with running(script=flood) as house:
        with trio.fail_after(60):
            slow = await stalled(house)
            assert house.scheduler.jobs[0].outbox.end is not None
            house.scheduler.script = hello
            async with connected(house) as client:
                for stream in (True, False):
                    await client.post(body(stream=stream))
                    assert (await client.reply()).status == 200
            await slow.stream.aclose()


async def test_a_client_that_stops_reading_is_dropped_by_the_kernel() -> None:
    chosen = with_queue(settings(peer_seconds=0.5), stop_seconds=600.0)
    async with running(chosen, flood) as house:
        with trio.fail_after(30):  # real seconds: the kernel knows no other
            slow = await stalled(house)
            house.stop.set()
            await house.stopped.wait()
            await slow.stream.aclose()


async def test_a_client_that_stops_reading_does_not_hold_the_stop(patient_clock: Clock) -> None:
    chosen = with_queue(settings(peer_seconds=600.0), stop_seconds=1.0)
    async with running(chosen, flood) as house:
        slow = await stalled(house)
        start = trio.current_time()
        house.stop.set()
        await house.stopped.wait()
        assert trio.current_time() - start < 10
        await slow.stream.aclose()


# --- the stop ----------------------------------------------------------------------------


async def test_a_stop_lets_a_stream_end_and_takes_nobody_new() -> None:
    go = trio.Event()
    async with running(script=held(go, "last words")) as house, connected(house) as client:
        with trio.fail_after(60):
            async with connected(house) as idle:
                await idle.get("/livez")
                await idle.reply()
                await client.post(body(stream=True))
                await client.head()
                port = house.port
                house.stopping = True
                house.stop.set()
                assert await idle.rest() == b""
            with pytest.raises(OSError, match="connect"):
                await trio.open_tcp_stream("127.0.0.1", port)
            assert not house.stopped.is_set()
            go.set()
            data = await client.rest()
            assert b"last words" in data
            assert data.endswith(b"[DONE]\n\n\r\n0\r\n\r\n")
            await house.stopped.wait()
            assert house.http_address == ""


async def test_a_stop_is_bounded(patient_clock: Clock) -> None:
    async def script(job: Job) -> None:
        job.checked.set()
        await trio.sleep_forever()

    chosen = with_queue(settings(), stop_seconds=20.0)
    async with running(chosen, script) as house, connected(house) as client:
        await client.post(body(stream=True))
        await client.head()
        start = trio.current_time()
        house.stop.set()
        await house.stopped.wait()
        assert 20 <= trio.current_time() - start <= 30
        assert await wait_end(house) == "client_gone"


async def test_a_request_whose_body_ends_after_the_stop_is_refused() -> None:
    async with running() as house, connected(house) as client:
        with trio.fail_after(60):
            data = body()
            await client.post(data[:5], length=len(data))
            await house.scheduler.until(admitted=1)
            house.stopping = True
            house.stop.set()
            await client.send(data[5:])
            reply = await client.reply()
            assert reply.status == 503
            assert json.loads(reply.body)["error"]["code"] == "shutting_down"
            await house.stopped.wait()


async def test_more_connections_than_allowed_wait(patient_clock: Clock) -> None:
    async with running(settings(max_connections=1)) as house:
        async with connected(house) as first, connected(house) as second:
            await first.get("/livez")
            await first.reply()
            await second.get("/livez")
            with trio.move_on_after(1) as waiting:
                await second.more()
            assert waiting.cancelled_caught
            assert await first.rest() == b""  # idle for too long
            assert (await second.reply()).status == 200


async def test_an_address_in_use_is_an_error() -> None:
    async with running() as house:
        chosen = settings()
        taken = replace(chosen, http=replace(chosen.http, bind=f"127.0.0.1:{house.port}"))
        with pytest.RaisesGroup(OSError, flatten_subgroups=True):
            async with running(taken):
                pytest.fail("it served")


async def test_a_name_is_bound_on_all_its_addresses_with_one_port() -> None:
    chosen = settings()
    chosen = replace(chosen, http=replace(chosen.http, bind="localhost:0"))
    async with running(chosen) as house:
        with trio.fail_after(60):
            async with connected(house) as client:
                await client.get("/livez", f"host: localhost:{house.port}")
                assert (await client.reply()).status == 200


async def test_a_closed_connection_is_freed_at_once() -> None:
    """Server, parser and connection do not wait for the collector: that may take an hour."""

    def kept() -> int:
        kinds = (Connection, h11.Connection)
        return sum(isinstance(found, kinds) for found in gc.get_objects())

    async with running() as house:
        gc.collect()
        gc.disable()
        try:
            before = kept()
            for stream in (False, True):
                with trio.fail_after(60):
                    async with connected(house) as client:
                        await client.post(body(stream=stream), "/v1/chat/completions")
                        await client.reply()
                    await house.scheduler.until(admitted=0)
                    while kept() > before + 1:  # that of the client is the test's
                        await trio.lowlevel.checkpoint()
        finally:
            gc.enable()
