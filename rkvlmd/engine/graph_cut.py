"""Cuts one output, and all that it is computed from, out of an ONNX file; weights are copied, not read.

For files that hold two models, as a CLIP with both towers in one graph.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from rkvlmd.engine.graph_header import BYTES, Field, NotOnnxError, fields, inside, text
from rkvlmd.engine.onnx_slice import varint

# onnx.proto: ModelProto, GraphProto, NodeProto, AttributeProto, TensorProto, ValueInfoProto.
_GRAPH = 7
_NODE, _INITIALIZER, _INPUT, _OUTPUT, _VALUE_INFO, _QUANTIZED, _SPARSE = 1, 5, 11, 12, 13, 14, 15
_NODE_INPUT, _NODE_OUTPUT, _ATTRIBUTE = 1, 2, 5
_BODY, _BODIES = 6, 11
_TENSOR_NAME, _VALUE_NAME = 8, 1
#: Deepest graph inside a node that is looked into.
_MOST_DEPTH = 8
_CHUNK = 1 << 20


def cut(source: Path, target: Path, output: str) -> None:
    """Write ``target``: the graph of ``source`` with ``output`` alone.

    Weights in files of their own stay there, and both files name them.

    Raises:
      OSError: a file cannot be read or written.
      NotOnnxError: it is no ONNX model, or has no such output.

    """
    with source.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # of an empty file
            raise NotOnnxError("the file is empty") from None
        with data:
            _write(data, target, output)


def _write(data: mmap.mmap, target: Path, output: str) -> None:
    before: list[tuple[int, int]] = []
    graph: Field | None = None
    for span, item in _spans(data, 0, len(data)):
        if item.number == _GRAPH and item.wire == BYTES:
            graph = item
        else:
            before.append(span)
    if graph is None:
        raise NotOnnxError("there is no graph in it")
    kept = _kept(data, graph, output)
    with target.open("wb") as file:
        for start, end in before:
            file.write(data[start:end])
        file.write(varint(_GRAPH << 3 | BYTES) + varint(sum(end - start for start, end in kept)))
        for start, end in kept:
            for at in range(start, end, _CHUNK):
                file.write(data[at : min(end, at + _CHUNK)])


def _kept(data: mmap.mmap, graph: Field, output: str) -> list[tuple[int, int]]:
    """Return the bytes of the graph's fields that ``output`` needs, in their order."""
    items = list(_spans(data, graph.start, graph.end))
    needed = {output}
    chosen: set[int] = set()
    made = False
    # Nodes stand in the order of computation, so one look from the end is enough.
    for number, (_, item) in reversed(list(enumerate(items))):
        if item.number != _NODE or item.wire != BYTES:
            continue
        outputs = {text(data, f) for f in inside(data, item) if f.number == _NODE_OUTPUT}
        if outputs & needed:
            made = made or output in outputs
            chosen.add(number)
            needed |= set(_inputs(data, item, 0))
    if not made:
        raise NotOnnxError(f"nothing in it computes {output}")
    names = {_INITIALIZER: _TENSOR_NAME, _INPUT: _VALUE_NAME, _OUTPUT: _VALUE_NAME}
    kept = []
    for number, (span, item) in enumerate(items):
        if item.wire == BYTES and item.number in {_VALUE_INFO, _QUANTIZED}:
            continue  # sizes in between, which are worked out again
        if item.wire == BYTES and item.number == _SPARSE:
            raise NotOnnxError("it has sparse weights")
        if item.number == _NODE and number not in chosen:
            continue
        if item.wire == BYTES and item.number in names:
            wanted = {output} if item.number == _OUTPUT else needed
            key = names[item.number]
            found = {text(data, f) for f in inside(data, item) if f.number == key}
            if not found & wanted:
                continue
        kept.append(span)
    return kept


def _inputs(data: mmap.mmap, node: Field, depth: int) -> Iterator[str]:
    """Yield the names that a node takes, and those that graphs inside it may take."""
    if depth > _MOST_DEPTH:
        raise NotOnnxError("graphs are nested too deep")
    for item in inside(data, node):
        if item.number == _NODE_INPUT and item.wire == BYTES:
            yield text(data, item)
        elif item.number == _ATTRIBUTE and item.wire == BYTES:
            for part in inside(data, item):
                if part.number in {_BODY, _BODIES} and part.wire == BYTES:
                    yield from _body(data, part, depth)


def _body(data: mmap.mmap, graph: Field, depth: int) -> Iterator[str]:
    for item in inside(data, graph):
        if item.number == _NODE and item.wire == BYTES:
            yield from _inputs(data, item, depth + 1)
        elif item.number == _OUTPUT and item.wire == BYTES:
            # A branch may pass a value of the outer graph on as it is.
            yield from (text(data, f) for f in inside(data, item) if f.number == _VALUE_NAME)


def _spans(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[tuple[int, int], Field]]:
    """Yield each field with the bytes that it takes, key and length included."""
    at = start
    for item in fields(data, start, end):
        yield (at, item.next), item
        at = item.next
