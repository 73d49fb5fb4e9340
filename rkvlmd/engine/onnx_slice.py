"""A one-node ONNX model that cuts a key/value cache short inside the runtime.

The bytes are written here by hand, because the ``onnx`` package is not needed
for anything else at run time. Field numbers: onnx.proto, ONNX 1.7 (IR 7).
"""

from __future__ import annotations

import numpy as np

#: TensorProto.DataType of the cache types.
ELEMENT = {np.dtype(np.float32): 1, np.dtype(np.float16): 10}
INT64 = 7
IR_VERSION = 7
OPSET = 13


def slice_model(dtype: np.dtype[np.generic]) -> bytes:
    """Return a model ``y = x[:, :, start:end, :]``.

    ``x`` and ``y`` have ``dtype`` and four dimensions of any size; ``start`` and
    ``end`` are int64 of shape (1,).
    """
    axis = _field(1, 1) + _field(2, INT64) + _field(8, "axis") + _field(7, 2)
    node = b"".join(_field(1, name) for name in ("x", "start", "end", "axis"))
    node += _field(2, "y") + _field(4, "Slice")
    graph = _field(1, node) + _field(2, "slice") + _field(5, axis)
    graph += _field(11, _value("x", ELEMENT[dtype], ["b", "h", "n", "d"]))
    graph += _field(11, _value("start", INT64, [1])) + _field(11, _value("end", INT64, [1]))
    graph += _field(12, _value("y", ELEMENT[dtype], ["b", "h", "m", "d"]))
    opset = _field(1, "") + _field(2, OPSET)
    return _field(1, IR_VERSION) + _field(7, graph) + _field(8, opset)


def _value(name: str, element: int, shape: list[str | int]) -> bytes:
    dims = b"".join(
        _field(1, _field(2, size) if isinstance(size, str) else _field(1, size)) for size in shape
    )
    return _field(1, name) + _field(2, _field(1, _field(1, element) + _field(2, dims)))


def _field(number: int, value: int | str | bytes) -> bytes:
    """Return one protobuf field: a varint, or a length and bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(value: int) -> bytes:
    """Return a number as protobuf writes it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
