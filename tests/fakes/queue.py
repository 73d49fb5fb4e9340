"""One accelerator and many clients, simulated: the real policy, no clock and no tasks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from rkvlmd.actors.policy import History, Rules, View, Waiting, affinity, choose


@dataclass(frozen=True)
class Work:
    """What arrives: ``seconds`` of work for ``model`` (empty: maintenance, which unloads)."""

    at: float
    client: str
    model: str = "a"
    seconds: float = 1.0
    rank: int = 1
    prefix: str = ""


@dataclass
class Served:
    """One piece of work and how it went; ``number`` counts services from 1, ``swaps`` loads."""

    work: Work
    ticket: Waiting
    waiting_before: list[Waiting]
    running: Served | None
    services_before: int
    swaps_before: int
    start: float = -1.0
    end: float = -1.0
    number: int = 0
    swap: bool = False

    @property
    def wait(self) -> float:
        return self.start - self.work.at


@dataclass
class Board:
    """Serves work in the order of the policy; each swap costs ``swap_seconds``."""

    rules: Rules = field(default_factory=Rules)
    swap_seconds: float = 0.0
    loaded: str = ""
    warm: frozenset[str] = frozenset()
    now: float = 0.0
    swaps: int = 0
    history: History = field(default_factory=History)
    served: list[Served] = field(default_factory=list)
    waiting: list[Served] = field(default_factory=list)
    #: The most clients that waited at one time, by class.
    most_clients: dict[int, int] = field(default_factory=dict)
    most_better: dict[int, int] = field(default_factory=dict)

    def arrive(self, work: Work, running: Served | None) -> None:
        ticket = Waiting(
            work.client, work.model, work.at, work.rank, self.history.number,
            prefix=(work.prefix,) if work.prefix else (),
        )  # fmt: skip
        before = [s.ticket for s in self.waiting]
        self.waiting.append(Served(work, ticket, before, running, self.history.number, self.swaps))

    def serve(self) -> Served:
        """Serve one of those who wait; ``now`` is its start, its end lies ahead."""
        tickets = [s.ticket for s in self.waiting]
        self._count(tickets)
        view = View(self.now, self.loaded, self.warm, self.history, self.rules)
        choice = choose(tickets, view)
        for index in choice.overtaken:
            other = self.waiting[index]
            other.ticket = replace(other.ticket, overtaken=other.ticket.overtaken + 1)
            assert other.ticket.overtaken <= self.rules.max_jumps
            assert other.ticket.rank >= tickets[choice.index].rank
        if choice.overtaken:
            assert affinity(tickets[choice.index], view) > affinity(
                tickets[choice.overtaken[0]], view
            )
        one = self.waiting.pop(choice.index)
        self.history = self.history.after(one.ticket, [s.ticket for s in self.waiting])
        one.number, one.start = self.history.number, self.now
        one.swap = bool(one.work.model) and one.work.model != self.loaded
        self.swaps += one.swap
        self.loaded = one.work.model
        self.warm = frozenset({one.work.prefix}) - {""}
        one.end = self.now + one.work.seconds + (self.swap_seconds if one.swap else 0.0)
        self.served.append(one)
        return one

    def _count(self, tickets: list[Waiting]) -> None:
        clients: dict[int, set[str]] = {}
        for ticket in tickets:
            clients.setdefault(ticket.rank, set()).add(ticket.client)
        for rank in clients:
            better = sum(len(c) for r, c in clients.items() if r < rank)
            self.most_clients[rank] = max(self.most_clients.get(rank, 0), len(clients[rank]))
            self.most_better[rank] = max(self.most_better.get(rank, 0), better)

    def run(self, arrivals: Iterable[Work]) -> list[Served]:
        """Serve everything, one after the other, never idle while somebody waits."""
        coming = sorted(arrivals, key=lambda work: work.at)
        coming.reverse()
        running: Served | None = None
        while coming or self.waiting:
            if not self.waiting:
                self.now = max(self.now, coming[-1].at)
            while coming and coming[-1].at <= self.now:
                work = coming.pop()
                during = running if running is not None and work.at < running.end else None
                self.arrive(work, during)
            running = self.serve()
            while coming and coming[-1].at < running.end:
                self.arrive(coming.pop(), running)
            self.now = running.end
        return self.served
