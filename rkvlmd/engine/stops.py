"""Finds stop strings in text that arrives in pieces; no I/O."""

from __future__ import annotations

from collections.abc import Iterable

from rkvlmd.wire.thinking import Divider, Thinking


class StopMatcher:
    """Cuts text before the earliest of some stop strings.

    The pieces that ``feed`` and ``finish`` return, joined, are the text before
    the stop string that begins first (of those, any), however the text was
    cut. Only text that could still begin a stop string is held back. Empty
    stop strings are ignored. Thoughts, which ``thinking`` describes, pass
    whatever they hold: a client's stop strings are meant for the answer.
    """

    def __init__(self, stops: Iterable[str], thinking: Thinking | None = None) -> None:
        self._stops = tuple(sorted({s for s in stops if s}))
        self._thoughts = Divider(thinking) if thinking is not None and self._stops else None
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Take the next piece of text; return what is certain to stand before any stop string.

        ``stopped`` is true when a stop string was found; nothing comes after that.
        """
        if self._thoughts is None:
            return self._take(text, final=False)
        thought, text = self._thoughts.feed(text)
        return thought + self._take(text, final=False)

    def finish(self) -> str:
        """Return what was held back, at the end of the text; ``stopped`` may become true."""
        thought, text = ("", "") if self._thoughts is None else self._thoughts.finish()
        return thought + self._take(text, final=True)

    def _take(self, text: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        held = self._held + text
        found = min((at for s in self._stops if (at := held.find(s)) >= 0), default=-1)
        pending = len(held) if final else self._pending(held)
        if 0 <= found <= pending:
            self._held, self.stopped = "", True
            return held[:found]
        # A stop string that may begin before the one found is still open: wait for it.
        self._held = held[pending:]
        return held[:pending]

    def _pending(self, held: str) -> int:
        """Return where the longest end of ``held`` that could begin a stop string starts."""
        longest = max((len(s) for s in self._stops), default=1) - 1
        for at in range(max(0, len(held) - longest), len(held)):
            if any(s.startswith(held[at:]) for s in self._stops):
                return at
        return len(held)
