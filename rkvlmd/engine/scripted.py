"""A backend that computes nothing: known text at a known pace, and faults on demand.

Chosen by ``load`` with ``options = {"backend": "scripted", "script": {...}}``; it plays an
encoder or a decoder. Keys of the script, all optional:

* ``load_seconds``, ``encode_seconds``, ``prefill_seconds``, ``embed_seconds``: how long each step
  takes;
* ``rate``: tokens per second, 0 for at once; ``tokens``: how many it says, 16 unless given;
* ``mode``: ``count`` says ``t0 t1 t2 ...``; ``text`` says the words of ``text``; ``echo`` says
  ``pictures=N prompt=TOKENS sum=CRC32``, the sum over the rows as they arrived; ``clock`` says
  the monotonic clock in nanoseconds at the moment each token leaves;
* ``image_tokens``, ``embedding``: the shape of an encoder's rows, else the manifest's;
* ``info``: what ``ready`` tells besides;
* ``fault``: see ``rkvlmd.engine.script``.
"""

from __future__ import annotations

import math
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rkvlmd.engine.backend import Grid, Progress, Rows, Say
from rkvlmd.engine.script import Script, hang
from rkvlmd.wire import child, prefix

_TOKENS = 16


class ScriptedBackend:
    """``EncoderBackend`` and ``DecoderBackend`` in one; see the module for the script."""

    def __init__(self, script: Script | None = None) -> None:
        self._script = script or Script({})
        self._abort = threading.Event()
        self._deaf = threading.Event()
        self._never = threading.Event()
        self._shape = (1, 1)
        self._merge = 1
        self._prompt: list[tuple[int, str]] = []

    def load(self, order: child.Load, progress: Progress) -> dict[str, Any]:
        """Wait for ``load_seconds`` with progress in ten steps."""
        self._script = self._script.merged(order.options.get("script", {}))
        values = self._script.values
        encoders = order.manifest.get("encoders") or [{}]
        encoder = encoders[order.part] if order.part < len(encoders) else {}
        self._shape = (
            int(values.get("image_tokens", encoder.get("tokens", 1))),
            int(values.get("embedding", encoder.get("embedding", 1))),
        )
        self._merge = int((encoder.get("patches") or {}).get("merge", 1))
        self._script.strike("load")
        for step in range(10):
            self._never.wait(self._script.seconds("load_seconds") / 10)
            progress((step + 1) / 10, "reading the script")
        return {"backend": "scripted", "rows": list(self._shape), **values.get("info", {})}

    def encode(self, pixels: npt.NDArray[Any], grid: Grid | None = None) -> Rows:
        """Return rows filled with a number in 0..1 that depends on every byte of the pixels."""
        self._script.strike("encode")
        self._never.wait(self._script.seconds("encode_seconds"))
        crc = zlib.crc32(np.ascontiguousarray(pixels).reshape(-1).view(np.uint8).data)
        tokens, width = self._shape
        if grid is not None:
            tokens = math.prod(grid) // self._merge**2
        return np.full((tokens, width), (crc & 0xFFFF) / 0xFFFF, np.float32)

    def generate(self, order: child.Generate, rows: Sequence[Rows], say: Say) -> child.GenerateDone:
        """Say the script's words, one per token, at ``rate``."""
        self._abort.clear()
        begin = time.monotonic()
        self._script.strike("prefill")
        aborted = self._wait(self._script.seconds("prefill_seconds"))
        if not aborted:
            cached = self._cached(order)
            seconds = time.monotonic() - begin
            say(
                child.Prefilled(
                    id=order.id, prompt=len(order.tokens), cached=cached, seconds=seconds
                )
            )
        count, reason = self._say(order, rows, say, aborted)
        return child.GenerateDone(
            id=order.id,
            reason=reason,
            completion=count,
            seconds=time.monotonic() - begin,
            held=list(prefix.of_tokens(order.tokens, order.spans, order.adapter)),
        )

    def embed(self, order: child.Embed, rows: Sequence[Rows]) -> Rows:
        """Return a row for each token, filled with its id; a picture's rows at its places."""
        self._script.strike("embed")
        self._never.wait(self._script.seconds("embed_seconds"))
        found = np.repeat(np.array(order.tokens, np.float32)[:, None], self._shape[1], axis=1)
        for span, values in zip(order.spans, rows, strict=True):
            found[span.start : span.start + span.count] = values
        return found

    def abort(self) -> None:
        """Make ``generate`` return soon, unless a fault says otherwise."""
        if self._script.strike("abort"):
            self._deaf.set()
        self._abort.set()

    def _wait(self, seconds: float) -> bool:
        aborted = self._abort.wait(seconds) if seconds > 0 else self._abort.is_set()
        if self._deaf.is_set():
            hang()
        return aborted

    def _say(
        self, order: child.Generate, rows: Sequence[Rows], say: Say, aborted: bool
    ) -> tuple[int, Any]:
        rate = float(self._script.values.get("rate", 0))
        begin, count, said = time.monotonic(), 0, ""
        for word in self._words(order, rows):
            # By the clock of the whole answer, so that late tokens do not add up.
            wait = begin + (count + 1) / rate - time.monotonic() if rate > 0 else 0.0
            if aborted or self._wait(wait):
                return count, "aborted"
            if count >= order.max_tokens:
                return count, "length"
            self._script.strike("generate", count)
            text = str(time.monotonic_ns()) if word is None else word
            text = text if count == 0 else " " + text
            said, before = said + text, len(said)
            cuts = [said.find(stop) for stop in order.stop if stop and stop in said]
            count += 1
            if cuts:
                say(child.Text(id=order.id, text=said[before : max(before, min(cuts))]))
                break
            say(child.Text(id=order.id, text=text))
        return count, "stop"

    def _words(self, order: child.Generate, rows: Sequence[Rows]) -> Iterator[str | None]:
        values = self._script.values
        tokens, mode = int(values.get("tokens", _TOKENS)), values.get("mode", "count")
        if mode == "count":
            yield from (f"t{i}" for i in range(tokens))
        elif mode == "clock":
            yield from (None for _ in range(tokens))
        elif mode == "text":
            yield from str(values.get("text", "")).split(" ")
        elif mode == "echo":
            crc = 0
            for block in rows:
                crc = zlib.crc32(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data, crc)
            yield from (f"pictures={len(rows)}", f"prompt={len(order.tokens)}", f"sum={crc}")
        else:
            raise ValueError(f"unknown mode {mode!r}")

    def _cached(self, order: child.Generate) -> int:
        keys = [""] * len(order.tokens)
        for span in order.spans:
            keys[span.start : span.start + span.count] = [span.key] * span.count
        before, self._prompt = self._prompt, list(zip(order.tokens, keys, strict=True))
        same = 0
        for old, new in zip(before, self._prompt, strict=False):
            if old != new:
                break
            same += 1
        return max(0, min(same, len(order.tokens) - 1))
