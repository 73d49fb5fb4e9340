"""A child's two threads: the main one reads and beats, the worker runs the library."""

from __future__ import annotations

import os
import queue
import select
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn, Protocol

from rkvlmd.engine.channel import Channel, close_all
from rkvlmd.errors import RkvlmdError
from rkvlmd.wire import child, frames

#: Seconds between two beats while something is in hand.
BEAT = 1.0
#: Seconds that a running order gets to end after end of file.
LEAVE = 0.5
#: Most orders in hand: the one that runs, and what the daemon sent when it saw the end of that
#: one a moment before this side has.
MOST_ORDERS = 4
#: Exit status after a bug here or in the daemon (EX_SOFTWARE of sysexits.h).
EX_SOFTWARE = 70

Order = (
    child.Load
    | child.Picture
    | child.Video
    | child.Frames
    | child.Render
    | child.Encode
    | child.Generate
    | child.Embed
)


class Send(Protocol):
    """How a role answers; descriptors stay the role's."""

    def __call__(
        self, message: child.FromChild, fds: Sequence[int] = (), *, in_callback: bool = False
    ) -> None:
        """Send one frame.

        ``in_callback``: a library waits for the caller, so frames between an
        order and its end go by another thread. They keep their order, and stand
        before whatever is sent later.
        """
        ...


class Role(Protocol):
    """What a child can do. ``abort`` alone is called beside ``work``, from another thread."""

    def warm(self) -> None:
        """Import what the first order will need; runs once, after ``hello``."""
        ...

    def work(self, order: Order, fds: Sequence[int], send: Send) -> None:
        """Do one order and send its end; ``fds`` are closed by the caller.

        Raises:
          RkvlmdError: the order failed and this child is well.

        """
        ...

    def abort(self) -> None:
        """End the running order soon, if it can be ended.

        May come more than once, and just before an order begins to run or just
        after it has ended: an abort must not outlive the order.
        """
        ...


class Loop:
    """One child's life after ``hello``; ``run`` never returns."""

    def __init__(self, channel: Channel, role: Role) -> None:
        self._channel = channel
        self._role = role
        self._orders: queue.SimpleQueue[tuple[Order, Sequence[int]]] = queue.SimpleQueue()
        self._state = threading.Condition()
        self._in_hand: list[int] = []
        self._aborted: set[int] = set()

    def run(self) -> NoReturn:
        """Serve until end of file, then end the process with status 0.

        A bug on either side ends it with ``EX_SOFTWARE`` and a traceback on
        stderr, so that the daemon has the last words.
        """
        threading.Thread(target=self._worker, name="worker", daemon=True).start()
        try:
            self._serve()
        except EOFError:
            self._leave()
        except BaseException:  # noqa: BLE001 - the last words, whatever it was
            _die()

    def _serve(self) -> NoReturn:
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        beat_at: float | None = None
        while True:
            with self._state:
                busy = bool(self._in_hand)
            now = time.monotonic()
            # An idle child waits without a timeout: nothing wakes it up but an order.
            if not busy:
                beat_at = None
            elif beat_at is None:
                beat_at = now + BEAT
            elif now >= beat_at:
                self._beat()
                beat_at = now + BEAT
            wait = None if beat_at is None else max(0.0, beat_at - now) * 1000
            if poll.poll(wait):
                for order, fds in self._channel.receive():
                    self._take(order, fds)

    def _take(self, order: child.ToChild, fds: list[int]) -> None:
        if isinstance(order, child.Abort):
            close_all(fds)
            with self._state:
                if order.id not in self._in_hand:
                    return
                self._aborted.add(order.id)
                running = self._in_hand[0] == order.id
            if running:
                self._role.abort()
            return
        with self._state:
            if len(self._in_hand) >= MOST_ORDERS:
                raise frames.FrameError(f"more than {MOST_ORDERS} orders at the same time")
            self._in_hand.append(_id(order))
        self._orders.put((order, fds))

    def _beat(self) -> None:
        # No beat while the socket is full: then it is the other side that does not turn.
        self._channel.send_nowait(child.Beat())
        with self._state:
            again = bool(self._in_hand) and self._in_hand[0] in self._aborted
        if again:
            # The first call may have come just before the backend began to listen.
            self._role.abort()

    def _worker(self) -> None:
        try:
            self._role.warm()
            while True:
                self._do(*self._orders.get())
        except ConnectionError:
            return  # the main thread sees the end of file
        except BaseException:  # noqa: BLE001 - the last words, whatever it was
            _die()

    def _do(self, order: Order, fds: Sequence[int]) -> None:
        number = _id(order)

        said = False

        def send(
            message: child.FromChild, fds: Sequence[int] = (), *, in_callback: bool = False
        ) -> None:
            nonlocal said
            if said and in_callback and isinstance(message, child.Text):
                self._channel.send_later(message)
            elif in_callback and isinstance(message, child.Prefilled):
                self._channel.hold(message)
            else:
                # A job whose child dies is done again if it has no text yet: so the first one is
                # on its way before a library goes on.
                said = True
                self._channel.send(message, fds)
            # Closes the gap between an abort and a backend that began to listen after it.
            if number in self._aborted and isinstance(message, child.Prefilled | child.Text):
                self._role.abort()

        try:
            if isinstance(order, child.Generate) and number in self._aborted:
                send(child.GenerateDone(id=number, reason="aborted", completion=0, seconds=0.0))
            else:
                self._role.work(order, fds, send)
        except RkvlmdError as exc:
            send(child.Failed(id=number, code=exc.code, message=exc.message))
        finally:
            close_all(fds)
            with self._state:
                self._in_hand.remove(number)
                self._aborted.discard(number)
                self._state.notify_all()

    def _leave(self) -> NoReturn:
        # Ends by _exit in every case: a library that hangs must not keep the process, and
        # what it has open ends with the process.
        abort = threading.Thread(target=self._role.abort, daemon=True)
        abort.start()
        with self._state:
            self._state.wait_for(lambda: not self._in_hand, LEAVE)
        _flush()
        os._exit(0)


def _id(order: Order) -> int:
    return 0 if isinstance(order, child.Load) else order.id


def _die() -> NoReturn:
    traceback.print_exc()
    _flush()
    os._exit(EX_SOFTWARE)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
