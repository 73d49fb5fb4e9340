"""One answer as the result callback of ``librkllmrt.so`` sees it: events in, frames out."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable
from typing import Any, Literal

from rkvlmd.engine.backend import Say
from rkvlmd.engine.rkllm_types import State
from rkvlmd.engine.stops import StopMatcher
from rkvlmd.wire import child

_NORMAL = State.NORMAL
Reason = Literal["stop", "length", "aborted"]


class Answer:
    """A sink for ``Session.run``; runs on the thread that runs, and keeps no pointer.

    The library says no reason for an end and need not say that it ended, so
    the end is what the tokens make of it: the limit was reached, or not.
    """

    def __init__(
        self,
        order: child.Generate,
        say: Say,
        *,
        stop_ids: frozenset[int],
        prompt: int,
        cached: int,
        aborted: Callable[[], bool],
        abort: Callable[[], None],
        limits_itself: bool,
    ) -> None:
        """Take an order.

        ``prompt`` and ``cached`` are token counts for ``prefilled``;
        ``aborted`` says whether the daemon wants an end, ``abort`` asks the
        library for one; ``limits_itself``: the library knows the token limit.
        """
        self._order, self._say = order, say
        self._stop_ids = stop_ids
        self._prompt, self._cached = prompt, cached
        self._aborted, self._abort = aborted, abort
        self._limits_itself = limits_itself
        self._matcher = StopMatcher(order.stop, order.thinking)
        self._stops = bool(order.stop)
        #: The beginning of a character that is not whole yet.
        self._open = b""
        self._empty = 0
        self._begin = time.monotonic()
        self._first: float | None = None
        #: Why the answer has ended, once that is known.
        self.ended: Reason | None = None
        #: Whether the library was asked to stop: what its cache holds then is not known.
        self.cut = False
        self.events = 0
        self.failed = False
        self.completion = 0
        self.tokens: list[int] = []
        #: The whole text, stop strings included.
        self.text = ""
        self.perf: child.Perf | None = None

    def __call__(self, state: State, result: Any) -> int:
        """Take one event; what this raises ends the run.

        The NPU waits for each token's return, after a pause that has emptied
        the processor's caches: what is not touched here is time saved.
        """
        self.events += 1
        if state is _NORMAL and result is not None:
            self._token(result.token_id, result.text or b"")
        elif state is State.ERROR:
            self.failed = True
        elif state is State.FINISH:
            if result is not None:
                self._finish(result.perf)
        elif result is not None:
            self._token(result.token_id, None)
        return 0

    def finish(self) -> Reason:
        """Say what was held back; return the reason. The run has returned."""
        if self.ended is None and self._aborted():
            self.ended = "aborted"
        if self.ended in {None, "length"}:
            tail = self._matcher.feed(self._decode(b"", final=True)) + self._matcher.finish()
            if tail:
                self._say(child.Text(id=self._order.id, text=tail, tokens=0))
            if self._matcher.stopped:
                self.ended = "stop"
        return self.ended or "stop"

    @property
    def seconds(self) -> float:
        """Since the first token, or 0."""
        return 0.0 if self._first is None else time.monotonic() - self._first

    @property
    def waited(self) -> float:
        """Until the first token, or 0."""
        return 0.0 if self._first is None else self._first - self._begin

    def _finish(self, perf: Any) -> None:
        self.perf = child.Perf(
            prefill_tokens=perf.prefill_tokens,
            prefill_ms=perf.prefill_time_ms,
            generate_tokens=perf.generate_tokens,
            generate_ms=perf.generate_time_ms,
            memory_mb=perf.memory_usage_mb,
        )

    def _token(self, token: int, piece: bytes | None) -> None:
        """Take a token; ``piece`` is ``None`` while its character is not whole."""
        if self.ended is not None:
            return  # on its way when the end was asked for
        if self._aborted():
            self._cut("aborted")
            return
        if self._first is None:
            self._first = time.monotonic()
            self._say(
                child.Prefilled(
                    id=self._order.id,
                    prompt=self._prompt,
                    cached=self._cached,
                    seconds=self._first - self._begin,
                )
            )
        if token in self._stop_ids:
            return
        if piece == b"" and not self._stop_ids:
            # The end of the text arrives as a token without text. Where nobody has said which
            # token that is, it was one if no other comes after it.
            self._empty += 1
            return
        self.completion += 1 + self._empty
        self._empty = 0
        self.tokens.append(token)
        text = self._decode(piece) if piece else ""
        self.text += text
        if self._stops:
            self._say(child.Text(id=self._order.id, text=self._matcher.feed(text)))
        else:
            self._say(child.Text(id=self._order.id, text=text))
        if self._matcher.stopped:
            self._cut("stop")
        elif self.completion >= self._order.max_tokens:
            if self._limits_itself:
                self.ended = "length"
            else:
                self._cut("length")

    def _decode(self, piece: bytes, *, final: bool = False) -> str:
        data = self._open + piece
        text, used = codecs.utf_8_decode(data, "replace", final)
        self._open = data[used:]
        return text

    def _cut(self, reason: Reason) -> None:
        self.ended, self.cut = reason, True
        self._abort()
