"""Decoder graphs with their key/value caches, which never leave the runtime.

Two layouts have the same names. In the *growing* one each run returns new,
longer keys and values (published checkpoints). In the *shared* one they lie in
buffers of full length that the graph writes in place, so a step copies nothing
and cutting the cache short is setting a number (GroupQueryAttention, made by
``tools/export_onnx --attention gqa``; its metadata says so).
"""

from __future__ import annotations

import contextlib
import copy
import math
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from rkvlmd.engine import onnx_common as common
from rkvlmd.engine import onnx_inputs
from rkvlmd.engine.onnx_slice import slice_model
from rkvlmd.errors import RkvlmdError

KEY = "decoder.files.decoder"
LOGITS = "logits"
#: Metadata of a file whose caches may be shared buffers.
SHARED = ("rkvlmd.kv_cache", "shared")
PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
#: States of layers without keys and values (Qwen3.5): one size, whatever the length.
STATE = re.compile(r"past_((?:conv|recurrent|ssm)\..+)")
#: Inputs that are filled here, besides the caches; ``onnx_inputs`` knows more.
OTHERS = {"inputs_embeds", "attention_mask", "use_cache_branch", "num_logits_to_keep"}
Feeds = Mapping[str, npt.NDArray[Any]]
NOTHING: Feeds = {}


class CachedGraph(Protocol):
    """A decoder with a cache of ``length`` places.

    ``fetch`` names the output that ``step`` returns: the logits of the last
    place, or of another output all places, (new places, size).
    """

    length: int
    fetch: str

    @property
    def places_held(self) -> int:
        """Places whose memory the cache holds, those it has been cut back from included."""
        ...

    def fork(self, length: int) -> Self:
        """Return a second cache with the first ``length`` places of this one."""
        ...

    def step(
        self, embeds: npt.NDArray[Any], run: ort.RunOptions, *, logits: bool, feeds: Feeds = NOTHING
    ) -> npt.NDArray[np.float32]:
        """Add ``embeds`` of shape (1, new places, embedding) to the cache.

        ``feeds`` are the inputs of these places that ``onnx_inputs`` fills.
        Returns the logits of the last place, float32 of shape (vocabulary,);
        empty unless ``logits``. When it raises, the cache is as before.
        """
        ...

    def truncate(self, length: int) -> None:
        """Forget all places from ``length`` on; all places, where states cannot be cut back."""
        ...


@dataclass(frozen=True)
class Shape:
    """What a decoder file says about itself.

    ``sizes`` are heads and head size of every one of ``pasts``. ``states``
    have a size of their own and cannot be cut back. ``single``: it takes one
    place at a time, because another file takes the first ones.
    """

    sizes: tuple[tuple[int, int], ...]
    vocabulary: int | None
    embedding: int | None
    cache: np.dtype[np.generic]
    embeds: np.dtype[np.generic]
    pasts: tuple[str, ...]
    presents: tuple[str, ...]
    states: tuple[str, ...]
    state_sizes: tuple[tuple[int, ...], ...]
    others: frozenset[str]
    shared: bool
    single: bool

    @property
    def layers(self) -> int:
        """Layers with a cache of their own."""
        return len(self.pasts) // 2

    @property
    def bytes_per_token(self) -> int:
        """What one token costs in the cache."""
        return sum(heads * head for heads, head in self.sizes) * self.cache.itemsize


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
    states = sorted(name for name in inputs if STATE.fullmatch(name))
    presents = [f"present.{m[1]}.{m[2]}" for m in pasts]
    presents += [name.replace("past_", "present_", 1) for name in states]
    missing = {"inputs_embeds", "logits", *presents} - {*inputs, *outputs}
    if missing or not pasts:
        names = sorted(missing) or ["past_key_values.0.key"]
        raise RkvlmdError("invalid_model", f"{KEY}: the file has no {', '.join(names)}.")
    others = set(inputs) - {m[0] for m in pasts} - set(states)
    if unknown := [n for n in others if n not in OTHERS and not onnx_inputs.known(n)]:
        raise common.unknown_inputs(KEY, unknown)
    past = inputs[pasts[0][0]]
    embedding, vocabulary = inputs["inputs_embeds"].shape[-1], outputs["logits"].shape[-1]
    metadata = session.get_modelmeta().custom_metadata_map
    return Shape(
        sizes=tuple(_size(inputs[m[0]]) for m in pasts),
        vocabulary=vocabulary if isinstance(vocabulary, int) else None,
        embedding=embedding if isinstance(embedding, int) else None,
        cache=np.dtype(common.dtype_of(past, KEY)),
        embeds=np.dtype(common.dtype_of(inputs["inputs_embeds"], KEY)),
        pasts=tuple(m[0] for m in pasts),
        presents=tuple(presents),
        states=tuple(states),
        state_sizes=tuple(_state_size(inputs[name]) for name in states),
        others=frozenset(others),
        shared=metadata.get(SHARED[0]) == SHARED[1] and not states,
        single=inputs["inputs_embeds"].shape[1] == 1,
    )


def _size(past: Any) -> tuple[int, int]:
    heads, head = (past.shape[1], past.shape[3]) if len(past.shape) == 4 else (None, None)
    if not isinstance(heads, int) or not isinstance(head, int):
        raise RkvlmdError("invalid_model", f"{KEY}: {past.name} must be of the shape (batch, heads"
                          f", past, size) with fixed heads and size, not {past.shape}.")  # fmt: skip
    return heads, head


def _state_size(state: Any) -> tuple[int, ...]:
    sizes = tuple(state.shape[1:])
    if not all(isinstance(size, int) for size in sizes):
        raise RkvlmdError(
            "invalid_model", f"{KEY}: {state.name} must have fixed sizes, not {state.shape}."
        )
    return (1, *sizes)


