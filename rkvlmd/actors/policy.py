"""Who gets the lease next: pure functions over those who wait and what was served before.

Three rules, in this order of strength:

1. **Classes.** The best class that waits is served first: interactive, normal, batch. A class
   one of whose jobs has waited ``age_seconds`` for each class between takes part among the clients
   of the better class, as if the whole class were one more client there: so age wins against
   class, a crowd of old jobs does not push the better class aside, and age never changes the order
   inside a class.
2. **Clients.** Inside a class clients take turns; the jobs of one client stay in their order. A
   client that comes is put right before the client whose job runs: it waits for nobody who was
   served since, and overtakes nobody who waited before.
3. **Affinity.** A job that needs no swap, or continues what the KV cache holds, may be served before
   jobs that stand before it. Each job is overtaken at most ``max_jumps`` times in its life, and
   never by a job of a worse class.

Maintenance (loads and unloads by the owner) is one more client of class normal, without affinity.

The bound. Let J wait, of a class with c better ones, and let S be the longest time that one holder
keeps the lease (a swap included), m ``max_jumps``, r how many jobs of J's client and class waited
when J came, K the most clients that wait in J's class at one time, G the most clients that wait in
better classes at one time. J then starts within::

    S * (1 + (r + 1) * (K + m + 2))                                       c = 0
    c * age_seconds + S * (1 + (r + 1) * (K + m) * (G + m + 2))           c > 0

Why. After ``c * age_seconds`` J's class takes part everywhere. The head of a client's line has a
fixed place in the turns of its class: before it only the at most K - 1 clients that waited by then,
once each, and m who overtake it; r + 1 such turns, one for each of the client's jobs. In the same
way the head of the class waits among the better clients for at most G of them, one more class that
is old, and m who overtake it. One job runs when J comes. For c = 0 the two worse classes
may take part once a turn.

Between two clients of one class alone (K = 2, r = 0) the other's request starts after the job that
runs, or one turn of the client that runs not, and at most m more: 1 + m foreign jobs. Who came while
the other's job ran, or nobody's, meets one swap, its own: who overtakes never swaps. Who came while a
job of its own client ran may meet one more, that of the other's turn. Later requests of its own
client that go first, at most m, are turns of that client: each may let in one more foreign swap.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field

from rkvlmd.messages import PRIORITIES

INTERACTIVE, NORMAL, BATCH = range(len(PRIORITIES))


@dataclass(frozen=True, slots=True)
class Waiting:
    """One who waits for the lease.

    ``model`` is empty for maintenance (a load or an unload by the owner).
    ``since`` is the loop's clock, seconds. ``rank`` is the class, 0 the best
    (an index into ``messages.PRIORITIES``). ``arrived`` is the number of the
    latest service when it came, ``overtaken`` how often somebody was served
    before it who stood behind. ``prefix`` names the blocks of its prompt
    (``wire.prefix``): where ``View.warm`` holds at least half of them, the
    KV cache saves it most of its prefill; empty: it has nothing to save.
    """

    client: str
    model: str
    since: float
    rank: int = NORMAL
    arrived: int = 0
    overtaken: int = 0
    prefix: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings of the policy (``queue.age_seconds``, ``queue.max_jumps``)."""

    age_seconds: float = 30.0
    max_jumps: int = 4


@dataclass(frozen=True, slots=True)
class History:
    """What was served: services are numbered from 1.

    ``number`` is the latest service, ``lines`` the latest of each (class,
    client) that matters still, ``classes`` the latest of each class.
    """

    number: int = 0
    lines: Mapping[tuple[int, str], int] = field(default_factory=dict)
    classes: Mapping[int, int] = field(default_factory=dict)

    def after(self, served: Waiting, left: Sequence[Waiting]) -> History:
        """Return the history with one more service; ``left`` are those who wait on.

        A line that does not wait is forgotten: if it comes back it stands
        behind its old place anyway.
        """
        number = self.number + 1
        waiting = {(ticket.rank, ticket.client) for ticket in left}
        lines = {line: n for line, n in self.lines.items() if line in waiting}
        lines[served.rank, served.client] = number
        return History(number, lines, {**self.classes, served.rank: number})


