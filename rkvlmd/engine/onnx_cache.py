"""Decoder graphs with their key/value caches, which never leave the runtime.

Two layouts have the same names. In the *growing* one each run returns new,
longer keys and values (published checkpoints). In the *shared* one they lie in
buffers of full length that the graph writes in place, so a step copies nothing
and cutting the cache short is setting a number (GroupQueryAttention, made by
``tools/export_onnx --attention gqa``; its metadata says so).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from rkvlmd.engine import onnx_common as common
from rkvlmd.engine.onnx_slice import slice_model
from rkvlmd.errors import RkvlmdError

KEY = "decoder.files.decoder"
#: Metadata of a file whose caches may be shared buffers.
SHARED = ("rkvlmd.kv_cache", "shared")
PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
#: Inputs besides the caches that a decoder may have.
OTHERS = {
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "use_cache_branch",
    "num_logits_to_keep",
}


class CachedGraph(Protocol):
    """A decoder with a cache of ``length`` places."""

    length: int

    def step(
        self, embeds: npt.NDArray[Any], run: ort.RunOptions, *, logits: bool
    ) -> npt.NDArray[np.float32]:
        """Add ``embeds`` of shape (1, new places, embedding) to the cache.

        Returns the logits of the last place, float32 of shape (vocabulary,);
        empty unless ``logits``. When it raises, the cache is as before.
        """
        ...

    def truncate(self, length: int) -> None:
        """Forget all places from ``length`` on."""
        ...


@dataclass(frozen=True)
class Shape:
    """What a decoder file says about itself."""

    layers: int
    heads: int
    head: int
    vocabulary: int | None
    embedding: int | None
    cache: np.dtype[np.generic]
    embeds: np.dtype[np.generic]
    pasts: tuple[str, ...]
    presents: tuple[str, ...]
    others: frozenset[str]
    shared: bool

    @property
    def bytes_per_token(self) -> int:
        """What one token costs in the cache."""
        return 2 * self.layers * self.heads * self.head * self.cache.itemsize


def shape_of(session: ort.InferenceSession) -> Shape:
    """Read a decoder's layout from its inputs and outputs.

    Raises:
      RkvlmdError: ``invalid_model`` when it is none that is known.

    """
    inputs = {arg.name: arg for arg in session.get_inputs()}
    outputs = {arg.name: arg for arg in session.get_outputs()}
    pasts = sorted(
        (m for name in inputs if (m := PAST.fullmatch(name))), key=lambda m: (int(m[1]), m[2])
    )
    presents = [f"present.{m[1]}.{m[2]}" for m in pasts]
    missing = {"inputs_embeds", "logits", *presents} - {*inputs, *outputs}
    if missing or not pasts:
        names = sorted(missing) or ["past_key_values.0.key"]
        raise RkvlmdError("invalid_model", f"{KEY}: the file has no {', '.join(names)}.")
    others = set(inputs) - {m[0] for m in pasts}
    if others - OTHERS:
        raise common.unknown_inputs(KEY, list(others - OTHERS))
    past = inputs[pasts[0][0]]
    heads, head = (past.shape[1], past.shape[3]) if len(past.shape) == 4 else (None, None)
    if not isinstance(heads, int) or not isinstance(head, int):
        raise RkvlmdError("invalid_model", f"{KEY}: {past.name} must be of the shape (batch, heads"
                          f", past, size) with fixed heads and size, not {past.shape}.")  # fmt: skip
    if "position_ids" in inputs and len(inputs["position_ids"].shape) != 2:
        raise RkvlmdError("invalid_model", f"{KEY}: position_ids must have two dimensions.")
    embedding, vocabulary = inputs["inputs_embeds"].shape[-1], outputs["logits"].shape[-1]
    metadata = session.get_modelmeta().custom_metadata_map
    return Shape(
        layers=len(pasts) // 2,
        heads=heads,
        head=head,
        vocabulary=vocabulary if isinstance(vocabulary, int) else None,
        embedding=embedding if isinstance(embedding, int) else None,
        cache=np.dtype(common.dtype_of(past, KEY)),
        embeds=np.dtype(common.dtype_of(inputs["inputs_embeds"], KEY)),
        pasts=tuple(m[0] for m in pasts),
        presents=tuple(presents),
        others=frozenset(others),
        shared=metadata.get(SHARED[0]) == SHARED[1],
    )


def open_cache(session: ort.InferenceSession, shape: Shape, context: int) -> CachedGraph:
    """Return the graph with an empty cache for up to ``context`` places."""
    return SharedGraph(session, shape, context) if shape.shared else GrowingGraph(session, shape)


class _Graph:
    def __init__(self, session: ort.InferenceSession, shape: Shape) -> None:
        self._session = session
        self._shape = shape
        self.length = 0

    def _inputs(self, embeds: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Return all inputs but the caches."""
        others, new = self._shape.others, embeds.shape[1]
        end = self.length + new
        feeds: dict[str, npt.NDArray[Any]] = {"inputs_embeds": embeds}
        if "attention_mask" in others:
            feeds["attention_mask"] = np.ones((1, end), np.int64)
        if "position_ids" in others:
            feeds["position_ids"] = np.arange(self.length, end, dtype=np.int64)[None]
        if "use_cache_branch" in others:
            feeds["use_cache_branch"] = np.array([self.length > 0])
        if "num_logits_to_keep" in others:
            feeds["num_logits_to_keep"] = np.array(1, np.int64)
        return feeds


