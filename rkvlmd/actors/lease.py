"""The lease: one holder at a time may run models or change which are loaded."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from rkvlmd.actors.policy import Policy, Waiting, first_come

if TYPE_CHECKING:
    from collections.abc import Callable


class Grip:
    """Proof of holding the lease; released once, by whoever owns it then."""

    __slots__ = ("_lease", "handed_over", "released", "ticket", "turn")

    def __init__(self, lease: Lease, ticket: Waiting) -> None:
        self._lease = lease
        self.ticket = ticket
        self.turn = trio.Event()
        self.handed_over = False
        self.released = False

    def release(self) -> None:
        """Let the next one have the lease."""
        if not self.released:
            self.released = True
            self._lease.pass_on(self)


class Lease:
    """Exclusive, in the order of a policy; a waiter that is cancelled is forgotten."""

    def __init__(self, policy: Policy = first_come, loaded: Callable[[], str] = lambda: "") -> None:
        self._policy = policy
        self.loaded = loaded
        self._holder: Grip | None = None
        self._waiting: list[Grip] = []
        self._since = 0.0
        self.busy_seconds = 0.0

    @property
    def held(self) -> bool:
        """Whether somebody holds it."""
        return self._holder is not None

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @asynccontextmanager
    async def hold(self, client: str, model: str) -> AsyncIterator[Grip]:
        """Wait for the lease; give it back at the end, unless it was handed over."""
        grip = Grip(self, Waiting(client, model, trio.current_time()))
        await self._acquire(grip)
        try:
            yield grip
        finally:
            if not grip.handed_over:
                grip.release()

    async def _acquire(self, grip: Grip) -> None:
        self._waiting.append(grip)
        if self._holder is None:
            self._give()
        try:
            await grip.turn.wait()
        except BaseException:
            # The turn may have come in the same moment.
            if grip.turn.is_set():
                grip.release()
            else:
                self._waiting.remove(grip)
            raise

    def pass_on(self, grip: Grip) -> None:
        """Called by ``Grip.release``."""
        assert self._holder is grip
        self._holder = None
        self.busy_seconds += trio.current_time() - self._since
        if self._waiting:
            self._give()

    def _give(self) -> None:
        index = self._policy([grip.ticket for grip in self._waiting], self.loaded())
        self._holder = self._waiting.pop(index)
        self._since = trio.current_time()
        self._holder.turn.set()
