"""What both layouts of a decoder graph share: names, sizes and the order of things."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from . import parts
from .graph import Graph, Precision
from .text import Llama
from .weights import Weights

#: The output that embeddings are made of.
HIDDEN = "hidden_states"


class Builder:
    """A decoder graph under construction: inputs, caches, projections, logits."""

    def __init__(
        self, m: Llama, weights: Weights, precision: Precision, *, hidden: bool = False
    ) -> None:
        self.m = m
        self.hidden = hidden
        self.weights = weights
        self.g = Graph("decoder_model_merged", precision)
        self.x = self.g.input("inputs_embeds", ["batch_size", "sequence_length", m.hidden])
        mask = ["batch_size", "total_sequence_length"]
        self.mask = self.g.input("attention_mask", mask, TensorProto.INT64)

    def position_input(self) -> str:
        """Declare ``position_ids``: one row, or three for time, row and column."""
        places: list[int | str] = ["batch_size", "sequence_length"]
        lead: list[int | str] = [3] if self.m.sections else []
        return self.g.input("position_ids", [*lead, *places], TensorProto.INT64)

    def rotations(self, ids: str, theta: float, factor: float, axis: int) -> list[str]:
        """Return cosines and sines of all places, with a new axis ``axis`` for the heads."""
        m, g = self.m, self.g
        name = f"rope_{theta:g}_{factor:g}"
        table = parts.angles(m.turned, theta, m.context, factor)
        found = []
        for kind, values in (("cos", np.cos(table)), ("sin", np.sin(table))):
            x = g.add("Gather", g.weight(f"{name}.{kind}", values), ids)
            if m.sections:
                x = self._of_axes(x)
            x = g.add("Concat", x, x, axis=-1)
            found.append(g.add("Unsqueeze", x, g.ints(axis)))
        return found

    def _of_axes(self, x: str) -> str:
        """Take each pair of (3, batch, places, head / 2) from the axis that turns it."""
        m, g = self.m, self.g
        axes = parts.axis_of_pairs(m.sections, interleaved=m.interleaved)
        chosen = np.eye(3, dtype=np.float32)[:, axes][:, None, None]
        x = g.add("Mul", x, g.weight("rope.axes", chosen))
        return g.add("ReduceSum", x, g.ints(0), keepdims=0)

    def caches(self, layer: int, kind: str, heads: int = 0, head: int = 0) -> tuple[str, str]:
        """Declare a cache's input and output; sizes that are not given are the decoder's."""
        heads, head = heads or self.m.kv_heads, head or self.m.head
        past, present = f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"
        length = "total_sequence_length"
        self.g.input(past, ["batch_size", heads, "past_sequence_length", head])
        self.g.output(present, ["batch_size", heads, length, head])
        return past, present

    def norm_weight(self, name: str, size: int = 0) -> str:
        values = self.weights.get(f"{name}.weight", (size or self.m.hidden,))
        return self.g.weight(name, values + np.float32(1.0) if self.m.centred else values)

    def linear(self, x: str, name: str, outputs: int, inputs: int) -> str:
        return self.g.linear(x, name, self.weights.get(f"{name}.weight", (outputs, inputs)))

    def joined(self, x: str, name: str, sizes: dict[str, int], *, bias: bool = False) -> str:
        """Add several products with the same input as one."""
        matrix = [
            self.weights.get(f"{name}.{part}_proj.weight", (size, self.m.hidden))
            for part, size in sizes.items()
        ]
        more = None
        if bias:
            more = np.concatenate(
                [self.weights.get(f"{name}.{part}_proj.bias", (n,)) for part, n in sizes.items()]
            )
        return self.g.linear(x, f"{name}.{'_'.join(sizes)}", np.concatenate(matrix), more)

    def qkv(self, x: str, name: str) -> str:
        m = self.m
        kv = m.kv_heads * m.head
        return self.joined(x, name, {"q": self.queries, "k": kv, "v": kv}, bias=m.bias)

    @property
    def queries(self) -> int:
        """Outputs of the queries' product: with a gate for each where attention is gated."""
        return self.m.heads * self.m.head * (2 if self.m.delta else 1)

    def heads(self, x: str, name: str) -> list[str]:
        """Return queries, keys and values as (batch, places, heads, head), normed if they are."""
        m, g = self.m, self.g
        split = g.ints(self.queries, m.kv_heads * m.head, m.kv_heads * m.head)
        outs = [f"{name}.{p}" for p in "qkv"]
        found: list[str] = []
        for part, count in zip(
            g.add_many("Split", self.qkv(x, name), split, outs=outs, axis=-1),
            (m.heads, m.kv_heads, m.kv_heads),
            strict=True,
        ):
            y = g.add("Reshape", part, g.ints(0, 0, count, -1))
            if m.delta and part == outs[0]:
                both = [f"{name}.query", f"{name}.gate"]
                y, _ = g.add_many("Split", y, g.ints(m.head, m.head), outs=both, axis=-1)
            if m.head_norm and part != outs[2]:
                weight = self.norm_weight(f"{name}.{'qk'[len(found)]}_norm", m.head)
                y = parts.rms_norm(g, y, weight, m.epsilon)
            found.append(y)
        return found

    def turn(self, x: str, turns: list[str], name: str) -> str:
        """Turn the dimensions of each head that the position turns."""
        m, g = self.m, self.g
        if m.turned == m.head:
            return parts.rotate(g, x, turns, m.head // 2, name)
        outs = [f"{name}.turned", f"{name}.kept"]
        sizes = g.ints(m.turned, m.head - m.turned)
        turned, kept = g.add_many("Split", x, sizes, outs=outs, axis=-1)
        turned = parts.rotate(g, turned, turns, m.turned // 2, name)
        return g.add("Concat", turned, kept, axis=-1)

    def gate_up(self, x: str, name: str) -> list[str]:
        inner = self.m.inner
        both = self.joined(x, name, {"gate": inner, "up": inner})
        outs = [f"{name}.gate", f"{name}.up"]
        return self.g.add_many("Split", both, self.g.ints(inner, inner), outs=outs, axis=-1)

    def mlp(self, x: str, name: str) -> str:
        gate, up = self.gate_up(x, name)
        y = self.g.add("Mul", parts.activate(self.g, gate, self.m.activation), up)
        return self.linear(y, f"{name}.down_proj", self.m.hidden, self.m.inner)

    def deepstack(self, x: str, layer: int) -> str:
        """Add the features of pictures that belong after ``layer``, if any do."""
        if layer >= self.m.deepstack:
            return x
        shape: list[int | str] = ["batch_size", "sequence_length", self.m.hidden]
        return self.g.add("Add", x, self.g.input(f"deepstack_features.{layer}", shape))

    def layer(self, i: int) -> str:
        return f"{self.m.root}.layers.{i}"

    def show(self, x: str) -> str:
        """Make ``x``, what the logits are computed from, an output if that is wanted."""
        if self.hidden:
            self.g.add("Identity", x, out=HIDDEN)
            self.g.output(HIDDEN, ["batch_size", "sequence_length", self.m.hidden])
        return x

    def head(self, x: str, places: Sequence[int | str] = ("batch_size", "num_logits")) -> Graph:
        """Add the logits and return the graph."""
        m = self.m
        rows = self.weights.get(m.top) if m.top in self.weights else embedding(m, self.weights)
        self.g.linear(x, "lm_head", rows, out="logits")
        self.g.output("logits", [*places, m.vocabulary])
        return self.g


def embedding(m: Llama, weights: Weights) -> parts.Floats:
    """Return the table of token embeddings, (vocabulary, hidden)."""
    return weights.get(f"{m.root}.embed_tokens.weight", (m.vocabulary, m.hidden))
