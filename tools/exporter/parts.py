"""Pieces that several graphs share: norms, activations, rotations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .graph import Graph

Floats = npt.NDArray[np.float32]


def rms_norm(g: Graph, x: str, weight: str, epsilon: float) -> str:
    """Add x / sqrt(mean(x^2) + epsilon) x weight over the last axis."""
    square = g.add("ReduceMean", g.add("Pow", x, g.scalar(2.0)), axes=[-1], keepdims=1)
    root = g.add("Sqrt", g.add("Add", square, g.scalar(epsilon)))
    return g.add("Mul", g.add("Div", x, root), weight)


def gelu_tanh(g: Graph, x: str) -> str:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), from operators that every tool knows."""
    cube = g.add("Mul", g.add("Mul", x, x), x)
    inner = g.add("Add", x, g.add("Mul", cube, g.scalar(0.044715)))
    tanh = g.add("Tanh", g.add("Mul", inner, g.scalar(0.7978845608028654)))
    return g.add("Mul", g.add("Mul", x, g.scalar(0.5)), g.add("Add", tanh, g.scalar(1.0)))


def activate(g: Graph, x: str, kind: str) -> str:
    """Add an activation by the name that configurations have for it."""
    if kind in {"gelu_pytorch_tanh", "gelu_tanh"}:
        return gelu_tanh(g, x)
    if kind == "gelu":
        erf = g.add("Erf", g.add("Mul", x, g.scalar(0.7071067811865476)))
        return g.add("Mul", g.add("Mul", x, g.scalar(0.5)), g.add("Add", erf, g.scalar(1.0)))
    factor = {"silu": 1.0, "quick_gelu": 1.702}[kind]
    inner = x if factor == 1.0 else g.add("Mul", x, g.scalar(factor))
    return g.add("Mul", x, g.add("Sigmoid", inner))


def rotate(g: Graph, x: str, turns: Sequence[str], half: int, name: str) -> str:
    """Turn the pairs (i, i + half) of the last axis.

    ``turns`` are cosines and sines of shape (..., 2 x half).
    """
    cos, sin = turns
    outs = [f"{name}.low", f"{name}.high"]
    low, high = g.add_many("Split", x, g.ints(half, half), outs=outs, axis=-1)
    turned = g.add("Concat", g.add("Neg", high), low, axis=-1)
    return g.add("Add", g.add("Mul", x, cos), g.add("Mul", turned, sin))


def angles(head: int, theta: float, count: int, factor: float = 1.0) -> Floats:
    """Return the angle of every position and pair, float32 of shape (count, head / 2)."""
    # float32 from here on, as transformers computes them.
    powers = np.arange(0, head, 2, dtype=np.float32) / np.float32(head)
    steps = np.float32(1.0) / np.power(np.float32(theta), powers) / np.float32(factor)
    found: Floats = np.arange(count, dtype=np.float32)[:, None] * steps[None]
    return found


def axis_of_pairs(sections: tuple[int, ...], *, interleaved: bool) -> list[int]:
    """Return which axis (time 0, row 1, column 2) turns each pair of rotary dimensions.

    In blocks (Qwen2-VL), or one by one with time at what is left (Qwen3-VL).
    """
    if not interleaved:
        return [axis for axis, size in enumerate(sections) for _ in range(size)]
    return [
        pair % 3 if pair % 3 and pair < sections[pair % 3] * 3 else 0
        for pair in range(sum(sections))
    ]
