"""Language decoders on ONNX Runtime: tokens and embeddings to text."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from rkvlmd.engine import kv, onnx_hidden, onnx_inputs
from rkvlmd.engine import onnx_cache as caches
from rkvlmd.engine import onnx_common as common
from rkvlmd.engine.backend import Progress, Rows, Say
from rkvlmd.engine.conversations import Conversations
from rkvlmd.engine.detok import Detokenizer, Vocabulary
from rkvlmd.engine.sampling import Sampler
from rkvlmd.engine.stops import StopMatcher
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import manifest as manifests
from rkvlmd.wire import child

#: Tokens of a prompt that go through the decoder at once: bounds the memory of a prefill.
CHUNK = 256
EMBED = "decoder.files.embed"
#: Key of the file for an empty cache, where there are two.
FIRST = "decoder_prefill"
Reason = Literal["stop", "length", "aborted"]


class OnnxDecoder:
    """``DecoderBackend`` over the files of the embeddings and of the decoder (one or two).

    The cache is kept between calls, and so is the record of what it holds.
    """

    def __init__(self) -> None:
        self._abort = threading.Event()
        self._run = ort.RunOptions()
        self._stop_ids: frozenset[int] = frozenset()
        self._context = 0
        self._kept: Conversations[caches.CachedGraph]
        self._shape: caches.Shape
        self._inputs: onnx_inputs.Inputs
        self._prompt: onnx_inputs.Prompt
        self._size = 0
        self._open: Callable[[int], caches.CachedGraph]
        self._hidden = ""
        self._embed: ort.InferenceSession
        self._vocabulary: Vocabulary

    @property
    def _record(self) -> list[kv.Place]:
        """What each place of the present cache holds."""
        return self._kept.current.record

    @property
    def _graph(self) -> caches.CachedGraph:
        return self._kept.current.cache

    @_graph.setter
    def _graph(self, graph: caches.CachedGraph) -> None:
        self._kept.current.cache = graph

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
        self._inputs = onnx_inputs.read(session, self._embed, manifest)
        if shape.embedding is not None:
            common.agree("decoder.embedding", "inputs_embeds", shape.embedding,
                         manifest.decoder.embedding)  # fmt: skip
        if declared := manifest.decoder.kv_bytes_per_token:
            common.agree("decoder.kv_bytes_per_token", "the cache", shape.bytes_per_token, declared)
        first = None
        if FIRST in files:
            progress(0.6, f"opening {Path(files[FIRST].file).name}")
            key = f"decoder.files.{FIRST}.file"
            first = common.open_session(folder / files[FIRST].file, key, threads)
        self._context = manifest.decoder.context
        self._size = manifest.decoder.embedding
        self._stop_ids = frozenset(manifest.stop_ids)
        self._shape = shape
        self._kept = Conversations(
            caches.open_cache(session, shape, self._context, first),
            bytes_per_place=shape.bytes_per_token,
            budget=int(order.options.get("conversations_bytes", 0)),
        )
        self._open = lambda places: caches.open_cache(session, shape, places, first)
        self._hidden = onnx_hidden.output(manifest, [s for s in (session, first) if s])
        progress(0.9, "first run")
        self._first_run()
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
        self._check(order)
        self._prompt = onnx_inputs.Prompt(order, rows, self._size, self._inputs)
        try:
            return self._generate(order, say)
        except BaseException as exc:
            self._forget()
            if isinstance(exc, common.RUN_ERRORS):
                common.tell(f"decoder: {exc}")
                raise RkvlmdError("engine_error", "The language decoder failed.") from exc
            raise

    def embed(self, order: child.Embed, rows: Sequence[Rows]) -> Rows:
        """Return the last layer's hidden states of a prompt, float32 of (tokens, embedding).

        It has a cache of its own: that of the conversations stays as it is.

        Raises:
          RkvlmdError: as ``generate``; ``invalid_model`` when the file gives none.

        """
        self._abort.clear()
        self._run = ort.RunOptions()
        self._check(order)
        kept, self._graph = self._graph, onnx_hidden.graph(self._open, order, self._hidden)
        self._prompt = onnx_inputs.Prompt(order, rows, self._size, self._inputs)
        blocks, total = [], len(order.tokens)
        try:
            while (start := self._graph.length) < total:
                end = self._chunk_end(start, total)
                embeds, beside = self._embed_tokens(order.tokens[start:end])
                self._prompt.embed(embeds, start)
                block = self._step(embeds, beside, logits=True)
                assert block is not None, "nobody aborts an embed"
                blocks.append(block)
        except common.RUN_ERRORS as exc:
            common.tell(f"decoder: {exc}")
            raise RkvlmdError("engine_error", "The language decoder failed.") from exc
        finally:
            self._graph = kept
        return np.concatenate(blocks)

    def abort(self) -> None:
        """End the running ``generate``; a prefill at the next node of its graph."""
        self._abort.set()
        self._run.terminate = True

    def _generate(self, order: child.Generate, say: Say) -> child.GenerateDone:
        started = time.monotonic()
        prompt = kv.places(order.tokens, order.spans)
        forgot = self._kept.take(prompt)
        cached = self._reusable(prompt)
        self._graph.truncate(cached)
        cached = min(cached, self._graph.length)
        del self._record[cached:]
        logits = self._prefill(order, prompt)
        now = time.monotonic()
        if logits is None:
            return self._done(order, "aborted", 0, 0.0, forgot)
        say(child.Prefilled(id=order.id, prompt=len(prompt), cached=cached, seconds=now - started))
        reason, completion = self._answer(order, logits, say)
        return self._done(order, reason, completion, time.monotonic() - now, forgot)

    def _done(
        self,
        order: child.Generate,
        reason: Reason,
        completion: int,
        seconds: float,
        forgot: list[int],
    ) -> child.GenerateDone:
        """Return the end, with what the cache holds now."""
        return child.GenerateDone(
            id=order.id,
            reason=reason,
            completion=completion,
            seconds=seconds,
            conversation=self._kept.current.number,
            held=list(kv.names(order, self._record)),
            forgot=forgot,
        )

    def _reusable(self, prompt: list[kv.Place]) -> int:
        """Return how many places of the cache are kept for ``prompt``."""
        cached = kv.reusable(self._record, prompt)
        if self._inputs.types and (cut := self._prompt.whole(cached)) is not None:
            return cut[0]
        if self._shape.single and len(prompt) - cached > cached:
            return 0  # Place by place would take longer than all at once from the start.
        return cached

    def _prefill(
        self, order: child.Generate, prompt: list[kv.Place]
    ) -> npt.NDArray[np.float32] | None:
        """Bring the prompt into the cache; return the last logits, ``None`` after an abort."""
        logits = None
        while (start := len(self._record)) < len(prompt):
            end = self._chunk_end(start, len(prompt))
            embeds, beside = self._embed_tokens(order.tokens[start:end])
            self._prompt.embed(embeds, start)
            logits = self._step(embeds, beside, logits=end == len(prompt))
            if logits is None:
                return None
            self._record.extend(prompt[start:end])
        return logits

    def _chunk_end(self, start: int, end: int) -> int:
        """Return up to which place the next run goes."""
        if self._shape.single:
            return end if start == 0 else start + 1
        at = min(start + CHUNK, end)
        if self._inputs.types and (cut := self._prompt.whole(at)) is not None:
            return cut[0] if cut[0] > start else cut[1]
        return at

    def _answer(
        self, order: child.Generate, logits: npt.NDArray[np.float32], say: Say
    ) -> tuple[Reason, int]:
        sampler = Sampler(order, order.tokens)
        detok = Detokenizer(self._vocabulary)
        matcher = StopMatcher(order.stop, order.thinking)
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
                following = self._step(*self._embed_tokens([token]), logits=True)
                if following is not None:
                    self._record.append(token)
        if completion < limit:
            tail = matcher.feed(detok.finish()) + matcher.finish()
            if tail:
                say(child.Text(id=order.id, text=tail, tokens=0))
            reason = "stop" if matcher.stopped else reason
        return reason, completion

    def _step(
        self, embeds: npt.NDArray[Any], beside: caches.Feeds, *, logits: bool
    ) -> npt.NDArray[np.float32] | None:
        """Run the decoder; ``None`` when an abort stopped it."""
        if self._abort.is_set():
            return None
        start = self._graph.length
        feeds = self._inputs.feeds(self._prompt, start, start + embeds.shape[1], beside)
        try:
            return self._graph.step(embeds, self._run, logits=logits, feeds=feeds)
        except common.RUN_ERRORS:
            if self._abort.is_set():
                return None
            raise

    def _embed_tokens(self, tokens: Sequence[int]) -> tuple[npt.NDArray[Any], caches.Feeds]:
        """Return embeddings, (1, places, embedding), and what else the file gives by name."""
        arg = self._embed.get_inputs()[0]
        ids = np.array([tokens], common.dtype_of(arg, EMBED))
        outputs = self._embed.get_outputs()
        values = self._embed.run(None, {arg.name: ids})
        found = dict(zip((o.name for o in outputs), values, strict=True))
        embeds = found.pop("inputs_embeds" if "inputs_embeds" in found else outputs[0].name)
        return embeds.astype(self._shape.embeds, copy=False), found

    def _check(self, order: child.Generate | child.Embed) -> None:
        tokens = len(order.tokens)
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

    def _first_run(self) -> None:
        """Run two tokens, so that what the files do not say shows now, and memory is warm."""
        order = child.Generate(id=0, tokens=[0, 0], max_tokens=0)
        self._prompt = onnx_inputs.Prompt(order, [], self._size, self._inputs)
        try:
            embeds, beside = self._embed_tokens([0])
            common.agree("decoder.embedding", "the row of the embedding table",
                         embeds.shape[-1], self._size)  # fmt: skip
            for _ in order.tokens:
                self._step(embeds, beside, logits=True)
        except common.RUN_ERRORS as exc:
            common.tell(f"decoder: {exc}")
            raise RkvlmdError(
                "invalid_model", f"{caches.KEY}.file: the decoder's first run failed."
            ) from exc
        self._forget()

    def _forget(self) -> None:
        self._kept.clear()


def _open_vocabulary(folder: Path, manifest: manifests.Manifest) -> Vocabulary:
    if manifest.tokenizer is None:
        raise RkvlmdError("invalid_model", "tokenizer: needed by the onnx engine.")
    path = folder / manifest.tokenizer.file
    if not path.is_file():
        raise RkvlmdError("invalid_model", f"tokenizer.file: {path.name} is missing.")
    try:
        tags = manifest.thinking
        return Vocabulary(path, (tags.start, tags.end) if tags is not None else ())
    except ValueError as exc:
        common.tell(f"{path.name}: {exc}")
        raise RkvlmdError(
            "invalid_model", f"tokenizer.file: {path.name} is not a tokenizer."
        ) from exc
