"""Sealed memfds: bytes that cross between processes without passing through the daemon."""

from __future__ import annotations

import fcntl
import os
from typing import Self

import trio

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
#: Bytes copied between two checkpoints; about a tenth of a millisecond.
_CHUNK = 1 << 18
#: One file at a time: sixteen chunks in one turn of the loop would be a long turn.
_filling = trio.Lock()


class Blob:
    """Owns one descriptor. Closing twice is harmless."""

    __slots__ = ("_fd", "size")

    live = 0
    live_bytes = 0

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = os.fstat(fd).st_size
        Blob.live += 1
        Blob.live_bytes += self.size

    @property
    def fd(self) -> int:
        """The descriptor; -1 once closed."""
        return self._fd

    def duplicate(self) -> Blob:
        """Return a second owner of the same bytes."""
        return Blob(fcntl.fcntl(self._fd, fcntl.F_DUPFD_CLOEXEC, 3))

    def close(self) -> None:
        """Give the descriptor back."""
        if self._fd >= 0:
            Blob.live -= 1
            Blob.live_bytes -= self.size
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


async def from_bytes(data: bytes, name: str = "rkvlmd") -> Blob:
    """Copy bytes into a sealed memfd, in chunks so that the loop keeps turning."""
    return await _fill((data[i : i + _CHUNK] for i in range(0, len(data), _CHUNK)), name)


async def from_text(text: str, name: str = "rkvlmd") -> Blob:
    """Copy text as UTF-8 into a sealed memfd, in chunks so that the loop keeps turning.

    A lone surrogate becomes ``?``.
    """
    pieces = (text[i : i + _CHUNK].encode(errors="replace") for i in range(0, len(text), _CHUNK))
    return await _fill(pieces, name)


async def _fill(pieces: object, name: str) -> Blob:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        async with _filling:
            for piece in pieces:  # type: ignore[attr-defined]
                view = memoryview(piece)
                while view:
                    view = view[os.write(fd, view) :]
                await trio.lowlevel.checkpoint()
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return Blob(fd)
