"""The rows of pictures that were encoded before: descriptors with a byte budget."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Self

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
    """Least recently used rows leave first; what callers hold is their own."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._rows: OrderedDict[str, Rows] = OrderedDict()
        self.bytes = 0
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: str) -> Rows | None:
        """Return rows that the caller owns, or ``None``."""
        rows = self._rows.get(key)
        if rows is None:
            self.misses += 1
            return None
        self.hits += 1
        self._rows.move_to_end(key)
        return Rows(rows.blob.duplicate(), rows.tensor)

    def put(self, key: str, rows: Rows) -> None:
        """Keep a second owner of the rows, within the budget."""
        if rows.blob.size > self._most or key in self._rows:
            return
        self._rows[key] = Rows(rows.blob.duplicate(), rows.tensor)
        self.bytes += rows.blob.size
        while self.bytes > self._most:
            _, old = self._rows.popitem(last=False)
            self.bytes -= old.blob.size
            old.blob.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Give every descriptor back."""
        while self._rows:
            self._rows.popitem()[1].blob.close()
        self.bytes = 0
