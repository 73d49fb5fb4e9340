"""The key/value caches of several conversations on RKLLM: prompt-cache files that lie in memory.

The library has one cache. A prompt-cache file holds what it was after a prompt; loading it again
takes the place of computing that prompt. Whether that pays is measured, and it ends when it does
not: nothing here is needed for a right answer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rkvlmd.engine.kv import Place
from rkvlmd.engine.rkllm_record import Parts, differs_at_picture
from rkvlmd.engine.rkllm_session import Session
from rkvlmd.wire.child import Perf
from rkvlmd.wire.prefix import BLOCK, TOKEN_BYTES, Chain

#: Most conversations that are kept, however small they are.
MOST = 64
#: Tokens that the name of a block stands for.
TOKENS = BLOCK // TOKEN_BYTES
#: Runs in a row that saved nothing, or that computing would have beaten, until it is not tried
#: any more: one slow restore on a busy machine proves nothing.
STRIKES = 3
#: How fast averages forget.
_NEW = 0.3


@dataclass(eq=False)
class Saved:
    """One file: a memory file of this process, and the prompt that it holds."""

    number: int
    fd: int
    names: Chain
    parts: Parts
    places: list[Place]
    size: int = 0

    @property
    def path(self) -> Path:
        """A name of the file for the library; it is gone when the process is."""
        return Path(f"/proc/self/fd/{self.fd}")


@dataclass
class Seconds:
    """What a token costs, measured; ``None`` until it was."""

    prefill: float | None = None
    restore: float | None = None
    lost: int = 0  # restores in a row that computing would have beaten

    @staticmethod
    def _mix(before: float | None, now: float) -> float:
        return now if before is None else before + _NEW * (now - before)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """So many tokens were computed in this time."""
        if tokens >= TOKENS:
            self.prefill = self._mix(self.prefill, seconds / tokens)

    def restored(self, tokens: int, seconds: float) -> None:
        """So many tokens came from a file; loading and saving took this time."""
        cost = seconds / max(1, tokens)
        self.restore = self._mix(self.restore, cost)
        won = self.prefill is None or cost < self.prefill
        self.lost = 0 if won else self.lost + 1

    @property
    def pays(self) -> bool:
        """Whether a file is faster than computing, as far as is known."""
        return self.lost < STRIKES


@dataclass(eq=False)
class Conversations:
    """At most ``budget`` bytes of files, the least recently used leave first.

    ``pictures``: whether a file may hold them. ``released`` is called when a
    file was let go of, so that another may be loaded. ``why`` says why nothing
    is kept any more, once that is so.
    """

    session: Session
    budget: int
    pictures: bool
    released: Callable[[], object] = lambda: None
    why: str = ""
    seconds: Seconds = field(default_factory=Seconds)
    _kept: list[Saved] = field(default_factory=list)
    _count: int = 0
    _left: list[int] = field(default_factory=list)
    _strikes: int = 0
    _loading: float = 0.0
    _restored: Saved | None = None

    @property
    def on(self) -> bool:
        """Whether files are kept at all."""
        return self.budget > 0 and not self.why

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """What the files hold together."""
        return sum(saved.size for saved in self._kept)

    # --- before a run -----------------------------------------------------------------

    def restore(
        self, names: Chain, parts: Parts, live: Sequence[str], *, told_apart: bool
    ) -> Saved | None:
        """Load the file that saves the most, if one does; the cache is empty beside it then.

        ``live`` are the names of what the library's own cache holds.
        ``told_apart``: the library tells pictures apart. Call ``finish``
        after the run.
        """
        self._restored = None
        if not self.on or not self._kept:
            return None
        fits = [s for s in self._kept if told_apart or not differs_at_picture(s.parts, parts)]
        best = max(fits, key=lambda s: shared(s.names, names), default=None)
        if best is None or shared(best.names, names) <= shared(live, names):
            return None
        began = time.monotonic()
        self.session.clear()
        self.session.release_prompt_cache()
        if self.session.load_prompt_cache(best.path) != 0:
            self._drop(best)
            self.released()
            return None
        self._loading = time.monotonic() - began
        self._kept.remove(best)
        self._kept.append(best)
        self._restored = best
        return best

    def begin(self, names: Chain, parts: Parts, places: list[Place]) -> Saved | None:
        """Return an empty file that a run of this prompt shall be saved in, if it shall."""
        if not self.on or not names or (len(parts) > 1 and not self.pictures):
            return None
        self._count += 1
        fd = os.memfd_create("rkvlmd-conversation", os.MFD_CLOEXEC)
        return Saved(self._count, fd, names, parts, places)

    # --- after it ---------------------------------------------------------------------

    def finish(
        self, new: Saved | None, *, well: bool, prompt: int, first: float, perf: Perf | None
    ) -> list[int]:
        """Take over what was saved, and learn from a run; return the numbers that left.

        ``prompt`` counts its tokens, ``first`` is the time until the first
        token, ``perf`` what the library has measured itself.
        """
        if self._restored is not None:
            # Else it would go on to stand for the beginning of other prompts.
            self.session.release_prompt_cache()
            self.released()
        if perf is not None and perf.prefill_tokens >= 0:
            self._learn(prompt, first, perf)
        if new is not None:
            self._keep(new, well=well)
        self._restored = None
        if not self.on:
            self.close()
        left, self._left = self._left, []
        return left

    def number(self, new: Saved | None) -> int:
        """Return the number of a file that is kept, else 0."""
        return new.number if new is not None and new in self._kept else 0

    def _learn(self, prompt: int, first: float, perf: Perf) -> None:
        spent = perf.prefill_ms / 1000
        restored = self._restored
        if restored is None:
            self.seconds.prefilled(perf.prefill_tokens, spent)
            return
        gained = prompt - perf.prefill_tokens
        if gained < len(restored.names) * TOKENS // 2:
            # The file held less than was saved: 1.2.x cuts it at the first picture, for one.
            if len(restored.parts) > 1:
                self.pictures = False
                self._drop(restored)
            else:
                self._stop("the library did not use what it had saved")
            return
        # What saving costs lies between the library's own figure and the first token.
        self.seconds.restored(gained, self._loading + max(0.0, first - spent))
        if not self.seconds.pays:
            self._stop("it takes longer than to compute the prompt again")

    def _keep(self, new: Saved, *, well: bool) -> None:
        new.size = os.fstat(new.fd).st_size
        if not well or not self.on or not 0 < new.size <= self.budget:
            if well and not new.size:
                self._strikes += 1
                if self._strikes >= STRIKES:
                    self._stop("the library saved nothing")
            os.close(new.fd)
            return
        self._strikes = 0
        for old in [s for s in self._kept if shared(s.names, new.names) == len(s.names)]:
            self._drop(old)  # the same conversation, shorter
        self._kept.append(new)
        while self.bytes > self.budget or len(self._kept) > MOST:
            self._drop(self._kept[0])

    def _drop(self, saved: Saved) -> None:
        if saved in self._kept:
            self._kept.remove(saved)
            os.close(saved.fd)
            self._left.append(saved.number)

    def _stop(self, why: str) -> None:
        self.why = why
        print(f"conversations are not kept any more: {why}", flush=True)

    def close(self) -> None:
        """Give all files back."""
        while self._kept:
            self._drop(self._kept[-1])


def shared(first: Sequence[str], second: Sequence[str]) -> int:
    """Return how many blocks two prompts share from the start."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count
