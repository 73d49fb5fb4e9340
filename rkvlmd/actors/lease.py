"""The lease: one holder at a time may run models or change which are loaded."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from rkvlmd.actors.policy import NORMAL, History, Policy, Rules, View, Waiting, choose

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Container

    from rkvlmd.actors.loading import Loaded
    from rkvlmd.actors.relay import Begun

    #: Does something for one who waits while another holds the lease; false: nothing is left.
    Ahead = Callable[[Loaded], Awaitable[bool]]


class Grip:
    """Proof of holding the lease; released once, by whoever owns it then.

    ``first`` begins the holder's work as the lease is given to it, without
    waiting; ``begun`` is that work.
    """

    __slots__ = ("_lease", "ahead", "begun", "first", "handed_over", "released", "ticket", "turn")

    def __init__(
        self,
        lease: Lease,
        ticket: Waiting,
        ahead: Ahead | None = None,
        first: Callable[[], Begun | None] = lambda: None,
    ) -> None:
        self._lease = lease
        self.ticket = ticket
        self.ahead = ahead
        self.first = first
        self.begun: Begun | None = None
        self.turn = trio.Event()
        self.handed_over = False
        self.released = False

    def release(self) -> None:
        """Let the next one have the lease."""
        if not self.released:
            self.released = True
            self._lease.pass_on(self)


class Lease:
    """Exclusive, in the order of a policy; a waiter that is cancelled is forgotten.

    ``loaded`` says which model is loaded, ``warm`` which blocks of prompts its
    KV cache holds (``wire.prefix``); ``on_pass`` hears of each holder's end,
    with the seconds it held.
    """

    def __init__(self, rules: Rules | None = None, policy: Policy = choose) -> None:
        self._policy = policy
        self._rules = rules or Rules()
        self.loaded: Callable[[], str] = lambda: ""
        self.warm: Container[str] = frozenset()
        self.on_pass: Callable[[Waiting, float], None] = lambda _ticket, _seconds: None
        self._history = History()
        self._holder: Grip | None = None
        self._waiting: list[Grip] = []
        self._since = 0.0
        self._busy_before = 0.0
        #: Set when the next one comes, then replaced.
        self.arrival = trio.Event()

    def adopt(self, rules: Rules) -> None:
        """Take rules that were read again, from the next choice on."""
        self._rules = rules

    @property
    def held(self) -> bool:
        """Whether somebody holds it."""
        return self._holder is not None

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def held_seconds(self) -> float:
        """How long the present holder has had it; 0 when nobody has."""
        return trio.current_time() - self._since if self._holder is not None else 0.0

    @property
    def busy_seconds(self) -> float:
        """How long it was held since the start, all holders together."""
        return self._busy_before + self.held_seconds

    def tickets(self) -> list[Waiting]:
        """Return those who wait, in order of arrival."""
        return [grip.ticket for grip in self._waiting]

    def next(self) -> Grip | None:
        """Return whose turn would come now; ``None`` when nobody waits."""
        if not self._waiting:
            return None
        return self._waiting[self._policy(self.tickets(), self.view()).index]

    def ticket(
        self, client: str, model: str, rank: int = NORMAL, prefix: tuple[str, ...] = ()
    ) -> Waiting:
        """Return the ticket of one who comes now."""
        number = self._history.number
        return Waiting(client, model, trio.current_time(), rank, number, prefix=prefix)

    def view(self) -> View:
        """Return what the policy sees now."""
        return View(trio.current_time(), self.loaded(), self.warm, self._history, self._rules)

    @asynccontextmanager
    async def hold(
        self,
        client: str,
        model: str,
        rank: int = NORMAL,
        prefix: tuple[str, ...] = (),
        ahead: Ahead | None = None,
        first: Callable[[], Begun | None] = lambda: None,
        early: Grip | None = None,
    ) -> AsyncIterator[Grip]:
        """Wait for the lease; give it back at the end, unless it was handed over or given back.

        ``early`` is what ``take`` has returned: then nobody waits.
        """
        grip = early or Grip(self, self.ticket(client, model, rank, prefix), ahead, first)
        if early is None:
            await self._acquire(grip)
        try:
            yield grip
        finally:
            await self.end(grip)

    def take(
        self, client: str, model: str, rank: int, begin: Callable[[], Begun | None]
    ) -> Grip | None:
        """Take the lease without waiting, if it is free and some work can begin at once.

        The caller gives it to ``hold`` or to ``end``.
        """
        if self._holder is not None or self._waiting or (begun := begin()) is None:
            return None
        grip = Grip(self, self.ticket(client, model, rank), first=lambda: begun)
        self._waiting.append(grip)
        self._give()
        return grip

    async def end(self, grip: Grip) -> None:
        """Let the next one have the lease when nothing is at work for this one."""
        try:
            if grip.begun is not None:
                await grip.begun.settle()
        finally:
            if not grip.handed_over:
                grip.release()

    async def _acquire(self, grip: Grip) -> None:
        self._waiting.append(grip)
        arrived, self.arrival = self.arrival, trio.Event()
        arrived.set()
        if self._holder is None:
            self._give()
        try:
            if grip.turn.is_set():
                # Not a turn of the loop later: what is free is used at once.
                await trio.lowlevel.checkpoint_if_cancelled()
            else:
                await grip.turn.wait()
        except BaseException:
            # The turn may have come in the same moment.
            if grip.turn.is_set():
                await self.end(grip)
            else:
                self._waiting.remove(grip)
            raise

    def pass_on(self, grip: Grip) -> None:
        """Called by ``Grip.release``."""
        assert self._holder is grip
        seconds = self.held_seconds
        self._holder = None
        self._busy_before += seconds
        self.on_pass(grip.ticket, seconds)
        if self._waiting:
            self._give()

    def _give(self) -> None:
        choice = self._policy(self.tickets(), self.view())
        for index in choice.overtaken:
            other = self._waiting[index]
            other.ticket = replace(other.ticket, overtaken=other.ticket.overtaken + 1)
        self._holder = self._waiting.pop(choice.index)
        self._history = self._history.after(self._holder.ticket, self.tickets())
        self._since = trio.current_time()
        self._holder.turn.set()
        self._holder.begun = self._holder.first()