class GrowingGraph(_Graph):
    """Every run returns the whole cache, as values of the runtime that the next run takes."""

    def __init__(self, session: ort.InferenceSession, shape: Shape) -> None:
        super().__init__(session, shape)
        empty = np.zeros((1, shape.heads, 0, shape.head), shape.cache)
        self._empty = [_value(empty) for _ in shape.pasts]
        self._pasts = self._empty
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._slice = ort.InferenceSession(
            slice_model(shape.cache), options, providers=["CPUExecutionProvider"]
        )

    def step(
        self, embeds: npt.NDArray[Any], run: ort.RunOptions, *, logits: bool
    ) -> npt.NDArray[np.float32]:
        feeds = {name: _value(value) for name, value in self._inputs(embeds).items()}
        feeds |= zip(self._shape.pasts, self._pasts, strict=True)
        wanted = ["logits"] if logits else []
        run.only_execute_path_to_fetches = not logits
        found = self._session.run_with_ort_values([*wanted, *self._shape.presents], feeds, run)
        row = _last(found.pop(0)) if logits else np.empty(0, np.float32)
        self._pasts = found
        self.length += embeds.shape[1]
        return row

    def truncate(self, length: int) -> None:
        if length >= self.length:
            return
        if length == 0:
            self._pasts = self._empty
        else:
            ends = {"start": _value(np.array([0])), "end": _value(np.array([length]))}
            self._pasts = [
                self._slice.run_with_ort_values(["y"], {"x": past, **ends})[0]
                for past in self._pasts
            ]
        self.length = length


class SharedGraph(_Graph):
    """Keys and values lie in buffers that are bound as input and output of every run.

    A buffer has room for the whole context; the system gives its pages when
    they are first written.
    """

    def __init__(self, session: ort.InferenceSession, shape: Shape, context: int) -> None:
        super().__init__(session, shape)
        self._binding = session.io_binding()
        size = [1, shape.heads, context, shape.head]
        self._buffers = []
        for past, present in zip(shape.pasts, shape.presents, strict=True):
            buffer = ort.OrtValue.ortvalue_from_shape_and_type(size, shape.cache.type, "cpu")
            self._binding.bind_ortvalue_input(past, buffer)
            self._binding.bind_ortvalue_output(present, buffer)
            self._buffers.append(buffer)
        self._context = context

    def step(
        self, embeds: npt.NDArray[Any], run: ort.RunOptions, *, logits: bool
    ) -> npt.NDArray[np.float32]:
        if self.length + embeds.shape[1] > self._context:
            raise RkvlmdError("engine_error", "The cache of the decoder is full.")
        values = {name: _value(value) for name, value in self._inputs(embeds).items()}
        for name, value in values.items():
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(self._binding, run)
        self.length += embeds.shape[1]
        if not logits:
            return np.empty(0, np.float32)
        names = self._session.get_outputs()
        at = next(i for i, arg in enumerate(names) if arg.name == "logits")
        return _last(self._binding.get_outputs()[at])

    def truncate(self, length: int) -> None:
        self.length = min(length, self.length)


def _value(array: npt.NDArray[Any]) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(array)


def _last(logits: ort.OrtValue) -> npt.NDArray[np.float32]:
    """Return the last place's logits of an output of shape (1, places, vocabulary)."""
    return common.float32(logits.numpy().reshape(-1, logits.shape()[-1])[-1])
