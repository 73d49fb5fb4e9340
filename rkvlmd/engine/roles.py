"""What an encoder and a decoder child do with their orders, whatever the library."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from rkvlmd.engine import heap, memfd, vectors
from rkvlmd.engine.ahead import Ahead, Sweeper
from rkvlmd.engine.assemble import Assembler
from rkvlmd.engine.backend import DecoderBackend, EncoderBackend, InPlaceEncoder, Rows
from rkvlmd.engine.loop import Order, Send
from rkvlmd.engine.script import Script
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import assembly
from rkvlmd.models.manifest import Embeddings
from rkvlmd.wire import child

#: Role and engine (a key of the manifest) to the backend that runs it.
BACKENDS = {
    ("encoder", "onnx"): "rkvlmd.engine.onnx_encoder:OnnxEncoder",
    ("decoder", "onnx"): "rkvlmd.engine.onnx_decoder:OnnxDecoder",
    ("encoder", "rknn"): "rkvlmd.engine.rknn_encoder:RknnEncoder",
    ("decoder", "rkllm"): "rkvlmd.engine.rkllm_decoder:RkllmDecoder",
    ("decoder", "tower"): "rkvlmd.engine.onnx_tower:OnnxTower",
}
SCRIPTED = "rkvlmd.engine.scripted:ScriptedBackend"


class EngineRole:
    """An encoder or decoder child; ``scripted`` is both, with a backend of its own."""

    def __init__(self, name: str, script: Script | None = None) -> None:
        self._name = name
        self._script = script
        self._backend: Any = None
        self._row = 0
        self._beside = False
        self._assembler: Assembler | None = None
        self._embeddings: Embeddings | None = None
        self._generating = False
        self._sweeper = Sweeper()
        self._ahead = Ahead(self._sweeper)

    def warm(self) -> None:
        """Nothing: ``load`` says which libraries are needed."""

    def abort(self) -> None:
        """End a generation; an encode runs to its end."""
        if self._generating:
            self._backend.abort()

    def work(self, order: Order, fds: Sequence[int], send: Send) -> None:
        """Do one order.

        Raises:
          RkvlmdError: what the library refused; an order before ``load``.
          memfd.MemoryFileError: the daemon sent something else than it said.

        """
        if isinstance(order, child.Load):
            self._load(order, send)
        elif self._backend is None:
            raise RkvlmdError("model_not_loaded", "The model is not loaded.")
        elif isinstance(order, child.Encode) and self._name != "decoder":
            self._encode(order, fds, send, self._backend)
        elif isinstance(order, child.Generate) and self._name != "encoder":
            self._generate(order, fds, send, self._backend)
        elif isinstance(order, child.Embed) and self._name != "encoder":
            rows = self._all_rows(order, fds)
            send(vectors.embed(self._backend, order, rows, self._embeddings))
        else:
            raise ValueError(f"{type(order).__name__} is no order for a child of role {self._name}")

    def _load(self, order: child.Load, send: Send) -> None:
        def progress(fraction: float, doing: str) -> None:
            send(child.Progress(fraction=min(max(fraction, 0.0), 1.0), doing=doing))

        if self._backend is not None:
            raise ValueError("second load")
        backend: EncoderBackend | DecoderBackend = self._new(order)
        if self._name != "encoder":
            self._assembler = Assembler.of(order)
        info = backend.load(order, progress)
        self._backend = backend
        self._row = _row(order.manifest)
        self._embeddings = vectors.described(order.manifest)
        self._beside = bool(order.manifest.get("decoder", {}).get("cross_attention"))
        heap.give_back()
        send(child.Ready(info=info))

    def _new(self, order: child.Load) -> Any:
        if self._name == "scripted" or order.options.get("backend") == "scripted":
            return _import(SCRIPTED)(self._script)
        if self._name == "encoder":
            engine = order.manifest["encoders"][order.part]["engine"]
        else:
            engine = order.manifest["decoder"]["engine"]
        where = BACKENDS.get((self._name, engine))
        if where is None:
            raise RkvlmdError(
                "invalid_model",
                f"The {self._name} of this model needs the engine {engine!r}, which this version"
                " cannot run.",
            )
        try:
            return _import(where)()
        except ModuleNotFoundError as exc:
            if exc.name is None or exc.name.startswith("rkvlmd"):
                raise
            raise RkvlmdError(
                "invalid_model",
                f"The engine {engine!r} needs the Python package {exc.name!r}, which is not"
                " installed.",
            ) from exc

    def _encode(
        self, order: child.Encode, fds: Sequence[int], send: Send, backend: EncoderBackend
    ) -> None:
        if len(fds) != 1:
            raise memfd.MemoryFileError(f"encode with {len(fds)} descriptors")
        pixels = memfd.map_array(fds[0], order.pixels)
        if isinstance(backend, InPlaceEncoder) and backend.rows_shape is not None:
            self._encode_into(order, pixels, send, backend, backend.rows_shape)
            return
        begin = time.monotonic()
        rows = backend.encode(pixels, order.grid)
        seconds = time.monotonic() - begin
        fd, tensor = memfd.from_array(rows, "rkvlmd-rows")
        try:
            send(child.EncodeDone(id=order.id, rows=tensor, seconds=seconds), [fd])
        finally:
            os.close(fd)

    def _encode_into(
        self,
        order: child.Encode,
        pixels: Any,
        send: Send,
        backend: InPlaceEncoder,
        shape: tuple[int, int],
    ) -> None:
        """Encode into a memory file that is made while the library works."""
        with self._ahead.room(shape) as room:
            begin = time.monotonic()
            # What the library made is freed when its rows are on their way.
            made = backend.encode_into(pixels, order.grid, room.rows)
            seconds = time.monotonic() - begin
            send(child.EncodeDone(id=order.id, rows=room.tensor, seconds=seconds), [room.sealed()])
        self._sweeper.take(made)

    def _generate(
        self, order: child.Generate, fds: Sequence[int], send: Send, backend: DecoderBackend
    ) -> None:
        rows = self._all_rows(order, fds)
        say = partial(send, in_callback=getattr(backend, "in_callback", False))
        self._generating = True
        try:
            done = backend.generate(order, rows, say)
        finally:
            self._generating = False
        send(done)
        if rows:
            self._sweeper.take(rows)

    def _all_rows(self, order: child.Generate | child.Embed, fds: Sequence[int]) -> list[Rows]:
        wanted = sum(1 if s.tiles is None else assembly.views(s.tiles) for s in order.spans)
        if len(fds) != wanted:
            raise memfd.MemoryFileError(f"{len(order.spans)} spans, {len(fds)} descriptors")
        left = iter(fds)
        return [
            self._rows(next(left), span) if span.tiles is None else self._block(left, span)
            for span in order.spans
        ]

    def _block(self, fds: Iterator[int], span: child.Span) -> Rows:
        """Return the rows of a picture whose views are assembled."""
        if self._assembler is None or span.tiles is None:
            raise memfd.MemoryFileError("the model has no assembly")
        return self._assembler(fds, span.tiles, span.count)

    def _rows(self, fd: int, span: child.Span) -> Rows:
        width = self._row
        if width == 0:
            # A scripted decoder may run without a manifest.
            width = memfd.checked_size(fd) // (4 * max(1, span.count))
        count = span.count
        if self._beside:
            # The rows are not those of the picture's one place in the prompt.
            count = memfd.checked_size(fd) // (4 * width)
        # A library gets them without a copy where it can, and none promises not to write.
        return memfd.map_array(fd, child.Tensor(shape=(count, width), dtype="float32"), own=True)


def _row(manifest: dict[str, Any]) -> int:
    """Return how many floats a row of a picture has: one embedding an output of the encoder."""
    decoder = manifest.get("decoder", {})
    encoders = manifest.get("encoders") or ()
    outputs = max((e.get("outputs", 1) for e in encoders), default=1)
    embedding = decoder.get("embedding", 0)
    if decoder.get("cross_attention"):
        embedding = max((e["embedding"] for e in encoders), default=0)
    return int(embedding) * int(outputs)


def _import(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)
