"""Vision towers of the Qwen-VL models, for pictures of any size, as ONNX graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto

from . import parts, vision
from .graph import Graph, Precision
from .weights import CheckpointError, Weights

ROOTS = ("model.visual", "visual")
EPSILON = 1e-6
FIRST = {"qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2_5", "qwen3_vl": "qwen3", "qwen3_5": "qwen3"}


@dataclass(frozen=True)
class Tower:
    """Sizes of a tower. ``generation``: ``qwen2``, ``qwen2_5`` (windows) or ``qwen3``.

    ``window`` counts merged patches on a side; ``full`` are the layers that see
    the whole picture; ``deepstack`` those after which features are taken;
    ``grid`` is the side of the table of learned positions.
    """

    generation: str
    root: str
    hidden: int
    inner: int
    layers: int
    heads: int
    patch: int
    temporal: int
    merge: int
    embedding: int
    activation: str
    theta: float = 10000.0
    window: int = 0
    full: tuple[int, ...] = ()
    deepstack: tuple[int, ...] = ()
    grid: int = 0


def sizes(config: dict[str, Any], weights: Weights, embedding: int) -> Tower:
    """Read a tower's sizes from ``config.json``, with the defaults of transformers."""
    v: dict[str, Any] = config.get("vision_config", {})
    generation = FIRST[str(config["model_type"])]
    hidden = int(v["embed_dim"] if generation == "qwen2" else v["hidden_size"])
    inner = v.get("intermediate_size") or hidden * float(v.get("mlp_ratio", 4))
    merge, patch = int(v.get("spatial_merge_size", 2)), int(v.get("patch_size", 14))
    activation = {"qwen2": "quick_gelu", "qwen2_5": "silu", "qwen3": "gelu_pytorch_tanh"}
    side = round(int(v.get("num_position_embeddings", 0)) ** 0.5)
    return Tower(
        generation=generation,
        root=next((r for r in ROOTS if f"{r}.patch_embed.proj.weight" in weights), ROOTS[0]),
        hidden=hidden,
        inner=int(inner),
        layers=int(v["depth"]),
        heads=int(v.get("num_heads", 16)),
        patch=patch,
        temporal=int(v.get("temporal_patch_size", 2)),
        merge=merge,
        embedding=embedding,
        activation=str(v.get("hidden_act") or activation[generation]),
        theta=float((v.get("rope_parameters") or {}).get("rope_theta", 10000.0)),
        window=int(v.get("window_size", 112)) // merge // patch if generation == "qwen2_5" else 0,
        full=tuple(v.get("fullatt_block_indexes", ())),
        deepstack=tuple(v.get("deepstack_visual_indexes") or ()),
        grid=side if generation == "qwen3" else 0,
    )


def build(
    t: Tower, weights: Weights, precision: Precision, size: tuple[int, int] | None = None
) -> Graph:
    """Return the graph of one picture: patches and grid to ``image_features``.

    ``pixel_values`` is (patches, 3 x temporal x patch x patch), merged
    neighbours together; ``image_grid_thw`` int64 (1, 3). With ``size``, width
    and height in pixels, it is (1, 3, height, width) and there is no grid: what
    converters for fixed shapes need. Features of inner layers are further
    outputs.
    """
    return _Eyes(t, weights, precision).build(size)


