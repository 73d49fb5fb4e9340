"""What the decoder's key/value cache holds, as the decoder has said after each run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rkvlmd.actors.child import Child
    from rkvlmd.wire.child import GenerateDone


class Warm:
    """The names of blocks (``wire.prefix``) that need no prefill now; a hint, never a promise.

    Bounded by what the decoder keeps: it says which conversations it has
    forgotten.
    """

    def __init__(self) -> None:
        self._decoder: Child | None = None
        self._held: dict[int, frozenset[str]] = {}

    def __contains__(self, name: object) -> bool:
        if self._decoder is None or not self._decoder.alive:
            return False
        return any(name in names for names in self._held.values())

    @property
    def conversations(self) -> int:
        """How many conversations are held."""
        return len(self._held)

    def learn(self, decoder: Child, done: GenerateDone | None) -> None:
        """A run of ``decoder`` has ended; ``None``: in a way that leaves its cache unknown."""
        if decoder is not self._decoder or done is None:
            self._decoder, self._held = decoder, {}
        if done is None:
            return
        for number in done.forgot:
            self._held.pop(number, None)
        if done.held:
            self._held[done.conversation] = frozenset(done.held)
        else:
            self._held.pop(done.conversation, None)
