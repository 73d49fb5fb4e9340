"""A decoder from standard operators, with caches that grow by concatenation."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from . import delta, parts
from .builder import Builder
from .graph import Graph

#: What a forbidden place gets before the softmax: the lowest float32, as in transformers.
FORBIDDEN = float(np.finfo(np.float32).min)


class Plain(Builder):
    """The layout of published checkpoints; it knows every decoder of ``text``."""

    def build(self) -> Graph:
        m, g = self.m, self.g
        self._prepare()
        x = self.x
        for i in range(m.layers):
            name = self.layer(i)
            y = self._norm(x, f"{name}.input_layernorm")
            if m.delta and i in m.delta.layers:
                y = delta.layer(self, m.delta, y, i)
            else:
                y = self._attention(y, i)
            if m.gemma:
                y = self._norm(y, f"{name}.post_attention_layernorm")
            x = g.add("Add", x, y)
            before = "pre_feedforward_layernorm" if m.gemma else "post_attention_layernorm"
            y = self.mlp(self._norm(x, f"{name}.{before}"), f"{name}.mlp")
            if m.gemma:
                y = self._norm(y, f"{name}.post_feedforward_layernorm")
            x = self.deepstack(g.add("Add", x, y), i)
        last = self.show(self._norm(x, f"{m.root}.norm"))
        return self.head(last, ("batch_size", "sequence_length"))

    def _prepare(self) -> None:
        """Add rotations, and what each place may see."""
        m, g = self.m, self.g
        self._turns = self.turns(self.position_input())
        zero, one = (g.weight(f"int_{n}", np.array(n, np.int64)) for n in (0, 1))
        total = g.add("Gather", g.add("Shape", self.mask), one)
        new = g.add("Gather", g.add("Shape", self.x), one)
        self._past = g.add("Sub", total, new)
        keys = g.add("Range", zero, total, one)
        queries = g.add("Unsqueeze", g.add("Range", self._past, total, one), g.ints(1))
        seen = g.add("LessOrEqual", keys, queries)
        given = g.add("Cast", self.mask, to=TensorProto.BOOL)
        given = g.add("Unsqueeze", given, g.ints(1, 2, 3))
        if m.gemma:
            seen = g.add("Or", seen, self._within_pictures())
        self._bias = {False: self._as_bias(given, seen)}
        if window := max(m.windows, default=0):
            size = g.weight("window", np.array(window, np.int64))
            near = g.add("Less", g.add("Sub", queries, keys), size)
            self._bias[True] = self._as_bias(given, g.add("And", near, seen))

    def turns(self, ids: str) -> dict[bool, list[str]]:
        """Return cosines and sines of layers that see everything (False) and a window (True)."""
        m = self.m
        found = {False: self.rotations(ids, m.theta, m.factor, 1)}
        if any(m.windows):
            found[True] = self.rotations(ids, m.local_theta, 1.0, 1)
        return found

    def _as_bias(self, given: str, seen: str) -> str:
        g = self.g
        return g.add("Where", g.add("And", given, seen), g.scalar(0.0), g.scalar(FORBIDDEN))

    def _within_pictures(self) -> str:
        """Return which places belong to the same picture, (batch, 1, 1, new, total).

        A picture is a run of ones in ``token_type_ids``, and lies in one run of
        the graph: what is in the cache belongs to none of the new places.
        """
        g = self.g
        places = ["batch_size", "sequence_length"]
        types = g.input("token_type_ids", places, TensorProto.INT64)
        is_one = g.add("Equal", types, g.weight("int_1", np.array(1, np.int64)))
        ones = g.add("Cast", is_one, to=TensorProto.INT64)
        before = g.add("Pad", ones, g.ints(0, 1, 0, -1))
        starts = g.add("Relu", g.add("Cast", g.add("Sub", ones, before), to=TensorProto.FLOAT))
        number = g.add("CumSum", starts, g.weight("int_1", np.array(1, np.int64)))
        number = g.add("Where", is_one, number, g.scalar(-1.0))
        ends = g.add("Concat", g.ints(0), g.add("Unsqueeze", self._past, g.ints(0)),
                     g.ints(0, 0), axis=0)  # fmt: skip
        all_numbers = g.add("Pad", number, ends, g.scalar(-2.0))
        same = g.add(
            "Equal",
            g.add("Unsqueeze", number, g.ints(2)),
            g.add("Unsqueeze", all_numbers, g.ints(1)),
        )
        same = g.add("And", same, g.add("Unsqueeze", is_one, g.ints(2)))
        return g.add("Unsqueeze", same, g.ints(1, 2))

    def _norm(self, x: str, name: str) -> str:
        return parts.rms_norm(self.g, x, self.norm_weight(name), self.m.epsilon)

    def _attention(self, x: str, i: int) -> str:
        m, g, name = self.m, self.g, f"{self.layer(i)}.self_attn"
        local = bool(m.windows and m.windows[i])
        q, k, v = (g.add("Transpose", p, perm=[0, 2, 1, 3]) for p in self.heads(x, name))
        q, k = (self.turn(p, self._turns[local], f"{name}.{n}") for n, p in (("q", q), ("k", k)))
        joined = []
        for kind, value in (("key", k), ("value", v)):
            past, present = self.caches(i, kind)
            g.add("Concat", past, value, out=present, axis=2)
            joined.append(g.add("Unsqueeze", present, g.ints(2)))
        heads = (m.heads, m.kv_heads, m.head)
        return self.attend(q, joined[0], joined[1], name, local=local, heads=heads)

    def attend(
        self, q: str, keys: str, values: str, name: str, *, local: bool, heads: tuple[int, int, int]
    ) -> str:
        """Add attention and its last product.

        ``q`` is (batch, heads, places, head), ``keys`` and ``values`` (batch,
        key heads, 1, places, head); ``heads`` are those numbers.
        """
        m, g = self.m, self.g
        count, key_heads, head = heads
        # Every key head serves heads / key heads query heads: a dimension of their own.
        if m.query_scale != 1.0:
            q = g.add("Mul", q, g.scalar(m.query_scale))
        q = g.add("Reshape", q, g.ints(0, key_heads, count // key_heads, -1, head))
        scores = g.add("MatMul", q, g.add("Transpose", keys, perm=[0, 1, 2, 4, 3]))
        share = g.add("Softmax", g.add("Add", scores, self._bias[local]), axis=-1)
        y = g.add("MatMul", share, values)
        y = g.add("Transpose", y, perm=[0, 3, 1, 2, 4])
        y = g.add("Reshape", y, g.ints(0, 0, count * head))
        if m.delta:
            gate = g.add("Reshape", f"{name}.gate", g.ints(0, 0, count * head))
            y = g.add("Mul", y, g.add("Sigmoid", gate))
        return self.linear(y, f"{name}.o_proj", m.hidden, count * head)
