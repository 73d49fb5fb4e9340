"""What residency remembers over a restart: pins, and what each load took."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec
import trio

log = logging.getLogger(__name__)

#: File in the state folder.
FILE = "models.json"
#: Largest file that is read, bytes: some hundred bytes a model, and at most 256 models.
MAX_BYTES = 1 << 20


class Memo(msgspec.Struct):
    """One model. ``digest`` is that of its manifest: with another one only the pin counts.

    ``load_seconds`` is what starting a set of parts took, without the check of
    the hashes; ``peak_bytes`` the most resident memory of each part. Their keys
    are those of ``loading.Part``.
    """

    digest: str = ""
    pinned: bool = False
    load_seconds: dict[str, float] = {}
    peak_bytes: dict[str, int] = {}


class Ledger:
    """A file of memos by model name; without a path nothing is kept. Best effort both ways."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._turn = trio.Lock()

    async def read(self) -> dict[str, Memo]:
        """Return what was kept, nothing where it cannot be read."""
        if self._path is None:
            return {}
        return await trio.to_thread.run_sync(_read, self._path)

    async def write(self, memos: dict[str, Memo]) -> bool:
        """Replace the file; whether that was done."""
        if self._path is None:
            return True
        data = msgspec.json.encode(memos)
        async with self._turn:
            return await trio.to_thread.run_sync(_write, self._path, data)


def _read(path: Path) -> dict[str, Memo]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as exc:
        log.warning("%s cannot be read: %s", FILE, exc.strerror)
        return {}
    try:
        return msgspec.json.decode(data, type=dict[str, Memo])
    except (msgspec.DecodeError, UnicodeDecodeError):
        log.warning("%s in the state folder is damaged; pins and load times are forgotten", FILE)
        return {}


def _write(path: Path, data: bytes) -> bool:
    temporary = path.with_suffix(".new")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            # A board may lose its power at any moment, and a pin is the owner's word.
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as exc:
        log.warning("pins and load times could not be kept: %s", exc.strerror)
        return False
    return True
