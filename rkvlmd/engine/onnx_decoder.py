"""Language decoders on ONNX Runtime: tokens and embeddings to text."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from rkvlmd.engine import kv
from rkvlmd.engine import onnx_cache as caches
from rkvlmd.engine import onnx_common as common
from rkvlmd.engine.backend import Progress, Rows, Say
from rkvlmd.engine.detok import Detokenizer, Vocabulary
from rkvlmd.engine.sampling import Sampler
from rkvlmd.engine.stops import StopMatcher
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import manifest as manifests
from rkvlmd.wire import child

#: Tokens of a prompt that go through the decoder at once: bounds the memory of a prefill.
CHUNK = 256
EMBED = "decoder.files.embed"
Reason = Literal["stop", "length", "aborted"]


class OnnxDecoder:
    """``DecoderBackend`` over ``embed_tokens.onnx`` and ``decoder_model_merged.onnx``.

    The cache is kept between calls, and so is the record of what it holds.
    """

    def __init__(self) -> None:
        self._abort = threading.Event()
        self._run = ort.RunOptions()
        self._record: list[kv.Place] = []
        self._stop_ids: frozenset[int] = frozenset()
        self._context = 0
        self._graph: caches.CachedGraph
        self._shape: caches.Shape
        self._embed: ort.InferenceSession
        self._vocabulary: Vocabulary

    def load(self, order: child.Load, progress: Progress) -> dict[str, Any]:
        """Open the files, compare them with the manifest and each other, run one token.

        Raises:
          RkvlmdError: ``invalid_model``.

        """
        manifest = manifests.from_builtins(order.manifest)
        folder, files = Path(order.folder), manifest.decoder.files
        threads = common.thread_count(order.options)
        progress(0.0, "opening the tokenizer")
        self._vocabulary = _open_vocabulary(folder, manifest)
        progress(0.1, f"opening {Path(files['embed'].file).name}")
        self._embed = common.open_session(folder / files["embed"].file, f"{EMBED}.file", 1)
        progress(0.2, f"opening {Path(files['decoder'].file).name}")
        key = f"{caches.KEY}.file"
        session = common.open_session(folder / files["decoder"].file, key, threads)
        shape = caches.shape_of(session)
        if shape.embedding is not None:
            common.agree("decoder.embedding", "inputs_embeds", shape.embedding,
                         manifest.decoder.embedding)  # fmt: skip
        if declared := manifest.decoder.kv_bytes_per_token:
            common.agree("decoder.kv_bytes_per_token", "the cache", shape.bytes_per_token, declared)
        self._context = manifest.decoder.context
        self._stop_ids = frozenset(manifest.stop_ids)
        self._shape = shape
        self._graph = caches.open_cache(session, shape, self._context)
        progress(0.9, "first run")
        self._first_run(manifest.decoder.embedding)
        return {
            "libraries": {"onnxruntime": ort.__version__},
            "threads": threads,
            "cache": "shared" if shape.shared else "growing",
            "layers": shape.layers,
            "kv_bytes_per_token": shape.bytes_per_token,
            "context": self._context,
            "embedding": manifest.decoder.embedding,
            "vocabulary": shape.vocabulary,
        }

    def generate(self, order: child.Generate, rows: Sequence[Rows], say: Say) -> child.GenerateDone:
        """Compute what the cache lacks of the prompt, then one token after the other.

        ``seconds`` of ``prefilled`` is the time of the prompt, of the returned
        message the time after it.

        Raises:
          RkvlmdError: ``context_length_exceeded``, or ``engine_error`` when the
            order is not consistent or the runtime fails; the cache is empty then.

        """
        self._abort.clear()
        self._run = ort.RunOptions()
        self._check(order, rows)
        try:
            return self._generate(order, rows, say)
        except BaseException as exc:
            self._forget()
            if isinstance(exc, common.RUN_ERRORS):
                common.tell(f"decoder: {exc}")
                raise RkvlmdError("engine_error", "The language decoder failed.") from exc
            raise

    def abort(self) -> None:
        """End the running ``generate``; a prefill at the next node of its graph."""
        self._abort.set()
        self._run.terminate = True

    def _generate(
        self, order: child.Generate, rows: Sequence[Rows], say: Say
    ) -> child.GenerateDone:
        started = time.monotonic()
        prompt = kv.places(order.tokens, order.spans)
        cached = kv.reusable(self._record, prompt)
        self._graph.truncate(cached)
        del self._record[cached:]
        logits = self._prefill(order, rows, prompt)
        now = time.monotonic()
        if logits is None:
            return child.GenerateDone(id=order.id, reason="aborted", completion=0, seconds=0.0)
        say(child.Prefilled(id=order.id, prompt=len(prompt), cached=cached, seconds=now - started))
        reason, completion = self._answer(order, logits, say)
        seconds = time.monotonic() - now
        return child.GenerateDone(
            id=order.id, reason=reason, completion=completion, seconds=seconds
        )

    def _prefill(
        self, order: child.Generate, rows: Sequence[Rows], prompt: list[kv.Place]
    ) -> npt.NDArray[np.float32] | None:
        """Bring the prompt into the cache; return the last logits, ``None`` after an abort."""
        logits = None
        while (start := len(self._record)) < len(prompt):
            end = min(start + CHUNK, len(prompt))
            embeds = self._embeddings(order, rows, start, end)
            logits = self._step(embeds, logits=end == len(prompt))
            if logits is None:
                return None
            self._record += prompt[start:end]
        return logits

    def _answer(
        self, order: child.Generate, logits: npt.NDArray[np.float32], say: Say
    ) -> tuple[Reason, int]:
        sampler = Sampler(order, order.tokens)
        detok, matcher = Detokenizer(self._vocabulary), StopMatcher(order.stop)
        limit = min(order.max_tokens, self._context - len(order.tokens))
        completion = 0
        reason: Reason = "length"
        following: npt.NDArray[np.float32] | None = logits
        while completion < limit:
            if following is None or self._abort.is_set():
                reason = "aborted"
                break
            token = sampler.pick(following)
            if token in self._stop_ids:
                reason = "stop"
                break
            completion += 1
            text = matcher.feed(detok.step(token))
            if completion == limit and not matcher.stopped:
                text += matcher.feed(detok.finish()) + matcher.finish()
            say(child.Text(id=order.id, text=text))
            if matcher.stopped:
                return "stop", completion
            if completion < limit:
                following = self._step(self._embed_tokens([token]), logits=True)
                if following is not None:
                    self._record.append(token)
        if completion < limit:
            tail = matcher.feed(detok.finish()) + matcher.finish()
            if tail:
                say(child.Text(id=order.id, text=tail, tokens=0))
            reason = "stop" if matcher.stopped else reason
        return reason, completion

    def _step(self, embeds: npt.NDArray[Any], *, logits: bool) -> npt.NDArray[np.float32] | None:
        """Run the decoder; ``None`` when an abort stopped it."""
        if self._abort.is_set():
            return None
        try:
            return self._graph.step(embeds, self._run, logits=logits)
        except common.RUN_ERRORS:
            if self._abort.is_set():
                return None
            raise

    def _embeddings(
        self, order: child.Generate, rows: Sequence[Rows], start: int, end: int
    ) -> npt.NDArray[Any]:
        """Return the embeddings of places ``start`` to ``end``, pictures put in."""
        embeds = self._embed_tokens(order.tokens[start:end])
        for span, values in zip(order.spans, rows, strict=True):
            first, last = max(span.start, start), min(span.start + span.count, end)
            if first < last:
                embeds[0, first - start : last - start] = values[
                    first - span.start : last - span.start
                ]
        return embeds

    def _embed_tokens(self, tokens: Sequence[int]) -> npt.NDArray[Any]:
        arg = self._embed.get_inputs()[0]
        ids = np.array([tokens], common.dtype_of(arg, EMBED))
        found: npt.NDArray[Any] = self._embed.run(None, {arg.name: ids})[0]
        return found.astype(self._shape.embeds, copy=False)

    def _check(self, order: child.Generate, rows: Sequence[Rows]) -> None:
        tokens, size = len(order.tokens), self._shape.embedding
        if tokens == 0:
            raise RkvlmdError("engine_error", "The prompt is empty.")
        if tokens > self._context:
            raise RkvlmdError(
                "context_length_exceeded",
                f"This model's context is {self._context} tokens, but the prompt has {tokens}.",
                param="messages",
            )
        top = self._shape.vocabulary
        if min(order.tokens) < 0 or (top is not None and max(order.tokens) >= top):
            raise RkvlmdError("engine_error", "The prompt has a token that the model lacks.")
        if len(rows) != len(order.spans):
            raise RkvlmdError("engine_error", "Pictures and their places differ in number.")
        for span, values in zip(order.spans, rows, strict=True):
            wrong = size is not None and values.shape[1:] != (size,)
            if wrong or len(values) != span.count or span.start + span.count > tokens:
                raise RkvlmdError("engine_error", "A picture does not fit its place.")

    def _first_run(self, embedding: int) -> None:
        """Run one token, so that what the files do not say shows now, and memory is warm."""
        try:
            embeds = self._embed_tokens([0])
            common.agree("decoder.embedding", "the row of the embedding table",
                         embeds.shape[-1], embedding)  # fmt: skip
            self._graph.step(embeds, self._run, logits=True)
        except common.RUN_ERRORS as exc:
            common.tell(f"decoder: {exc}")
            raise RkvlmdError(
                "invalid_model", f"{caches.KEY}.file: the decoder's first run failed."
            ) from exc
        self._forget()

    def _forget(self) -> None:
        self._record = []
        self._graph.truncate(0)


def _open_vocabulary(folder: Path, manifest: manifests.Manifest) -> Vocabulary:
    if manifest.tokenizer is None:
        raise RkvlmdError("invalid_model", "tokenizer: needed by the onnx engine.")
    path = folder / manifest.tokenizer.file
    if not path.is_file():
        raise RkvlmdError("invalid_model", f"tokenizer.file: {path.name} is missing.")
    try:
        return Vocabulary(path)
    except ValueError as exc:
        common.tell(f"{path.name}: {exc}")
        raise RkvlmdError(
            "invalid_model", f"tokenizer.file: {path.name} is not a tokenizer."
        ) from exc
