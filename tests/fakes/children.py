"""A child that lives inside the test's loop: the whole interface of ``actors.child.Child``."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import trio

from rkvlmd.actors.child import ChildDiedError
from rkvlmd.actors.loading import Loader
from rkvlmd.wire import child as wire
from rkvlmd.wire import frames


class FakeChild:
    """Answers every order at once, one word per turn of the loop; hears aborts."""

    def __init__(self, name: str, role: str, *, words: int = 3) -> None:
        self.name = name
        self.role = role
        self.pid = 0
        self.hello = wire.Hello(pid=0, role=role)
        self.death: ChildDiedError | None = None
        self.dead = trio.Event()
        self.due = self.beat_at = math.inf
        self.listener: Callable[[wire.FromChild, Sequence[int]], bool] | None = None
        self.last_words = ""
        self.aborts = 0
        #: What it answers to the order to load.
        self.load: Callable[[], wire.Ready | wire.Failed] = wire.Ready
        self._words = words
        self._ids = 0
        self._killed: str | None = None
        self._planned = True
        self._aborted: set[int] = set()
        self._orders, self._work = trio.open_memory_channel[tuple[Any, int]](64)
        self._say, self._said = trio.open_memory_channel[tuple[Any, list[int]]](256)
        self._wake = trio.Event()

    @property
    def alive(self) -> bool:
        return self._killed is None and not self.dead.is_set()

    def next_id(self) -> int:
        self._ids += 1
        return self._ids

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._main)
                task_status.started()
                await self._wake.wait()
                nursery.cancel_scope.cancel()
        finally:
            self.death = ChildDiedError(
                self.name, self._killed or "stopped", "", planned=self._planned
            )
            self.dead.set()
            self._say.close()
            while True:
                try:
                    _, fds = self._said.receive_nowait()
                except (trio.WouldBlock, trio.EndOfChannel):
                    break
                for fd in fds:
                    os.close(fd)

    def kill(self, why: str) -> None:
        self._killed = self._killed or why
        self._wake.set()

    def die(self) -> None:
        """End as a child does that nobody has asked to."""
        self._planned = False
        self.kill("killed by SIGKILL")

    async def send(self, message: wire.ToChild, fds: Sequence[int] = ()) -> None:
        if not self.alive:
            await self.dead.wait()
            assert self.death is not None
            raise self.death.before()
        with trio.CancelScope(shield=True):
            if isinstance(message, wire.Abort):
                self.aborts += 1
                self._aborted.add(message.id)
            else:
                await self._orders.send((message, len(fds)))

    def send_now(self, order: bytes, fds: Sequence[int] = ()) -> bool:
        if not self.alive:
            return False
        self._orders.send_nowait((self.order_of(order), len(fds)))
        return True

    @staticmethod
    def order_of(frame: bytes) -> wire.ToChild:
        """Return what a frame says."""
        (message,) = frames.FrameDecoder().feed(frame)
        return wire.parse_to_child(message)

    @property
    def awaited(self) -> bool:
        return self._said.statistics().tasks_waiting_receive > 0

    async def receive(self) -> tuple[wire.FromChild, list[int]]:
        try:
            return await self._said.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            await self.dead.wait()
            assert self.death is not None
            raise self.death from None

    async def _main(self) -> None:
        async for order, fds in self._work:
            if isinstance(order, wire.Load):
                await self._answer(self.load())
            elif isinstance(order, wire.Picture):
                await self._picture(order)
            elif isinstance(order, wire.Render):
                count = sum(sum(picture.tokens) for picture in order.pictures)
                await self._answer(
                    wire.RenderDone(
                        id=order.id, tokens=self.tokens(order, count), spans=_spans(order)
                    )
                )
            elif isinstance(order, wire.Encode):
                assert fds == 1
                await self._encode(order)
            elif isinstance(order, wire.Generate):
                assert fds == len(order.spans)
                await self._generate(order)

    def sha256(self) -> str:
        """Return the hash of the next picture: all are the same."""
        return "0" * 64

    def tokens(self, order: wire.Render, pictures: int) -> list[int]:
        """Return a prompt with so many image tokens from the second place on."""
        return [1] * (pictures + 2)

    def held(self, order: wire.Generate) -> list[str]:
        """Return what the cache holds after a run."""
        return []

    async def _picture(self, order: wire.Picture) -> None:
        sha256 = self.sha256()
        if sha256 in order.known:
            await self._answer(
                wire.PictureDone(
                    id=order.id, sha256=sha256, width=0, height=0, format="", views=[], layout=[]
                )
            )
            return
        tensor = wire.Tensor(shape=(8,), dtype="uint8")
        tokens = order.manifest["encoders"][0]["tokens"]
        done = wire.PictureDone(
            id=order.id, sha256=sha256, width=4, height=4, format="PNG",
            views=[wire.View(encoder=0, tensor=tensor, tokens=tokens)], layout=[0],
        )  # fmt: skip
        await self._answer(done, memfd(8))

    async def _encode(self, order: wire.Encode) -> None:
        rows = wire.Tensor(shape=(4, 8), dtype="float32")
        await self._answer(wire.EncodeDone(id=order.id, rows=rows, seconds=0.0), memfd(128))

    async def _generate(self, order: wire.Generate) -> None:
        await self._answer(
            wire.Prefilled(id=order.id, prompt=len(order.tokens), cached=0, seconds=0.0)
        )
        count = 0
        while count < self._words and order.id not in self._aborted:
            await trio.lowlevel.checkpoint()
            await self._answer(wire.Text(id=order.id, text=f"w{count} "))
            count += 1
        reason = "aborted" if order.id in self._aborted else "stop"
        await self._answer(
            wire.GenerateDone(
                id=order.id, reason=reason, completion=count, seconds=0.0,  # type: ignore[arg-type]
                held=self.held(order),
            )
        )  # fmt: skip

    async def _answer(self, message: wire.FromChild, fd: int | None = None) -> None:
        fds = [] if fd is None else [fd]
        try:
            await trio.lowlevel.checkpoint()
            if self.listener is not None and self.listener(message, fds):
                return
            await self._say.send((message, fds))
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise


def _spans(order: wire.Render) -> list[tuple[int, int, int, int]]:
    spans, start = [], 1
    for index, picture in enumerate(order.pictures):
        for view, count in enumerate(picture.tokens):
            spans.append((start, count, index, view))
            start += count
    return spans


def memfd(size: int) -> int:
    fd = os.memfd_create("fake", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


class FakeLoader(Loader):
    """The real loader, except that no file is hashed in a thread."""

    async def verify(self, record: Any) -> None:
        await trio.lowlevel.checkpoint()
