"""What the cache of ``librkllmrt.so`` holds, as texts and pictures; no I/O.

The library reuses the longest common prefix of token sequences by itself. It
may take two pictures of the same size for the same, so a run whose first
difference to the cache lies at a picture must begin with an empty cache.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rkvlmd.engine.rkllm_inputs import IMAGE, VIDEO

#: Texts and the keys of pictures and videos in turn: text, key, text, ..., text. Texts may be empty.
Parts = tuple[str, ...]
_PLACES = re.compile(f"({IMAGE}|{VIDEO})")


def parts(prompt: str, pictures: Sequence[str], videos: Sequence[str] = ()) -> Parts:
    """Return a prompt as texts and the keys of what stands at its places.

    Raises:
      ValueError: there are not as many places as keys.

    """
    found = _PLACES.split(prompt)
    keys = {IMAGE: list(pictures), VIDEO: list(videos)}
    for mark, given in keys.items():
        if found.count(mark) != len(given):
            raise ValueError(f"{found.count(mark)} places {mark} for {len(given)} keys")
    for i in range(1, len(found), 2):
        found[i] = keys[found[i]].pop(0)
    return tuple(found)


def differs_at_picture(held: Parts, wanted: Parts) -> bool:
    """Return whether the first difference of two sequences lies at a picture.

    Where one ends while they are still the same, there is no difference.
    """
    for i, (old, new) in enumerate(zip(held, wanted, strict=False)):
        if old == new:
            continue
        if i % 2 == 1:
            return True
        # One text goes on where the other meets a picture: that is a difference at a picture.
        if new.startswith(old):
            return i + 1 < len(held)
        if old.startswith(new):
            return i + 1 < len(wanted)
        return False
    return False


class Record:
    """The cache's content, or that it is not known."""

    def __init__(self) -> None:
        self._held: Parts | None = ("",)

    @property
    def empty(self) -> bool:
        """Whether the cache is known to hold nothing."""
        return self._held == ("",)

    def must_clear(self, wanted: Parts, *, told_apart: bool, beside: bool = False) -> bool:
        """Return whether the cache must be cleared before a run of ``wanted``.

        ``told_apart`` says that this library has been seen to tell pictures
        apart. ``beside``: the model attends to its pictures from everywhere,
        so that nothing holds once they are others.
        """
        if self._held is None:
            return True
        if beside:
            return not self.empty and self._held[1::2] != wanted[1::2]
        return not told_apart and differs_at_picture(self._held, wanted)

    def cleared(self) -> None:
        """The cache is empty now."""
        self._held = ("",)

    def unknown(self) -> None:
        """Nobody knows what the cache holds: an abort, an error."""
        self._held = None

    def holds(self, prompt: Parts, answer: str) -> None:
        """A run has ended well: the cache holds the prompt and the answer."""
        self._held = (*prompt[:-1], prompt[-1] + answer)