@dataclass(frozen=True, slots=True)
class View:
    """What the policy looks at besides those who wait.

    ``now`` is the loop's clock, seconds; ``loaded`` the model that is loaded
    (empty: none); ``warm`` names the blocks that its KV cache holds.
    """

    now: float
    loaded: str = ""
    warm: Container[str] = frozenset()
    history: History = field(default_factory=History)
    rules: Rules = field(default_factory=Rules)


@dataclass(frozen=True, slots=True)
class Choice:
    """The index of the next one, and the indices of those whom it overtakes."""

    index: int
    overtaken: tuple[int, ...] = ()


Policy = Callable[[Sequence[Waiting], View], Choice]


def choose(waiting: Sequence[Waiting], view: View) -> Choice:
    """Choose the next one; ``waiting`` is in order of arrival and never empty."""
    order = _fair_order(waiting, view)
    best = order[0]
    best_affinity = affinity(waiting[best], view)
    best_rank = waiting[best].rank
    place = 0
    for at, index in enumerate(order):
        ticket = waiting[index]
        best_rank = min(best_rank, ticket.rank)
        if ticket.rank == best_rank and (near := affinity(ticket, view)) > best_affinity:
            best, best_affinity, place = index, near, at
        if ticket.overtaken >= view.rules.max_jumps or best_affinity == _MOST:
            break
    return Choice(best, tuple(order[:place]))


_MOST = 2


def affinity(ticket: Waiting, view: View) -> int:
    """Return 2 for a prefix that is warm, 1 for the loaded model, 0 for a swap and maintenance."""
    if not ticket.model or ticket.model != view.loaded:
        return 0
    # Each name stands for everything before it: the one in the middle says enough.
    names = ticket.prefix
    return _MOST if names and names[(len(names) - 1) // 2] in view.warm else 1


def ahead(waiting: Sequence[Waiting], view: View, newcomer: Waiting) -> int:
    """Return how many of ``waiting`` would be served before ``newcomer`` if nothing else came.

    An estimate: age and affinity are left out.
    """
    lines = _lines([*waiting, newcomer], view.history)
    last = len(waiting)
    place = next(place for place in lines[newcomer.rank] if place[2] == last)
    better = sum(len(line) for rank, line in lines.items() if rank < newcomer.rank)
    return better + lines[newcomer.rank].index(place)


_Place = tuple[int, float, int]


def _lines(waiting: Sequence[Waiting], history: History) -> dict[int, list[_Place]]:
    """Return each class in the order of its turns: (round, key, index into ``waiting``).

    A client's n-th job stands in round n. In a round those come first whose
    client was served longest ago; who was not served since it came stands
    right before what ran then.
    """
    rounds: dict[tuple[int, str], int] = {}
    lines: dict[int, list[_Place]] = {}
    for index, ticket in enumerate(waiting):
        line = (ticket.rank, ticket.client)
        rounds[line] = number = rounds.get(line, -1) + 1
        key = max(history.lines.get(line, 0), ticket.arrived - 0.5)
        lines.setdefault(ticket.rank, []).append((number, key, index))
    for places in lines.values():
        places.sort()
    return lines


def _fair_order(waiting: Sequence[Waiting], view: View) -> list[int]:
    """Return the indices of those who may be served now, in the order of their turns."""
    lines = _lines(waiting, view.history)
    best = min(lines)
    order = list(lines.pop(best))
    for rank, places in lines.items():
        oldest = min(waiting[index].since for _, _, index in places)
        if view.now - oldest >= (rank - best) * view.rules.age_seconds:
            key = view.history.classes.get(rank, 0)
            order += [(turn, key, index) for turn, (_, _, index) in enumerate(places)]
    order.sort()
    return [index for _, _, index in order]
