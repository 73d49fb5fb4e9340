"""From one order to the next: what goes first, and what can wait while the NPU has nothing to do."""

from __future__ import annotations

import os
import socket

import pytest
import trio
import trio.testing

from rkvlmd.actors import pipeline
from rkvlmd.actors.blobs import Blob, from_bytes
from rkvlmd.actors.channel import Channel
from rkvlmd.actors.embeddings import EmbeddingCache, Rows
from rkvlmd.actors.job import Job
from rkvlmd.actors.lease import Lease
from rkvlmd.wire import child as wire
from rkvlmd.wire import frames
from tests.fakes.scripted import chat


async def test_an_order_goes_before_other_tasks_have_their_turn() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    seen: list[int] = []

    async def other() -> None:
        seen.append(len(theirs.recv(4096, socket.MSG_DONTWAIT | socket.MSG_PEEK)))

    with theirs, trio.fail_after(60):
        for _ in range(8):  # the tasks of a turn run in any order
            async with trio.open_nursery() as nursery:
                nursery.start_soon(other)
                await channel.send(wire.Abort(id=1))
            theirs.recv(4096)
    assert len(seen) == 8
    assert all(seen)
    channel.close()


async def test_orders_wait_for_a_full_socket_and_keep_their_order() -> None:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    channel, decoder = Channel(ours), frames.FrameDecoder()
    found: list[frames.Message] = []

    async def send(number: int) -> None:
        order = wire.Generate(id=number, tokens=[7] * 5000, max_tokens=1)
        await channel.send(order)

    with theirs, trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(send, number)
            while len(found) < 6:
                await trio.lowlevel.wait_readable(theirs)
                found += decoder.feed(theirs.recv(1 << 16))
    assert sorted(message["id"] for message in found) == list(range(6))
    assert all(len(message["tokens"]) == 5000 for message in found)
    channel.close()


async def test_a_cancelled_sender_sends_nothing() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    with theirs, trio.CancelScope() as scope:
        scope.cancel()
        await channel.send(wire.Abort(id=1))
    assert scope.cancelled_caught
    channel.close()


async def test_whoever_has_the_lease_next_goes_before_the_end_of_a_job() -> None:
    with trio.fail_after(60):
        for _ in range(8):  # the tasks of a turn run in any order
            lease = Lease()
            did: list[str] = []
            held = trio.Event()

            async def first(lease: Lease, did: list[str], held: trio.Event) -> None:
                job = Job(id="1", client="a", request=chat(), deadline=1e9, submitted=0.0)
                async with lease.hold("a", "m"):
                    await held.wait()
                await pipeline._after_lease(job)
                did.append("the end of the first")

            async def second(lease: Lease, did: list[str]) -> None:
                async with lease.hold("b", "m"):
                    did.append("the order of the second")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(first, lease, did, held)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(second, lease, did)
                await trio.testing.wait_all_tasks_blocked()
                held.set()
            assert did == ["the order of the second", "the end of the first"]


async def test_what_leaves_the_cache_is_closed_when_it_is_swept() -> None:
    before = Blob.live
    cache = EmbeddingCache(250)

    async def put(key: str) -> int:
        made = Rows(await from_bytes(b"x" * 100), wire.Tensor(shape=(100,), dtype="uint8"))
        cache.put(key, made)
        made.blob.close()
        return Blob.live - before

    assert await put("a") == 1
    assert await put("b") == 2
    assert await put("c") == 3, "one has left, and is still open"
    assert cache.bytes == 200
    cache.sweep()
    assert Blob.live - before == 2
    assert await put("d") == 3
    assert await put("e") == 3, "what left before is closed by the next one"
    cache.close()
    assert Blob.live == before


@pytest.mark.parametrize("fds", [0, 1])
async def test_descriptors_go_with_their_order(fds: int) -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    file = os.memfd_create("x")
    with theirs, trio.fail_after(60):
        await channel.send(wire.Abort(id=1), [file] * fds)
        _, found, _, _ = socket.recv_fds(theirs, 4096, 4)
    assert len(found) == fds
    for fd in [*found, file]:
        os.close(fd)
    channel.close()
