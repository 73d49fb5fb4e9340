"""The pool of prep children: decoding pictures, rendering prompts, counting tokens.

The pool grows up to its size while orders wait, and shrinks when idle. An
order whose child dies is done once more by another one, then it gets an error;
the others never notice.

Prompts stay with the child that has the tokenizer: to wait for one picture costs
less than to read a vocabulary again, and a second copy of a large one takes
tens of MB.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from rkvlmd.actors.blobs import Blob
from rkvlmd.actors.child import Child, ChildDiedError
from rkvlmd.actors.engine import close_fds
from rkvlmd.errors import RkvlmdError
from rkvlmd.wire import child as wire

if TYPE_CHECKING:
    from rkvlmd.settings import Settings

log = logging.getLogger(__name__)

Done = wire.PictureDone | wire.VideoDone | wire.RenderDone
Build = Callable[[int], wire.ToChild]


class PrepDiedError(RkvlmdError):
    """No child could do this order; ``deaths`` of them ended while they worked on it."""

    def __init__(self, message: str, deaths: int) -> None:
        super().__init__("engine_died", message)
        self.deaths = deaths


@dataclass(eq=False, slots=True)
class _Order:
    """One order on its way; ``gone`` says that nobody waits for it any more."""

    build: Build
    blobs: Sequence[Blob]
    seconds: float
    renders: bool
    since: float
    finished: trio.Event = field(default_factory=trio.Event)
    result: tuple[Done, list[Blob]] | None = None
    error: RkvlmdError | None = None
    begun: bool = False
    gone: bool = False
    again: bool = False
    deaths: int = 0

    def close(self) -> None:
        """Give back what went in, and what came out for nobody."""
        for blob in self.blobs:
            blob.close()
        if self.gone and self.result is not None:
            for blob in self.result[1]:
                blob.close()


class Prep:
    """Started once by the daemon; ``do`` may be called by any number of tasks."""

    def __init__(
        self, settings: Settings, make_child: Callable[[str], Child] | None = None
    ) -> None:
        self._settings = settings
        self._make_child = make_child or self._default_child
        self._orders: deque[_Order] = deque()
        self._arrived = trio.Event()
        self._quiet = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._workers = 0
        self._idle = 0
        self._starting = 0
        self._numbers = 0
        self.children: dict[str, Child] = {}
        #: Names of the children that have a tokenizer, or are there to get one.
        self._renderers: set[str] = set()
        #: Hears how many seconds a child worked on each picture that it decoded.
        self.on_picture: Callable[[float], None] = lambda _seconds: None
        self.deaths = 0
        self.done = 0

    def _default_child(self, name: str) -> Child:
        arguments = ["--memory", str(self._settings.prep.memory_bytes)]
        if name not in self._renderers:
            arguments += ["--warm", "pictures"]
        return Child(name, "prep", self._settings.engine, arguments=arguments)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the pool until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def adopt(self, settings: Settings) -> None:
        """Take settings that were read again; children that are there stay as they are."""
        self._settings = settings

    @property
    def idle(self) -> bool:
        """Whether no order waits and every child is idle or gone."""
        return not self._orders and self._idle == self._workers

    async def wait_idle(self) -> None:
        """Return when ``idle``."""
        while not self.idle:
            self._quiet = trio.Event()
            await self._quiet.wait()

    @property
    def waiting(self) -> int:
        """Orders that no child has taken yet."""
        return len(self._orders)

    async def do(
        self, build: Build, blobs: Sequence[Blob], *, expect: type[Done]
    ) -> tuple[Done, list[Blob]]:
        """Have one order done; ``build`` makes the message from its number.

        ``blobs`` go with the order and are closed by the pool. Returns the
        answer and blobs that the caller owns. A cancelled caller does not stop
        a child at work: it finishes within its deadline and its answer is
        dropped.

        Raises:
          PrepDiedError: the child died on it.
          RkvlmdError: what is wrong with the picture or the prompt.

        """
        renders = expect is wire.RenderDone
        order = _Order(build, blobs, self._settings.prep.job_seconds, renders, trio.current_time())
        self._orders.append(order)
        self._wake()
        try:
            if renders:
                with trio.move_on_after(self._settings.prep.prompt_wait_seconds):
                    await order.finished.wait()
                if not order.begun:
                    self._wake()
            await order.finished.wait()
        except trio.Cancelled:
            order.gone = True
            if not order.begun:
                self._orders.remove(order)
                order.close()
            elif order.finished.is_set():
                order.close()
            raise
        if order.error is not None:
            raise order.error
        assert order.result is not None
        message, results = order.result
        if not isinstance(message, expect):
            for blob in results:
                blob.close()
            raise RkvlmdError("server_error", "The picture or prompt could not be prepared.")
        return message, results

    def _wake(self) -> None:
        free = self._idle + self._starting
        waiting = sum(self._may(order, "") for order in self._orders)
        if waiting > free and self._workers < self._settings.prep.children:
            assert self._nursery is not None
            self._numbers += 1
            self._workers += 1
            self._starting += 1
            name = f"prep:{self._numbers}"
            if not self._renderers:
                self._renderers.add(name)
            self._nursery.start_soon(self._worker, name)
        self._arrived.set()
        self._arrived = trio.Event()

    async def _worker(self, name: str) -> None:
        """One child from start to end, one order at a time."""
        try:
            async with trio.open_nursery() as nursery:
                child = self._make_child(name)
                self.children[name] = child
                try:
                    try:
                        await nursery.start(child.run, name=name)
                    finally:
                        self._starting -= 1
                    await self._serve(child)
                    self._renderers.discard(name)
                except ChildDiedError as exc:
                    self._failed_start(exc)
                nursery.cancel_scope.cancel(reason="prep child leaves")
        finally:
            self.children.pop(name, None)
            self._renderers.discard(name)
            self._workers -= 1
            self._quiet.set()
            if self._orders:
                self._wake()

    def _failed_start(self, death: ChildDiedError) -> None:
        """A child that cannot even start: say it to the order that waits longest."""
        log.error("%s: %s: %s", death.name, death.how, death.last_words[-500:])
        self.deaths += 1
        if self._orders:
            order = self._orders.popleft()
            order.begun = True
            self._fail(order, "The picture or prompt could not be prepared.")
            order.close()

    async def _serve(self, child: Child) -> None:
        while child.alive:
            order = self._take(child)
            if order is None:
                self._idle += 1
                self._quiet.set()
                with trio.move_on_after(self._settings.prep.idle_seconds):
                    while order is None and child.alive:
                        await self._wait_order(child)
                        order = self._take(child)
                self._idle -= 1
                if order is None:
                    order = self._take(child)  # it came as the time was up
                if order is None:
                    return
            try:
                await self._one(child, order)
            except trio.Cancelled:
                child.kill("the daemon stops")
                self._fail(order, "The server is stopping.")
                raise
            finally:
                if order.finished.is_set():
                    order.close()

    def _take(self, child: Child) -> _Order | None:
        """Return the next order for this child: the oldest that it may do; it has begun.

        One with a tokenizer does prompts first while there is another child
        that only does the rest.
        """
        mine = [order for order in self._orders if child.alive and self._may(order, child.name)]
        if child.name in self._renderers and len(self.children) > len(self._renderers):
            mine.sort(key=lambda order: not order.renders)
        if not mine:
            return None
        order = mine[0]
        self._orders.remove(order)
        order.begun = True
        if order.renders:
            self._renderers.add(child.name)
        return order

    def _may(self, order: _Order, name: str) -> bool:
        """Whether a child may do this order now; ``name`` is empty for one that is not there yet."""
        if not order.renders or not self._renderers or name in self._renderers:
            return True
        return trio.current_time() >= order.since + self._settings.prep.prompt_wait_seconds

    async def _wait_order(self, child: Child) -> None:
        """Return when an order may have come or the child has gone."""
        async with trio.open_nursery() as nursery:

            async def until(event: trio.Event) -> None:
                await event.wait()
                nursery.cancel_scope.cancel(reason="something came")

            nursery.start_soon(until, self._arrived)
            nursery.start_soon(until, child.dead)

    async def _one(self, child: Child, order: _Order) -> None:
        """Give one order to the child; the order ends, or waits for another child."""
        number = child.next_id()
        began = trio.current_time()
        try:
            with trio.move_on_after(order.seconds) as limit:
                child.due = limit.deadline
                await child.send(order.build(number), [blob.fd for blob in order.blobs])
                while True:
                    message, fds = await child.receive()
                    if getattr(message, "id", None) != number:
                        close_fds(fds)
                        continue
                    if isinstance(message, wire.Failed):
                        close_fds(fds)
                        order.error = RkvlmdError(message.code, message.message)
                    elif isinstance(message, Done):
                        blobs = [Blob(fd) for fd in fds]
                        order.result = (message, blobs)
                        if isinstance(message, wire.PictureDone) and message.views:
                            self.on_picture(trio.current_time() - began)
                    else:
                        close_fds(fds)
                        continue
                    break
            child.due = math.inf
            if limit.cancelled_caught:
                child.kill("an order took too long")
                self.deaths += 1
                order.deaths += 1
                self._fail(order, "The picture or prompt took too long to prepare.")
            self.done += 1
        except RkvlmdError as exc:
            child.due = math.inf
            # Nothing was sent: the order is larger than any prompt of any model.
            too_long = RkvlmdError(
                "context_length_exceeded",
                "The text of the request is longer than the context of any model.",
                should_retry=False,
            )
            order.error = too_long if order.renders else exc
        except ChildDiedError as exc:
            self.deaths += 1
            order.deaths += exc.at_work
            log.error("%s died at work: %s: %s", exc.name, exc.how, exc.last_words[-500:])  # noqa: TRY400 - the traceback says nothing
            if not order.again and not order.gone:
                # It may have been dead before it got the order, and nothing was lost.
                order.again, order.begun = True, False
                self._orders.appendleft(order)
                return
            self._fail(order, "The process that prepared the picture or prompt died.")
        order.finished.set()

    @staticmethod
    def _fail(order: _Order, message: str) -> None:
        order.error = PrepDiedError(message, order.deaths)
        order.finished.set()
