"""The rows of pictures that were encoded before: descriptors with a byte budget, each made once."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Iterator
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
    """Least recently used rows leave first, those that a job waits for last of all.

    What callers hold is their own. ``bytes`` never exceeds the budget.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._rows: OrderedDict[str, Rows] = OrderedDict()
        self._wanted: Counter[str] = Counter()
        self._flights: dict[str, trio.Event] = {}
        self.bytes = 0
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: object) -> bool:
        return key in self._rows or key in self._flights

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
        """Keep a second owner of the rows, within the budget."""
        if not self.keeps(rows.blob.size) or key in self._rows:
            return
        self._rows[key] = Rows(rows.blob.duplicate(), rows.tensor)
        self.bytes += rows.blob.size
        while self.bytes > self._most:
            oldest = next((k for k in self._rows if k not in self._wanted), next(iter(self._rows)))
            old = self._rows.pop(oldest)
            self.bytes -= old.blob.size
            old.blob.close()

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
        while self._rows:
            self._rows.popitem()[1].blob.close()
        self.bytes = 0
