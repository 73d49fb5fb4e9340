"""A decoder from ONNX Runtime's fused operators, whose caches may be shared buffers."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from . import parts
from .builder import Builder
from .graph import CONTRIB, Graph
from .weights import CheckpointError

LAST = np.iinfo(np.int64).max


class Fused(Builder):
    """GroupQueryAttention and fused norms.

    Not for Gemma, whose pictures see ahead, nor for layers without attention.
    """

    def build(self) -> Graph:
        m, g = self.m, self.g
        if m.standard:
            raise CheckpointError("this decoder needs --attention plain")
        self._prepare()
        x = self.x
        first = self.norm_weight(f"{self.layer(0)}.input_layernorm")
        y = g.add("SimplifiedLayerNormalization", x, first, axis=-1, epsilon=m.epsilon)
        for i in range(m.layers):
            name = self.layer(i)
            y = self._attention(y, i)
            y, x = self._add_norm(y, x, f"{name}.post_attention_layernorm")
            y = self.deepstack(self.mlp(y, f"{name}.mlp"), i)
            last = i + 1 == m.layers
            after = f"{m.root}.norm" if last else f"{self.layer(i + 1)}.input_layernorm"
            y, x = self._add_norm(y, x, after)
        return self.head(self._last(self.show(y)))

    def mlp(self, x: str, name: str) -> str:
        if self.m.activation != "silu":
            return super().mlp(x, name)
        gate, up = self.gate_up(x, name)
        y = self.g.add("Mul", self.g.add("QuickGelu", gate, domain=CONTRIB, alpha=1.0), up)
        return self.linear(y, f"{name}.down_proj", self.m.hidden, self.m.inner)

    def _prepare(self) -> None:
        """Add what GroupQueryAttention wants to know about lengths, and its rotations."""
        m, g = self.m, self.g
        if m.sections:
            self._turns = self.rotations(self.position_input(), m.theta, 1.0, 2)
        else:
            table = parts.angles(m.head, m.theta, m.context)
            self._turns = [
                g.weight("rope.cos", np.cos(table)),
                g.weight("rope.sin", np.sin(table)),
            ]
        one = g.weight("int_1", np.array(1, np.int64))
        count = g.add("ReduceSum", self.mask, g.ints(1), keepdims=0)
        before = g.add("Sub", count, one)
        total = g.add("Gather", g.add("Shape", self.mask), one)
        self._lengths = [g.add("Cast", n, to=TensorProto.INT32) for n in (before, total)]

    def _add_norm(self, y: str, x: str, name: str) -> list[str]:
        """Return norm(x + y) and x + y."""
        outs = [f"{name}.out", "", "", f"{name}.sum"]
        weight = self.norm_weight(name)
        found = self.g.add_many(
            "SkipSimplifiedLayerNormalization", y, x, weight, outs=outs, domain=CONTRIB,
            epsilon=self.m.epsilon,
        )  # fmt: skip
        return [found[0], found[3]]

    def _attention(self, x: str, i: int) -> str:
        m, g, name = self.m, self.g, f"{self.layer(i)}.self_attn"
        (past_key, key), (past_value, value) = (self.caches(i, k) for k in ("key", "value"))
        turned = bool(m.sections)
        qkv = self._parts(x, name) if turned or m.head_norm else [self.qkv(x, name), "", ""]
        y, *_ = g.add_many(
            "GroupQueryAttention", *qkv, past_key, past_value, *self._lengths,
            *([] if turned else self._turns), outs=[f"{name}.out", key, value], domain=CONTRIB,
            num_heads=m.heads, kv_num_heads=m.kv_heads, do_rotary=int(not turned),
            rotary_interleaved=0, scale=m.query_scale,
        )  # fmt: skip
        return self.linear(y, f"{name}.o_proj", m.hidden, m.heads * m.head)

    def _parts(self, x: str, name: str) -> list[str]:
        """Return queries, keys and values apart: normed, and turned where there are three axes."""
        m, g = self.m, self.g
        found = []
        for part, y in zip("qkv", self.heads(x, name), strict=True):
            if m.sections and part != "v":
                y = parts.rotate(g, y, self._turns, m.head // 2, f"{name}.turned_{part}")
            found.append(g.add("Reshape", y, g.ints(0, 0, -1)))
        return found

    def _last(self, x: str) -> str:
        """Keep the last ``num_logits_to_keep`` places; 0 keeps all."""
        g = self.g
        count = g.input("num_logits_to_keep", [], TensorProto.INT64)
        start = g.add("Unsqueeze", g.add("Neg", count), g.ints(0))
        return g.add("Slice", x, start, g.ints(LAST), g.ints(1))
