"""Encoding for the next job while the present one decodes; given up for good when it goes wrong."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from rkvlmd.actors.child import ChildDiedError, ChildWedgedError
from rkvlmd.errors import RkvlmdError

if TYPE_CHECKING:
    from rkvlmd.actors.lease import Lease
    from rkvlmd.actors.loading import Loaded

log = logging.getLogger(__name__)

#: What of an encode or a decode says that the NPU does not bear both.
_FAILURES = (RkvlmdError, ChildDiedError, ChildWedgedError)


class Overlap:
    """Whether encodes may run beside a decode (``npu.overlap``); ``nursery`` is where they do.

    ``broken`` says why it was given up, empty until ``gave_up`` is set.
    The lease stays with the job that decodes until such an encode has ended:
    so a load, an unload or a swap never meets one.
    """

    def __init__(self, *, on: bool) -> None:
        self._on = on
        self.broken = ""
        self.gave_up = trio.Event()
        self.encodes = 0
        self.nursery: trio.Nursery | None = None

    @property
    def on(self) -> bool:
        """Whether the next encode may begin."""
        return self._on and not self.broken

    def status(self) -> str:
        """For ``rkvlmctl status``: ``off``, ``on``, or why it was given up."""
        return f"given up: {self.broken}" if self.broken else "on" if self._on else "off"

    def give_up(self, why: str) -> None:
        """From now on encode and decode take turns, until the daemon starts again."""
        if not self.broken:
            self.broken = why
            self.gave_up.set()
            log.error("npu.overlap: given up until the next start: %s", why)

    @asynccontextmanager
    async def beside(self, lease: Lease, loaded: Loaded) -> AsyncIterator[trio.Event]:
        """Encode for whoever is next from when the event is set; join that at the end.

        The body holds the lease. If it fails while, or after, something was
        encoded beside it, that was one time too much.
        """
        begin = trio.Event()
        if not self.on or self.nursery is None:
            yield begin
            return
        before, done, scope = self.encodes, trio.Event(), trio.CancelScope()
        self.nursery.start_soon(self._encode, lease, loaded, begin, done, scope, name="overlap")
        try:
            yield begin
        except _FAILURES as exc:
            if self.encodes > before:
                self.give_up(f"a decode failed beside an encode ({type(exc).__name__})")
            raise
        finally:
            scope.cancel(reason="the decode has ended")
            with trio.CancelScope(shield=True):
                await done.wait()

    async def _encode(
        self, lease: Lease, loaded: Loaded, begin: trio.Event, done: trio.Event,
        scope: trio.CancelScope,
    ) -> None:  # fmt: skip
        try:
            with scope:
                await begin.wait()
                await self._serve(lease, loaded)
        except _FAILURES as exc:
            self.give_up(f"an encode failed beside a decode ({type(exc).__name__})")
        except Exception:  # a bug here is not the end of the daemon
            log.exception("npu.overlap")
            self.give_up("an encode beside a decode met an error of the server")
        finally:
            done.set()

    async def _serve(self, lease: Lease, loaded: Loaded) -> None:
        """Encode what the next one needs, picture by picture; wait for others in between."""
        while self.on:
            arrival = lease.arrival
            grip = lease.next()
            if grip is not None and grip.ahead is not None and grip.ticket.model == lease.loaded():
                self.encodes += 1
                if await grip.ahead(loaded):
                    continue
                self.encodes -= 1
            await arrival.wait()
