"""Reads inputs, outputs and where weights lie from an ONNX file, without loading its weights.

An ONNX file is one protobuf message (onnx.proto, ``ModelProto``). Weights are
skipped by their length, so a file of gigabytes costs a few reads.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

#: Deepest message that is read, most values of a list, and longest string that is kept.
_MAX_LIST = 1 << 16
_MAX_TEXT = 1 << 16
# Wire types of protobuf.
_VARINT, _FIXED64, BYTES, _FIXED32 = 0, 1, 2, 5
# onnx.proto: ModelProto, GraphProto, ValueInfoProto, TypeProto, TensorProto.
_PRODUCER, _GRAPH, _METADATA = 2, 7, 14
_INITIALIZER, _INPUT, _OUTPUT = 5, 11, 12
_TENSOR_NAME, _EXTERNAL = 8, 13
#: TensorProto.DataType, as ONNX Runtime writes it.
TYPES = {
    1: "float", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64",
    8: "string", 9: "bool", 10: "float16", 11: "double", 12: "uint32", 13: "uint64",
    16: "bfloat16",
}  # fmt: skip


class NotOnnxError(ValueError):
    """The bytes are no ONNX model."""


class Value(NamedTuple):
    """An input or output; a symbolic size is its name, an unknown one ``None``."""

    name: str
    shape: list[int | str | None]
    type: str


@dataclass(slots=True)
class Header:
    """What the file says besides weights and nodes; ``external`` are the files with weights."""

    producer: str = ""
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    external: set[str] = field(default_factory=set)


class Field(NamedTuple):
    """A field of a message; ``next`` is where the next one begins."""

    number: int
    wire: int
    value: int  # of a varint
    start: int  # of bytes
    end: int
    next: int


def read(path: Path) -> Header:
    """Read the file at ``path``.

    Raises:
      OSError: it cannot be read.
      NotOnnxError: it is no ONNX model, or is cut off.

    """
    with path.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # of an empty file
            raise NotOnnxError("the file is empty") from None
        with data:
            return _model(data)


def _model(data: mmap.mmap) -> Header:
    header, seen = Header(), False
    for item in fields(data, 0, len(data)):
        if item.number == _PRODUCER and item.wire == BYTES:
            header.producer = text(data, item)
        elif item.number == _METADATA and item.wire == BYTES:
            pair = {f.number: text(data, f) for f in inside(data, item) if f.wire == BYTES}
            header.metadata[pair.get(1, "")] = pair.get(2, "")
        elif item.number == _GRAPH and item.wire == BYTES:
            seen = True
            _graph(data, item, header)
    if not seen:
        raise NotOnnxError("there is no graph in it")
    return header


def _graph(data: mmap.mmap, graph: Field, header: Header) -> None:
    weights: set[str] = set()
    for item in inside(data, graph):
        if item.wire != BYTES:
            continue
        if item.number == _INPUT:
            header.inputs.append(_value(data, item))
        elif item.number == _OUTPUT:
            header.outputs.append(_value(data, item))
        elif item.number == _INITIALIZER:
            _weights(data, item, weights, header.external)
    # Old files list their weights among the inputs.
    header.inputs = [value for value in header.inputs if value.name not in weights]


def _weights(data: mmap.mmap, tensor: Field, names: set[str], external: set[str]) -> None:
    for item in inside(data, tensor):
        if item.number == _TENSOR_NAME and item.wire == BYTES:
            names.add(text(data, item))
        elif item.number == _EXTERNAL and item.wire == BYTES and len(external) < _MAX_LIST:
            pair = {f.number: text(data, f) for f in inside(data, item) if f.wire == BYTES}
            if pair.get(1) == "location":
                external.add(pair.get(2, ""))


def _value(data: mmap.mmap, value: Field) -> Value:
    name, kind = "", ""
    shape: list[int | str | None] = []
    for item in inside(data, value):
        if item.number == 1 and item.wire == BYTES:
            name = text(data, item)
        elif item.number == 2 and item.wire == BYTES:
            for tensor in inside(data, item):  # TypeProto: tensor_type is 1
                if tensor.number != 1 or tensor.wire != BYTES:
                    continue
                for part in inside(data, tensor):
                    if part.number == 1 and part.wire == _VARINT:
                        kind = TYPES.get(part.value, str(part.value))
                    elif part.number == 2 and part.wire == BYTES:
                        shape = [_size(data, d) for d in inside(data, part) if d.number == 1]
    return Value(name, shape, kind)


def _size(data: mmap.mmap, dimension: Field) -> int | str | None:
    for item in inside(data, dimension):
        if item.number == 1 and item.wire == _VARINT:
            return item.value
        if item.number == 2 and item.wire == BYTES:
            return text(data, item)
    return None


def text(data: mmap.mmap, item: Field) -> str:
    """Return a string field."""
    return data[item.start : min(item.end, item.start + _MAX_TEXT)].decode("utf-8", "replace")


def inside(data: mmap.mmap, item: Field) -> Iterator[Field]:
    """Yield the fields of the message in a field."""
    return fields(data, item.start, item.end)


def fields(data: mmap.mmap, at: int, end: int) -> Iterator[Field]:
    """Yield the fields of the message in ``data[at:end]``."""
    while at < end:
        key, at = _varint(data, at, end)
        number, wire = key >> 3, key & 7
        if number == 0:
            raise NotOnnxError("a field has the number 0")
        value = start = stop = 0
        if wire == _VARINT:
            value, at = _varint(data, at, end)
        elif wire == BYTES:
            length, start = _varint(data, at, end)
            at = stop = start + length
        elif wire in {_FIXED32, _FIXED64}:
            at += 4 if wire == _FIXED32 else 8
        else:
            raise NotOnnxError("a field has an unknown type")
        if at > end:
            raise NotOnnxError("a field is longer than the file")
        yield Field(number, wire, value, start, stop, at)


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
    raise NotOnnxError("a number is cut off")