class _Eyes:
    def __init__(self, t: Tower, weights: Weights, precision: Precision) -> None:
        self.t, self.w = t, weights
        self.g = Graph("vision_encoder", precision)

    def build(self, size: tuple[int, int] | None) -> Graph:
        t, g = self.t, self.g
        values = 3 * t.temporal * t.patch**2
        if size is None:
            pixels = g.input("pixel_values", ["num_patches", values])
            self._places(g.input("image_grid_thw", [1, 3], TensorProto.INT64), pixels)
        else:
            pixels = self._flattened(*size)
            grid = np.array([[1, size[1] // t.patch, size[0] // t.patch]], np.int64)
            self._places(g.weight("image_grid_thw", grid), pixels)
        kernel = self.w.get(f"{t.root}.patch_embed.proj.weight").reshape(t.hidden, values)
        name = f"{t.root}.patch_embed.proj"
        bias = self.w.get(f"{name}.bias", (t.hidden,)) if f"{name}.bias" in self.w else None
        x = g.linear(pixels, name, kernel, bias)
        if t.grid:
            x = g.add("Add", x, self._learned())
        features = []
        for i in range(t.layers):
            x = self._block(x, i)
            if i in t.deepstack:
                name = f"{t.root}.deepstack_merger_list.{t.deepstack.index(i)}"
                features.append(self._merge(x, name, deep=True))
        out = self._merge(x, f"{t.root}.merger")
        for n, found in enumerate([out, *features]):
            name = f"deepstack_features.{n - 1}" if n else "image_features"
            g.add("Identity", found, out=name)
            g.output(name, ["num_rows", t.embedding])
        return g

    def _flattened(self, width: int, height: int) -> str:
        """Cut a picture into patches as the processors do: blocks of merged ones, row by row."""
        t, g, m = self.t, self.g, self.t.merge
        down, across = height // t.patch // m, width // t.patch // m
        x = g.input("pixel_values", [1, 3, height, width])
        # Seven axes at most: converters know no more than eight.
        x = g.add("Reshape", x, g.ints(3, down, m, t.patch, across, m, t.patch))
        x = g.add("Transpose", x, perm=[1, 4, 2, 5, 0, 3, 6])
        x = g.add("Reshape", x, g.ints(down * across * m * m, 3, 1, t.patch**2))
        x = g.add("Concat", *[x] * t.temporal, axis=2)
        return g.add("Reshape", x, g.ints(down * across * m * m, -1))

    def _places(self, grid: str, pixels: str) -> None:
        """Compute each patch's row and column, which patches see each other, and rotations."""
        t, g = self.t, self.g
        flat = g.add("Reshape", grid, g.ints(3))
        _, height, width = (g.add("Gather", flat, self._int(i)) for i in range(3))
        self._height, self._width = height, width
        count = g.add("Gather", g.add("Shape", pixels), self._int(0))
        n = g.add("Range", self._int(0), count, self._int(1))
        area = g.add("Mul", height, width)
        frame, within = self._split(n, area)
        # Merged neighbours follow each other: (block row, block column, row, column).
        m = self._int(t.merge)
        rest, column = self._split(within, m)
        rest, row = self._split(rest, m)
        block_row, block_column = self._split(rest, g.add("Div", width, m))
        self._row = g.add("Add", g.add("Mul", block_row, m), row)
        self._column = g.add("Add", g.add("Mul", block_column, m), column)
        self._bias = {False: self._together(frame)}
        if t.window:
            side = self._int(t.window)
            numbers = [g.add("Div", b, side) for b in (block_row, block_column)]
            # Fewer windows lie in a row than the picture has patches: one number each.
            number = g.add("Add", g.add("Mul", numbers[0], width), numbers[1])
            number = g.add("Add", g.add("Mul", frame, area), number)
            self._bias[True] = self._together(number)
        half = t.hidden // t.heads // 2
        powers = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
        steps = np.float32(1.0) / np.power(np.float32(t.theta), powers)
        turns = [
            g.add("Mul", self._floats(p, 1), g.weight("rope.steps", steps[None]))
            for p in (self._row, self._column)
        ]
        angle = g.add("Concat", *turns, *turns, axis=-1)
        self._turns = [g.add("Unsqueeze", g.add(f, angle), g.ints(1)) for f in ("Cos", "Sin")]

    def _together(self, number: str) -> str:
        """Return what keeps patches of different numbers apart, (patches, patches)."""
        g = self.g
        same = g.add(
            "Equal", g.add("Unsqueeze", number, g.ints(1)), g.add("Unsqueeze", number, g.ints(0))
        )
        return g.add("Where", same, g.scalar(0.0), g.scalar(float(np.finfo(np.float32).min)))

    def _learned(self) -> str:
        """Return positions of a square table, stretched linearly over the picture's grid."""
        t, g = self.t, self.g
        rows = g.weight("pos_embed", self.w.get(f"{t.root}.pos_embed.weight"))
        axes = []
        for place, size in ((self._row, self._height), (self._column, self._width)):
            last = g.add("Max", g.add("Sub", size, self._int(1)), self._int(1))
            exact = g.add("Mul", self._floats(place, 0), g.scalar(float(t.grid - 1)))
            exact = g.add("Div", exact, g.add("Cast", last, to=TensorProto.FLOAT))
            low = g.add("Floor", exact)
            share = g.add("Sub", exact, low)
            first = g.add("Cast", low, to=TensorProto.INT64)
            second = g.add("Min", g.add("Add", first, self._int(1)), self._int(t.grid - 1))
            axes.append([(first, g.add("Sub", g.scalar(1.0), share)), (second, share)])
        found = ""
        for row, row_share in axes[0]:
            for column, column_share in axes[1]:
                at = g.add("Add", g.add("Mul", row, self._int(t.grid)), column)
                share = g.add("Unsqueeze", g.add("Mul", row_share, column_share), g.ints(1))
                part = g.add("Mul", g.add("Gather", rows, at), share)
                found = g.add("Add", found, part) if found else part
        return found

    def _block(self, x: str, i: int) -> str:
        t, g, name = self.t, self.g, f"{self.t.root}.blocks.{i}"
        y = self._attention(self._norm(x, f"{name}.norm1"), f"{name}.attn", i)
        x = g.add("Add", x, y)
        y = self._norm(x, f"{name}.norm2")
        if t.generation == "qwen2_5":
            gate, up = (
                vision.linear(g, self.w, f"{name}.mlp.{p}_proj", y, (t.inner, t.hidden))
                for p in ("gate", "up")
            )
            y = g.add("Mul", parts.activate(g, gate, t.activation), up)
            last = f"{name}.mlp.down_proj"
        else:
            first, last = (
                f"{name}.mlp.{'linear_' if t.generation == 'qwen3' else ''}{p}"
                for p in ("fc1", "fc2")
            )
            y = vision.linear(g, self.w, first, y, (t.inner, t.hidden))
            y = parts.activate(g, y, t.activation)
        return g.add("Add", x, vision.linear(g, self.w, last, y, (t.hidden, t.inner)))

    def _attention(self, x: str, name: str, i: int) -> str:
        t, g = self.t, self.g
        head = t.hidden // t.heads
        x = vision.linear(g, self.w, f"{name}.qkv", x, (3 * t.hidden, t.hidden))
        x = g.add("Reshape", x, g.ints(-1, 3, t.heads, head))
        q, k, v = (g.add("Gather", x, self._int(n), axis=1) for n in range(3))
        q, k = (
            parts.rotate(g, p, self._turns, head // 2, f"{name}.{n}")
            for n, p in (("q", q), ("k", k))
        )
        q = g.add("Transpose", g.add("Mul", q, g.scalar(head**-0.5)), perm=[1, 0, 2])
        k = g.add("Transpose", k, perm=[1, 2, 0])
        local = bool(t.window) and i not in t.full
        scores = g.add("Add", g.add("MatMul", q, k), self._bias[local])
        share = g.add("Softmax", scores, axis=-1)
        y = g.add("MatMul", share, g.add("Transpose", v, perm=[1, 0, 2]))
        y = g.add("Reshape", g.add("Transpose", y, perm=[1, 0, 2]), g.ints(-1, t.hidden))
        return vision.linear(g, self.w, f"{name}.proj", y, (t.hidden, t.hidden))

    def _merge(self, x: str, name: str, *, deep: bool = False) -> str:
        """Join merge x merge patches into one row of the decoder's size."""
        t, g = self.t, self.g
        wide = t.hidden * t.merge**2
        new = t.generation == "qwen3"
        first, last = ("linear_fc1", "linear_fc2") if new else ("mlp.0", "mlp.2")
        norm = f"{name}.norm" if new else f"{name}.ln_q"
        if deep:
            x = self._norm(g.add("Reshape", x, g.ints(-1, wide)), norm, wide)
        else:
            x = g.add("Reshape", self._norm(x, norm), g.ints(-1, wide))
        x = vision.linear(g, self.w, f"{name}.{first}", x, (wide, wide))
        x = parts.activate(g, x, "gelu")
        return vision.linear(g, self.w, f"{name}.{last}", x, (t.embedding, wide))

    def _norm(self, x: str, name: str, size: int = 0) -> str:
        g, size = self.g, size or self.t.hidden
        if self.t.generation == "qwen2_5":
            weight = g.weight(name, self.w.get(f"{name}.weight", (size,)))
            return parts.rms_norm(g, x, weight, EPSILON)
        return vision.norm(g, self.w, name, x, size, EPSILON)

    def _split(self, x: str, by: str) -> tuple[str, str]:
        return self.g.add("Div", x, by), self.g.add("Mod", x, by)

    def _floats(self, x: str, axis: int) -> str:
        x = self.g.add("Cast", x, to=TensorProto.FLOAT)
        return self.g.add("Unsqueeze", x, self.g.ints(axis)) if axis else x

    def _int(self, value: int) -> str:
        return self.g.weight(f"int_{value}", np.array(value, np.int64))


def check(t: Tower) -> None:
    """Refuse sizes that the graph cannot have.

    Raises:
      CheckpointError: a head whose halves have no pairs.

    """
    if t.hidden % t.heads or t.hidden // t.heads % 4:
        raise CheckpointError("vision_config: heads must have a multiple of four dimensions")
