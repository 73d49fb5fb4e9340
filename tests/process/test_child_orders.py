"""Orders that a child cannot be given, and children that do not take them; real processes."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from rkvlmd.actors.blobs import from_bytes
from rkvlmd.actors.child import Child, ChildDiedError
from rkvlmd.errors import RkvlmdError
from rkvlmd.wire import child as wire
from rkvlmd.wire import frames
from tests.process.test_child import make

pytestmark = pytest.mark.process


@asynccontextmanager
async def loaded(**settings: Any) -> AsyncIterator[Child]:
    """Start a scripted child and load it."""
    child = make({"tokens": 1}, **settings)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(child.run)
            await child.send(wire.Load(folder="/nowhere", manifest={}))
            while not isinstance((await child.receive())[0], wire.Ready):
                pass
            yield child
            nursery.cancel_scope.cancel()


async def answers(child: Child, fds: list[int]) -> bool:
    """Give an order with these descriptors; whether it is done."""
    spans = [wire.Span(start=at, count=1, key="") for at in range(len(fds))]
    tokens = [1] * (1 + len(fds))
    order = wire.Generate(id=child.next_id(), tokens=tokens, spans=spans, max_tokens=1)
    await child.send(order, fds)
    while True:
        message, _ = await child.receive()
        if isinstance(message, wire.GenerateDone):
            return True


@pytest.mark.parametrize("count", [0, 68, frames.MAX_FDS])
async def test_as_many_descriptors_as_the_kernel_takes(count: int) -> None:
    """Four pictures in 17 tiles each are 68."""
    with await from_bytes(b"rows") as blob:
        async with loaded() as child:
            assert await answers(child, [blob.fd] * count)


async def test_more_than_that_is_an_error_of_the_request() -> None:
    with await from_bytes(b"rows") as blob:
        async with loaded() as child:
            with pytest.raises(RkvlmdError) as info:
                await answers(child, [blob.fd] * (frames.MAX_FDS + 1))
            assert info.value.code == "too_many_images"
            assert await answers(child, [])


async def test_an_order_that_no_frame_holds_is_an_error_of_the_request() -> None:
    async with loaded() as child:
        with pytest.raises(RkvlmdError) as info:
            text = "a" * frames.MAX_BYTES
            await child.send(
                wire.Generate(id=child.next_id(), tokens=[], prompt=text, max_tokens=1)
            )
        assert info.value.code == "request_too_large"
        assert await answers(child, [])


async def test_a_child_that_does_not_read_is_killed() -> None:
    async with loaded(beat_seconds=0.5) as child:
        os.kill(child.pid, signal.SIGSTOP)
        text = "a" * (4 << 20)
        with pytest.raises(ChildDiedError) as info, trio.fail_after(60):
            await child.send(
                wire.Generate(id=child.next_id(), tokens=[], prompt=text, max_tokens=1)
            )
        assert info.value.planned
        assert not info.value.at_work


async def test_descriptors_that_come_as_a_child_is_killed_are_closed() -> None:
    """Its inbox is full, so the reader holds them when the kill comes."""

    class Full:
        """A channel that has one more message with a descriptor, for ever."""

        def __init__(self, fd: int) -> None:
            self.fd = fd

        async def receive(self) -> tuple[wire.FromChild, list[int]]:
            await trio.lowlevel.checkpoint()
            rows = wire.Tensor(shape=(1,), dtype="float32")
            return wire.EncodeDone(id=1, rows=rows, seconds=0.0), [os.dup(self.fd)]

    child = make()
    gc.collect()  # what other tests have left is not counted
    before = len(os.listdir("/proc/self/fd"))
    with await from_bytes(b"rows") as blob:
        child.hello = wire.Hello(pid=1, role="encoder")
        async with trio.open_nursery() as nursery:
            channel: Any = Full(blob.fd)
            nursery.start_soon(child._pump, channel, trio.TASK_STATUS_IGNORED)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        child._drop_inbox()
    assert len(os.listdir("/proc/self/fd")) <= before
