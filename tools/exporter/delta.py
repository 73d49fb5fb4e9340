"""Layers with a gated delta rule: a state of one size instead of keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from . import parts
from .text import Delta

if TYPE_CHECKING:
    from .builder import Builder

#: Added to the squared length of queries and keys (transformers, ``l2norm``).
TINY = 1e-6


def layer(b: Builder, d: Delta, x: str, i: int) -> str:
    """Add layer ``i`` over ``x`` of (batch, places, hidden); its states are inputs and outputs.

    ``past_conv.I`` is (batch, channels, kernel - 1), ``past_recurrent.I``
    (batch, value heads, key size, value size).
    """
    g, name = b.g, f"{b.layer(i)}.linear_attn"
    keys, values = d.key_heads * d.key, d.value_heads * d.value
    mixed = b.linear(x, f"{name}.in_proj_qkv", d.channels, b.m.hidden)
    mixed = _convolve(b, d, mixed, name, i)
    outs = [f"{name}.{p}" for p in "qkv"]
    split = g.add_many("Split", mixed, g.ints(keys, keys, values), outs=outs, axis=-1)
    q, k = (_unit(b, d, part) for part in split[:2])
    q = g.add("Mul", q, g.scalar(d.key**-0.5))
    v = g.add("Reshape", split[2], g.ints(0, 0, d.value_heads, d.value))
    step = b.linear(x, f"{name}.in_proj_a", d.value_heads, b.m.hidden)
    step = g.add("Add", step, g.weight(f"{name}.dt_bias", b.weights.get(f"{name}.dt_bias")))
    rate = -np.exp(b.weights.get(f"{name}.A_log"))
    kept = g.add("Exp", g.add("Mul", g.add("Softplus", step), g.weight(f"{name}.rate", rate)))
    new = g.add("Sigmoid", b.linear(x, f"{name}.in_proj_b", d.value_heads, b.m.hidden))
    y = _scan(b, d, [q, k, v, kept, new], name, i)
    weight = g.weight(f"{name}.norm", b.weights.get(f"{name}.norm.weight", (d.value,)))
    y = parts.rms_norm(g, y, weight, b.m.epsilon)
    y = g.add("Reshape", y, g.ints(0, 0, values))
    gate = b.linear(x, f"{name}.in_proj_z", values, b.m.hidden)
    return b.linear(
        g.add("Mul", y, parts.activate(g, gate, "silu")),
        f"{name}.out_proj", b.m.hidden, values,
    )  # fmt: skip


def _convolve(b: Builder, d: Delta, x: str, name: str, i: int) -> str:
    """Add a convolution of each channel over the last ``kernel`` places."""
    g, before = b.g, d.kernel - 1
    past = g.input(f"past_conv.{i}", ["batch_size", d.channels, before])
    x = g.add("Concat", past, g.add("Transpose", x, perm=[0, 2, 1]), axis=2)
    present = f"present_conv.{i}"
    last = np.iinfo(np.int64).max
    g.add("Slice", x, g.ints(-before), g.ints(last), g.ints(2), out=present)
    g.output(present, ["batch_size", d.channels, before])
    kernel = b.weights.get(f"{name}.conv1d.weight", (d.channels, 1, d.kernel))
    x = g.add("Conv", x, g.weight(f"{name}.conv1d", kernel), group=d.channels)
    return g.add("Transpose", parts.activate(g, x, "silu"), perm=[0, 2, 1])


def _unit(b: Builder, d: Delta, x: str) -> str:
    """Return queries or keys of length one, each for the value heads that it serves."""
    g, times = b.g, d.value_heads // d.key_heads
    x = g.add("Reshape", x, g.ints(0, 0, d.key_heads, d.key))
    length = g.add("ReduceSum", g.add("Mul", x, x), g.ints(-1), keepdims=1)
    x = g.add("Div", x, g.add("Sqrt", g.add("Add", length, g.scalar(TINY))))
    if times == 1:
        return x
    x = g.add("Unsqueeze", x, g.ints(3))
    x = g.add("Tile", x, g.ints(1, 1, 1, times, 1))
    return g.add("Reshape", x, g.ints(0, 0, d.value_heads, d.key))


def _scan(b: Builder, d: Delta, inputs: list[str], name: str, i: int) -> str:
    """Add the rule itself, place by place; returns (batch, places, value heads, value size)."""
    g = b.g
    size: list[int | str] = ["batch_size", d.value_heads, d.key, d.value]
    past, present = g.input(f"past_recurrent.{i}", size), f"present_recurrent.{i}"
    g.output(present, size)
    by_place = [
        g.add("Transpose", x, perm=[1, 0, 2, 3][: 4 if n < 3 else 3]) for n, x in enumerate(inputs)
    ]
    _, out = g.add_many(
        "Scan", past, *by_place, outs=[present, f"{name}.states"], body=_body(), num_scan_inputs=5
    )
    return g.add("Transpose", out, perm=[1, 0, 2, 3])


def _body() -> onnx.GraphProto:
    """One place: the state fades, what it says of the key is corrected, the query reads it."""
    node, info = helper.make_node, helper.make_tensor_value_info
    names = ("state", "q", "k", "v", "kept", "new")
    nodes = [
        node("Unsqueeze", ["kept", "wide"], ["kept4"]),
        node("Mul", ["state", "kept4"], ["faded"]),
        node("Unsqueeze", ["k", "last"], ["k4"]),
        node("Mul", ["faded", "k4"], ["product"]),
        node("ReduceSum", ["product", "rows"], ["said"], keepdims=0),
        node("Sub", ["v", "said"], ["missing"]),
        node("Unsqueeze", ["new", "last"], ["new3"]),
        node("Mul", ["missing", "new3"], ["change"]),
        node("Unsqueeze", ["change", "rows"], ["change4"]),
        node("Mul", ["k4", "change4"], ["added"]),
        node("Add", ["faded", "added"], ["next"]),
        node("Unsqueeze", ["q", "last"], ["q4"]),
        node("Mul", ["next", "q4"], ["read"]),
        node("ReduceSum", ["read", "rows"], ["out"], keepdims=0),
    ]
    ints = {"wide": [2, 3], "last": [-1], "rows": [-2]}
    return helper.make_graph(
        nodes,
        "place",
        [info(name, TensorProto.FLOAT, None) for name in names],
        [info(name, TensorProto.FLOAT, None) for name in ("next", "out")],
        [numpy_helper.from_array(np.array(v, np.int64), k) for k, v in ints.items()],
    )
