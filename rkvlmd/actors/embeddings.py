"""The rows of pictures that were encoded before: descriptors with a byte budget, each made once."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import trio

from rkvlmd.actors.blobs import Blob
from rkvlmd.wire.child import Tensor


def row_key(picture: str, preparation: str) -> str:
    """Return the key of a picture's rows.

    ``picture`` is the SHA-256 of the file's bytes, ``preparation`` that of the
    encoder's manifest entry (preprocessing and the digest of its file).
    """
    return hashlib.sha256(f"1 {picture} {preparation}".encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Rows:
    """float32 rows of shape (image tokens, embedding size) in a memfd."""

    blob: Blob
    tensor: Tensor


class EmbeddingCache:
    """The least recently used rows leave first, then those that the last job waits for.

    Claimed rows stay. What callers hold is their own. ``bytes`` never exceeds
    the budget.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._rows: OrderedDict[str, Rows] = OrderedDict()
        #: Those that came first stand first.
        self._wanted: Counter[str] = Counter()
        self._claims: Counter[str] = Counter()
        self._claimed_bytes = 0
        self._flights: dict[str, trio.Event] = {}
        self._leaving: dict[str, Rows] = {}
        #: Hears whose rows have left, a while after they did.
        self.on_leave: Callable[[Collection[str]], None] = lambda _keys: None
        self.bytes = 0
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: object) -> bool:
        return key in self._rows or key in self._flights

    def has(self, key: str) -> bool:
        """Whether these rows are here now."""
        return key in self._rows

    def keeps(self, size: int) -> bool:
        """Whether rows of so many bytes are kept at all."""
        return size <= self._most

    def get(self, key: str) -> Rows | None:
        """Return rows that the caller owns, or ``None``."""
        rows = self._rows.get(key)
        if rows is None:
            self.misses += 1
            return None
        self.hits += 1
        self._rows.move_to_end(key)
        return Rows(rows.blob.duplicate(), rows.tensor)

    async def get_or_make(self, key: str, make: Callable[[], Awaitable[Rows]]) -> tuple[Rows, bool]:
        """Return rows that the caller owns, and whether they were there; make them else.

        Several callers of one key at the same time cause one ``make``: the
        others wait. If it fails, the next one tries.
        """
        while (flight := self._flights.get(key)) is not None:
            await flight.wait()
        if (rows := self.get(key)) is not None:
            return rows, True
        self._flights[key] = landed = trio.Event()
        try:
            rows = await make()
        finally:
            del self._flights[key]
            landed.set()
        self.put(key, rows)
        return rows, False

    def put(self, key: str, rows: Rows) -> None:
        """Keep a second owner of the rows, within the budget; not where others are worth more."""
        self.sweep()
        if not self.keeps(rows.blob.size) or key in self._rows:
            return
        self._rows[key] = Rows(rows.blob.duplicate(), rows.tensor)
        self.bytes += rows.blob.size
        while self.bytes > self._most:
            least = self._least(key)
            self._leaving[least] = old = self._rows.pop(least)
            self.bytes -= old.blob.size

    def sweep(self) -> None:
        """Close what left with the last ``put``.

        The last owner of some megabytes gives them back to the kernel, and
        waits for that: better while the NPU is at work than before.
        """
        if not self._leaving:
            return
        left, self._leaving = self._leaving, {}
        for rows in left.values():
            rows.blob.close()
        self.on_leave(left.keys())

    def _least(self, new: str) -> str:
        """Return whose rows leave for ``new``, or ``new``.

        Whoever waits is served more or less in the order of arrival: what the
        last one waits for is needed last.
        """
        free = [key for key in self._rows if key not in self._claims]
        unwanted = next((key for key in free if key not in self._wanted and key != new), None)
        if unwanted is not None:
            return unwanted
        if new not in self._wanted:
            return new
        places = {key: place for place, key in enumerate(self._wanted)}
        return max(free, key=places.__getitem__)

    def claim(self, keys: Collection[str]) -> bool:
        """Keep all of these rows until ``release``, whatever comes; or say that it cannot be.

        They must be here, and all claims together leave half of the budget to
        others.
        """
        if any(key not in self._rows for key in keys):
            return False
        more = sum(self._rows[key].blob.size for key in set(keys) if key not in self._claims)
        if self._claimed_bytes + more > self._most // 2:
            return False
        self._claimed_bytes += more
        self._claims.update(keys)
        return True

    def release(self, keys: Collection[str]) -> None:
        """Undo one ``claim``."""
        for key in keys:
            self._claims[key] -= 1
            if self._claims[key] > 0:
                continue
            del self._claims[key]
            if key in self._rows:
                self._claimed_bytes -= self._rows[key].blob.size

    @contextmanager
    def wanted(self, keys: Iterable[str]) -> Iterator[None]:
        """Hold on to these rows as long as there is room without anybody's whom a job waits for."""
        mine = Counter(iter(keys))
        self._wanted += mine
        try:
            yield
        finally:
            self._wanted -= mine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Give every descriptor back."""
        self.sweep()
        while self._rows:
            self._rows.popitem()[1].blob.close()
        self.bytes = self._claimed_bytes = 0
