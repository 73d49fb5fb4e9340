"""The decoders of Gemma 3n and Gemma 4: every layer has embeddings of its own."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from onnx import TensorProto

from . import parts
from .builder import embedding
from .gemma_n_sizes import GemmaN, Rope
from .graph import Graph, Precision
from .plain import Plain
from .weights import Weights

PER_LAYER = "per_layer_inputs"
#: Least mean square of a state, under the root (transformers, ``Gemma3nTextModel``).
LEAST = 1e-5


def build_embed(m: GemmaN, weights: Weights, precision: Precision) -> Graph:
    """Return the graph ``input_ids`` to ``inputs_embeds`` and ``per_layer_inputs``."""
    g = Graph("embed_tokens", precision)
    places: list[int | str] = ["batch_size", "sequence_length"]
    ids = g.input("input_ids", places, TensorProto.INT64)
    found = g.table(ids, "embed_tokens", embedding(m, weights), out="rows")
    g.add("Mul", found, g.scalar(float(m.hidden) ** 0.5), out="inputs_embeds")
    g.output("inputs_embeds", [*places, m.hidden])
    known = g.add("Less", ids, g.weight("rows_beside", np.array(m.rows, np.int64)))
    ids = g.add("Where", known, ids, g.weight("int_0", np.array(0, np.int64)))
    table = weights.get(f"{m.root}.embed_tokens_per_layer.weight", (m.rows, m.layers * m.beside))
    found = g.table(ids, "embed_tokens_per_layer", table, out="rows_of_layers")
    found = g.add("Mul", found, g.scalar(float(m.beside) ** 0.5))
    g.add("Reshape", found, g.ints(0, 0, m.layers, m.beside), out=PER_LAYER)
    g.output(PER_LAYER, [*places, m.layers, m.beside])
    return g


class Layered(Plain):
    """The decoder; ``per_layer_inputs`` come from the graph of the embeddings."""

    def __init__(
        self, m: GemmaN, weights: Weights, precision: Precision, *, hidden: bool = False
    ) -> None:
        super().__init__(m, weights, precision, hidden=hidden)
        self.n = m
        self._kept: dict[str, list[str]] = {}

    def build(self) -> Graph:
        m, g = self.n, self.g
        self._prepare()
        beside = self._beside()
        x = self._spread(self.x) if m.copies else self.x
        for i in range(m.layers):
            index = g.weight(f"int_{i}", np.array(i, np.int64))
            own = g.add("Gather", beside, index, axis=2)
            x = self._layer_of_copies(x, own, i) if m.copies else self._layer_of_one(x, own, i)
        if m.copies:
            x = self._gathered(x)
        last = self.show(self._norm(x, f"{m.root}.norm"))
        if not m.softcap:
            return self.head(last, ("batch_size", "sequence_length"))
        y = g.linear(last, "lm_head", self._top())
        y = g.add("Tanh", g.add("Div", y, g.scalar(m.softcap)))
        g.add("Mul", y, g.scalar(m.softcap), out="logits")
        g.output("logits", ["batch_size", "sequence_length", m.vocabulary])
        return g

    def _top(self) -> parts.Floats:
        m = self.n
        return self.weights.get(m.top) if m.top in self.weights else embedding(m, self.weights)

    def turns(self, ids: str) -> dict[bool, list[str]]:
        found = {}
        for kind, rope in self.n.ropes:
            if kind in self.n.types:
                head = self.n.head_sizes[self.n.types.index(kind)]
                found[kind == "sliding_attention"] = self._turns_of(ids, head, rope)
        return found

    def _turns_of(self, ids: str, head: int, rope: Rope) -> list[str]:
        m, g = self.n, self.g
        table = parts.angles(head, rope.theta, m.context, rope.factor)
        table[:, int(rope.share * head // 2) :] = 0.0
        name, found = f"rope_{head}_{rope.theta:g}", []
        for kind, values in (("cos", np.cos(table)), ("sin", np.sin(table))):
            x = g.add("Gather", g.weight(f"{name}.{kind}", values), ids)
            found.append(g.add("Unsqueeze", g.add("Concat", x, x, axis=-1), g.ints(1)))
        return found

    def _beside(self) -> str:
        """Return what every layer gets, (batch, places, layers, size)."""
        m, g, size = self.n, self.g, self.n.beside
        places: list[int | str] = ["batch_size", "sequence_length"]
        given = g.input(PER_LAYER, [*places, m.layers, size])
        x = self.linear(
            self.x, f"{m.root}.per_layer_model_projection", m.layers * size, m.hidden
        )  # fmt: skip
        x = g.add("Mul", x, g.scalar(float(m.hidden) ** -0.5))
        x = g.add("Reshape", x, g.ints(0, 0, m.layers, size))
        weight = self.norm_weight(f"{m.root}.per_layer_projection_norm", size)
        x = parts.rms_norm(g, x, weight, m.epsilon)
        return g.add("Mul", g.add("Add", x, given), g.scalar(2.0**-0.5))

    def _layer_of_one(self, x: str, own: str, i: int) -> str:
        g, name = self.g, self.layer(i)
        y = self._attend(self._norm(x, f"{name}.input_layernorm"), i)
        x = g.add("Add", x, self._norm(y, f"{name}.post_attention_layernorm"))
        y = self._feed(self._norm(x, f"{name}.pre_feedforward_layernorm"), i)
        x = g.add("Add", x, self._norm(y, f"{name}.post_feedforward_layernorm"))
        x = g.add("Add", x, self._own(x, own, name))
        scalar = f"{name}.layer_scalar"
        return g.add("Mul", x, g.weight(scalar, self.weights.get(scalar)))

    def _own(self, x: str, own: str, name: str) -> str:
        """Return what the layer's own embeddings add."""
        m, g = self.n, self.g
        y = self.linear(x, f"{name}.per_layer_input_gate", m.beside, m.hidden)
        y = g.add("Mul", parts.activate(g, y, m.activation), own)
        y = self.linear(y, f"{name}.per_layer_projection", m.hidden, m.beside)
        return self._norm(y, f"{name}.post_per_layer_input_norm")

    def _layer_of_copies(self, x: str, own: str, i: int) -> str:
        m, g, name = self.n, self.g, self.layer(i)
        guessed = self._guess(x, name)
        one = self._copy(guessed)
        normed = self._norm(one, f"{name}.input_layernorm")
        y = self.linear(normed, f"{name}.laurel.linear_left", m.rank, m.hidden)
        y = self.linear(y, f"{name}.laurel.linear_right", m.hidden, m.rank)
        short = g.add("Add", normed, self._norm(y, f"{name}.laurel.post_laurel_norm"))
        y = self._norm(self._attend(normed, i), f"{name}.post_attention_layernorm")
        y = g.add("Add", g.add("Add", one, y), short)
        y = g.add("Div", y, g.scalar(2.0**0.5))
        fed = self._feed(self._norm(y, f"{name}.pre_feedforward_layernorm"), i)
        y = g.add("Add", y, self._norm(fed, f"{name}.post_feedforward_layernorm"))
        x = self._correct(guessed, one, y, name)
        scale = f"{name}.altup.correct_output_scale"
        first = g.add("Mul", self._copy(x), g.weight(scale, self.weights.get(scale, (m.hidden,))))
        added = g.add("Unsqueeze", self._own(first, own, name), g.ints(0))
        others = np.ones((m.copies, 1, 1, 1), np.float32)
        others[0] = 0.0
        return g.add("Add", x, g.add("Mul", added, g.weight("other_copies", others)))

    def _copy(self, x: str) -> str:
        """Return the copy that the layers work on, (batch, places, hidden)."""
        index = self.g.weight(f"int_{self.n.active}", np.array(self.n.active, np.int64))
        return self.g.add("Gather", x, index, axis=0)

    def _route(self, x: str, name: str) -> str:
        m, g = self.n, self.g
        x = self._norm(x, f"{name}.altup.router_norm")
        x = g.add("Mul", x, g.scalar(1.0 / m.hidden))
        return g.add("Tanh", self.linear(x, f"{name}.altup.modality_router", m.copies, m.hidden))

    def _guess(self, x: str, name: str) -> str:
        """Return what the layer will make of each copy, as guessed from all of them."""
        g, n = self.g, self.n.copies
        mix = self.linear(
            self._route(self._copy(x), name), f"{name}.altup.prediction_coefs", n * n, n
        )  # fmt: skip
        mix = g.add("Transpose", g.add("Reshape", mix, g.ints(0, 0, n, n)), perm=[0, 1, 3, 2])
        y = g.add("MatMul", g.add("Transpose", x, perm=[1, 2, 3, 0]), mix)
        return g.add("Add", g.add("Transpose", y, perm=[3, 0, 1, 2]), x)

    def _correct(self, guessed: str, one: str, made: str, name: str) -> str:
        """Return the copies with what the layer made of one of them."""
        m, g = self.n, self.g
        new = g.add("Unsqueeze", g.add("Sub", made, one), g.ints(0))
        share = self.linear(
            self._route(made, name), f"{name}.altup.correction_coefs", m.copies, m.copies
        )  # fmt: skip
        share = g.add("Add", share, g.scalar(1.0))
        share = g.add("Unsqueeze", g.add("Transpose", share, perm=[2, 0, 1]), g.ints(-1))
        return g.add("Add", g.add("Mul", new, share), guessed)

    def _spread(self, x: str) -> str:
        """Return the copies that the decoder starts with, all of the same size."""
        m, g = self.n, self.g
        size = self._size(x, least=0.0)
        found = [x]
        for i in range(m.copies - 1):
            y = self.linear(x, f"{m.root}.altup_projections.{i}", m.hidden, m.hidden)
            found.append(self._resized(y, size))
        return g.add("Concat", *(g.add("Unsqueeze", y, g.ints(0)) for y in found), axis=0)

    def _gathered(self, x: str) -> str:
        """Return the mean of the copies, all of the size of the first one."""
        m, g = self.n, self.g
        outs = [f"copy_{i}" for i in range(m.copies)]
        first, *others = g.add_many("Split", x, g.ints(*[1] * m.copies), outs=outs, axis=0)
        size = self._size(first, least=0.0)
        found = first
        for i, other in enumerate(others):
            name = f"{m.root}.altup_unembed_projections.{i}"
            y = self.linear(other, name, m.hidden, m.hidden)
            found = g.add("Add", found, self._resized(y, size))
        found = g.add("Squeeze", found, g.ints(0))
        return g.add("Div", found, g.scalar(float(m.copies)))

    def _resized(self, x: str, size: str) -> str:
        g = self.g
        return g.add("Div", g.add("Mul", x, size), self._size(x, least=LEAST))

    def _size(self, x: str, *, least: float) -> str:
        g = self.g
        mean = g.add("ReduceMean", g.add("Mul", x, x), axes=[-1], keepdims=1)
        return g.add("Sqrt", g.add("Max", mean, g.scalar(least)) if least else mean)

    def _feed(self, x: str, i: int) -> str:
        m, g, name = self.n, self.g, f"{self.layer(i)}.mlp"
        inner = m.inners[i]
        gate = self.linear(x, f"{name}.gate_proj", inner, m.hidden)
        if m.sparsity[i]:
            # Only what lies above the quantile of a normal distribution stays.
            mean = g.add("ReduceMean", gate, axes=[-1], keepdims=1)
            off = g.add("Sub", gate, mean)
            spread = self._size(off, least=0.0)
            times = NormalDist().inv_cdf(m.sparsity[i])
            gate = g.add("Relu", g.add("Sub", off, g.add("Mul", spread, g.scalar(times))))
        y = g.add("Mul", parts.activate(g, gate, m.activation),
                  self.linear(x, f"{name}.up_proj", inner, m.hidden))  # fmt: skip
        return self.linear(y, f"{name}.down_proj", m.hidden, inner)

    def _attend(self, x: str, i: int) -> str:
        m, g, name = self.n, self.g, f"{self.layer(i)}.self_attn"
        head, count, kind = m.head_sizes[i], m.key_heads[i], m.types[i]
        local = bool(m.windows[i])
        q = self._turned_heads(x, f"{name}.q", m.heads, head, local=local)
        if i < m.layers - m.shared:
            k = self._turned_heads(x, f"{name}.k", count, head, local=local)
            v = self.linear(
                x, f"{name}.{'k' if self._same(i) else 'v'}_proj", count * head, m.hidden
            )
            v = g.add("Reshape", v, g.ints(0, 0, count, head))
            v = parts.rms_norm(g, v, g.scalar(1.0), m.epsilon)
            v = g.add("Transpose", v, perm=[0, 2, 1, 3])
            self._kept[kind] = []
            for part, value in (("key", k), ("value", v)):
                past, present = self.caches(i, part, count, head)
                g.add("Concat", past, value, out=present, axis=2)
                self._kept[kind].append(g.add("Unsqueeze", present, g.ints(2)))
        keys, values = self._kept[kind]
        return self.attend(q, keys, values, name, local=local, heads=(m.heads, count, head))

    def _same(self, i: int) -> bool:
        return self.n.same and self.n.types[i] == "full_attention"

    def _turned_heads(self, x: str, name: str, count: int, head: int, *, local: bool) -> str:
        g, m = self.g, self.n
        y = self.linear(x, f"{name}_proj", count * head, m.hidden)
        y = g.add("Reshape", y, g.ints(0, 0, count, head))
        y = parts.rms_norm(g, y, self.norm_weight(f"{name}_norm", head), m.epsilon)
        y = g.add("Transpose", y, perm=[0, 2, 1, 3])
        return parts.rotate(g, y, self._turns[local], head // 2, name)
