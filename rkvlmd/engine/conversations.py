"""Several key/value caches of one decoder within a byte budget: one is worked on, the others kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, Self, TypeVar

from rkvlmd.engine.kv import Place, reusable

#: Most conversations that are kept, however small they are.
MOST = 64


class Cache(Protocol):
    """One key/value cache."""

    @property
    def places_held(self) -> int:
        """Places whose memory it holds, those it has been cut back from included."""
        ...

    def truncate(self, length: int) -> None:
        """Forget all places from ``length`` on."""
        ...

    def fork(self, length: int) -> Self:
        """Return a second cache with the first ``length`` places of this one."""
        ...


C = TypeVar("C", bound=Cache)


@dataclass(eq=False)
class Conversation(Generic[C]):
    """A cache and what each of its places holds; ``number`` is never used again."""

    cache: C
    number: int
    record: list[Place] = field(default_factory=list)


class Conversations(Generic[C]):
    """``current`` is worked on; the others together hold at most ``budget`` bytes.

    So the memory is at most the budget and one whole context.
    """

    def __init__(self, cache: C, *, bytes_per_place: int, budget: int) -> None:
        self._bytes = bytes_per_place
        self._budget = budget
        self._count = 0
        self.current = Conversation(cache, 0)
        #: The others, least recently used first.
        self._kept: list[Conversation[C]] = []

    def __len__(self) -> int:
        return 1 + len(self._kept)

    @property
    def kept_bytes(self) -> int:
        """What the others hold."""
        return sum(self._size(kept) for kept in self._kept)

    def take(self, prompt: Sequence[Place]) -> list[int]:
        """Make the best one for ``prompt`` the current one; return those that were forgotten.

        One that would lose more than half of what it holds is kept as it is,
        and what it shares with the prompt is copied: it is another
        conversation with the same beginning.
        """
        before = self.current
        best = max([before, *reversed(self._kept)], key=lambda c: reusable(c.record, prompt))
        shared = reusable(best.record, prompt)
        if 2 * shared < len(best.record) and self._size(best) <= self._budget:
            self._touch(before)
            if best is not before:
                self._touch(best)
            forgotten = self._forget_old()
            self._count += 1
            fork = best.cache.fork(shared)
            self.current = Conversation(fork, self._count, best.record[:shared])
            return forgotten
        if best is before:
            return []
        self._kept.remove(best)
        self._touch(before)
        self.current = best
        return self._forget_old()

    def clear(self) -> None:
        """Forget what the current one holds; the others stay."""
        self.current.record = []
        self.current.cache.truncate(0)

    def _touch(self, one: Conversation[C]) -> None:
        if one in self._kept:
            self._kept.remove(one)
        self._kept.append(one)

    def _forget_old(self) -> list[int]:
        forgotten = []
        while self._kept and (self.kept_bytes > self._budget or len(self._kept) >= MOST):
            forgotten.append(self._kept.pop(0).number)
        return forgotten

    def _size(self, one: Conversation[C]) -> int:
        return one.cache.places_held * self._bytes
