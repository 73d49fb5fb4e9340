"""Requests at whose work a child died: twice, and they are refused for a while."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable

import trio

from rkvlmd.errors import RkvlmdError

#: Most requests remembered; the oldest is forgotten first.
MOST = 1024
#: Deaths after which a request is refused.
DEATHS = 2


def content_key(turns: object, pictures: Iterable[str]) -> str:
    """Return a SHA-256 (hex) over a conversation and its pictures (hashes or base64 text)."""
    digest = hashlib.sha256(repr(turns).encode(errors="replace"))
    for picture in pictures:
        digest.update(b"\0")
        digest.update(picture.encode(errors="replace"))
    return digest.hexdigest()


class CrashMemory:
    """Counts deaths by content, so that one client cannot take a board down."""

    def __init__(self, refuse_seconds: float) -> None:
        self._refuse = refuse_seconds
        self._deaths: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def __len__(self) -> int:
        self._expire()
        return len(self._deaths)

    def note(self, key: str, deaths: int = 1) -> None:
        """Children died while they worked on this content: so many, or none."""
        if not deaths:
            return
        self._expire()
        count, _ = self._deaths.pop(key, (0, 0.0))
        self._deaths[key] = (count + deaths, trio.current_time() + self._refuse)
        while len(self._deaths) > MOST:
            self._deaths.popitem(last=False)

    def check(self, key: str) -> None:
        """Refuse content that has killed twice.

        Raises:
          RkvlmdError: ``engine_crash``.

        """
        self._expire()
        if self._deaths.get(key, (0, 0.0))[0] >= DEATHS:
            raise RkvlmdError(
                "engine_crash",
                "This request has crashed the engine before and is refused for a while.",
                should_retry=False,
            )

    def _expire(self) -> None:
        """Forget what is over; the latest death stands last, so the first ones end first."""
        now = trio.current_time()
        while self._deaths and next(iter(self._deaths.values()))[1] < now:
            self._deaths.popitem(last=False)