def open_cache(
    session: ort.InferenceSession,
    shape: Shape,
    context: int,
    first: ort.InferenceSession | None = None,
) -> CachedGraph:
    """Return the graph with an empty cache for up to ``context`` places.

    ``first`` is the file for an empty cache of decoders that are not merged.
    """
    if shape.shared:
        return SharedGraph(session, shape, context)
    return GrowingGraph(session, shape, first)


class _Graph:
    def __init__(self, session: ort.InferenceSession, shape: Shape) -> None:
        self._session = session
        self._shape = shape
        self.length = 0
        self.fetch = LOGITS

    def _inputs(self, embeds: npt.NDArray[Any], given: Feeds) -> dict[str, npt.NDArray[Any]]:
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
        return feeds | dict(given)

    def _taken(self, value: ort.OrtValue) -> npt.NDArray[np.float32]:
        if self.fetch == LOGITS:
            return _last(value)
        return common.float32(value.numpy().reshape(-1, value.shape()[-1]))


class GrowingGraph(_Graph):
    """Every run returns the whole cache, as values of the runtime that the next run takes."""

    def __init__(
        self,
        session: ort.InferenceSession,
        shape: Shape,
        first: ort.InferenceSession | None = None,
    ) -> None:
        super().__init__(session, shape)
        self._first = first
        self._first_takes = {arg.name for arg in first.get_inputs()} if first else set()
        self._empty = [
            _value(np.zeros((1, heads, 0, head), shape.cache)) for heads, head in shape.sizes
        ]
        self._empty += [_value(np.zeros(size, shape.cache)) for size in shape.state_sizes]
        self._pasts = self._empty
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._slice = ort.InferenceSession(
            slice_model(shape.cache), options, providers=["CPUExecutionProvider"]
        )

    def step(
        self, embeds: npt.NDArray[Any], run: ort.RunOptions, *, logits: bool, feeds: Feeds = NOTHING
    ) -> npt.NDArray[np.float32]:
        values = {name: _value(value) for name, value in self._inputs(embeds, feeds).items()}
        session = self._session
        if self._first is not None and self.length == 0:
            session = self._first
            values = {name: v for name, v in values.items() if name in self._first_takes}
        else:
            names = self._shape.pasts + self._shape.states
            values |= zip(names, self._pasts, strict=True)
        wanted = [self.fetch] if logits else []
        run.only_execute_path_to_fetches = not logits or self.fetch != LOGITS
        found = session.run_with_ort_values([*wanted, *self._shape.presents], values, run)
        row = self._taken(found.pop(0)) if logits else np.empty(0, np.float32)
        self._pasts = found
        self.length += embeds.shape[1]
        return row

    @property
    def places_held(self) -> int:
        return self.length

    def fork(self, length: int) -> Self:
        # Values of the runtime are never changed: both may hold the same ones.
        other = copy.copy(self)
        other.truncate(length)
        return other

    def truncate(self, length: int) -> None:
        if length >= self.length:
            return
        if self._shape.states:
            length = 0
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
        self._buffers = []
        for past, present, (heads, head) in zip(
            shape.pasts, shape.presents, shape.sizes, strict=True
        ):
            size = [1, heads, context, head]
            buffer = _value(_pages(size, shape.cache))
            self._binding.bind_ortvalue_input(past, buffer)
            self._binding.bind_ortvalue_output(present, buffer)
            self._buffers.append(buffer)
        self._context = context
        self._peak = 0

    @property
    def places_held(self) -> int:
        # What was written once stays in memory, also beyond the present length.
        return max(self._peak, self.length)

    def fork(self, length: int) -> Self:
        other = type(self)(self._session, self._shape, self._context)
        other.fetch = self.fetch
        for old, new in zip(self._buffers, other._buffers, strict=True):
            new.numpy()[:, :, :length] = old.numpy()[:, :, :length]
        other.length = length
        return other

    def step(
        self, embeds: npt.NDArray[Any], run: ort.RunOptions, *, logits: bool, feeds: Feeds = NOTHING
    ) -> npt.NDArray[np.float32]:
        if self.length + embeds.shape[1] > self._context:
            raise RkvlmdError("engine_error", "The cache of the decoder is full.")
        values = {name: _value(value) for name, value in self._inputs(embeds, feeds).items()}
        for name, value in values.items():
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_output(self.fetch, "cpu")
        self._session.run_with_iobinding(self._binding, run)
        self.length += embeds.shape[1]
        if not logits:
            return np.empty(0, np.float32)
        # Outputs come in the order in which they were bound: the buffers, then this one.
        return self._taken(self._binding.get_outputs()[len(self._buffers)])

    def truncate(self, length: int) -> None:
        self._peak = self.places_held
        self.length = min(length, self.length)


def _pages(size: list[int], dtype: np.dtype[np.generic]) -> npt.NDArray[Any]:
    """Return an array of its own pages, which are there once they are written and gone with it.

    NumPy's own, and the runtime's, would keep them, and ask for huge pages:
    the first place of each head would take the memory of thousands.
    """
    memory = mmap.mmap(-1, max(1, math.prod(size) * dtype.itemsize))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype, math.prod(size)).reshape(size)


def _value(array: npt.NDArray[Any]) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(array)


def _last(logits: ort.OrtValue) -> npt.NDArray[np.float32]:
    """Return the last place's logits of an output of shape (1, places, vocabulary)."""
    return common.float32(logits.numpy().reshape(-1, logits.shape()[-1])[-1])
