"""The Llama decoder (RMS norm, rotary positions, grouped queries, SwiGLU) as ONNX graphs.

``plain`` uses standard operators and caches that grow by concatenation, the
layout of published checkpoints. ``gqa`` has the same inputs and outputs and
computes with ONNX Runtime's fused operators; its caches may be one buffer for
input and output, which its metadata says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from .graph import CONTRIB, Graph, Precision
from .weights import CheckpointError, Weights

Attention = Literal["plain", "gqa"]
#: What the runtime reads in a file whose caches may be shared buffers.
SHARED = {"rkvlmd.kv_cache": "shared"}
LAST = np.iinfo(np.int64).max
#: What a forbidden place gets before the softmax: the lowest float32, as in transformers.
FORBIDDEN = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Llama:
    """Sizes of a decoder; ``root`` is the prefix of its weights' names."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    context: int
    theta: float
    epsilon: float
    root: str = "model.text_model"

    @property
    def kv_bytes_per_token(self) -> int:
        """What one token costs in the float32 cache."""
        return 2 * self.layers * self.kv_heads * self.head * 4


def sizes(text: dict[str, Any], root: str = "model.text_model") -> Llama:
    """Read the sizes from a Llama configuration, with the defaults of transformers."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise CheckpointError("rope: only the default kind of rotary positions is known")
    for key in ("attention_bias", "mlp_bias"):
        if text.get(key):
            raise CheckpointError(f"{key}: a decoder with biases is not known")
    if text.get("hidden_act", "silu") != "silu":
        raise CheckpointError("hidden_act: only silu is known")
    hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
    return Llama(
        hidden=hidden,
        inner=int(text["intermediate_size"]),
        layers=int(text["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(text.get("num_key_value_heads") or heads),
        head=int(text.get("head_dim") or hidden // heads),
        vocabulary=int(text["vocab_size"]),
        context=int(text.get("max_position_embeddings", 2048)),
        theta=float(rope.get("rope_theta", text.get("rope_theta", 10000.0))),
        epsilon=float(text.get("rms_norm_eps", 1e-6)),
        root=root,
    )


def build_embed(m: Llama, weights: Weights, precision: Precision) -> Graph:
    """Return the graph ``input_ids`` to ``inputs_embeds``."""
    g = Graph("embed_tokens", precision)
    ids = g.input("input_ids", ["batch_size", "sequence_length"], TensorProto.INT64)
    g.table(ids, "embed_tokens", _embedding(m, weights), out="inputs_embeds")
    g.output("inputs_embeds", ["batch_size", "sequence_length", m.hidden])
    return g


def build_decoder(m: Llama, weights: Weights, precision: Precision, attention: Attention) -> Graph:
    """Return the graph ``inputs_embeds``, mask and caches to ``logits`` and caches."""
    builder = _Fused(m, weights, precision) if attention == "gqa" else _Plain(m, weights, precision)
    return builder.build()


class _Builder:
    """What both layouts share: names, sizes and the order of things."""

    def __init__(self, m: Llama, weights: Weights, precision: Precision) -> None:
        self.m = m
        self.weights = weights
        self.g = Graph("decoder_model_merged", precision)
        self.x = self.g.input("inputs_embeds", ["batch_size", "sequence_length", m.hidden])
        mask = ["batch_size", "total_sequence_length"]
        self.mask = self.g.input("attention_mask", mask, TensorProto.INT64)

    def caches(self, layer: int, kind: str) -> tuple[str, str]:
        """Declare a cache's input and output."""
        m = self.m
        past, present = f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"
        length = "total_sequence_length"
        self.g.input(past, ["batch_size", m.kv_heads, "past_sequence_length", m.head])
        self.g.output(present, ["batch_size", m.kv_heads, length, m.head])
        return past, present

    def norm_weight(self, name: str) -> str:
        return self.g.weight(name, self.weights.get(f"{name}.weight", (self.m.hidden,)))

    def linear(self, x: str, name: str, outputs: int, inputs: int) -> str:
        return self.g.linear(x, name, self.weights.get(f"{name}.weight", (outputs, inputs)))

    def joined(self, x: str, name: str, sizes: dict[str, int]) -> str:
        """Add several products with the same input as one."""
        parts = [
            self.weights.get(f"{name}.{part}_proj.weight", (size, self.m.hidden))
            for part, size in sizes.items()
        ]
        return self.g.linear(x, f"{name}.{'_'.join(sizes)}", np.concatenate(parts))

    def qkv(self, x: str, name: str) -> str:
        m = self.m
        kv = m.kv_heads * m.head
        return self.joined(x, name, {"q": m.heads * m.head, "k": kv, "v": kv})

    def gate_up(self, x: str, name: str) -> list[str]:
        inner = self.m.inner
        both = self.joined(x, name, {"gate": inner, "up": inner})
        outs = [f"{name}.gate", f"{name}.up"]
        return self.g.add_many("Split", both, self.g.ints(inner, inner), outs=outs, axis=-1)

    def layer(self, i: int) -> str:
        return f"{self.m.root}.layers.{i}"

    def head(self, x: str) -> Graph:
        """Add the logits and return the graph."""
        m, name = self.m, "lm_head.weight"
        rows = self.weights.get(name) if name in self.weights else _embedding(m, self.weights)
        self.g.linear(x, "lm_head", rows, out="logits")
        self.g.output("logits", ["batch_size", "num_logits", m.vocabulary])
        return self.g


class _Plain(_Builder):
    def build(self) -> Graph:
        m, g = self.m, self.g
        self._prepare()
        x = self.x
        for i in range(m.layers):
            y = self._norm(x, f"{self.layer(i)}.input_layernorm")
            x = g.add("Add", x, self._attention(y, i))
            y = self._norm(x, f"{self.layer(i)}.post_attention_layernorm")
            gate, up = self.gate_up(y, f"{self.layer(i)}.mlp")
            y = g.add("Mul", g.add("Mul", gate, g.add("Sigmoid", gate)), up)
            x = g.add("Add", x, self.linear(y, f"{self.layer(i)}.mlp.down_proj", m.hidden, m.inner))
        return self.head(self._norm(x, f"{m.root}.norm"))

    def _prepare(self) -> None:
        """Add what all layers share: rotations, and the mask (batch, 1, 1, new, total)."""
        g = self.g
        places = ["batch_size", "sequence_length"]
        ids = g.input("position_ids", places, TensorProto.INT64)
        tables = rotations(self.m)
        self._cos, self._sin = (
            g.add(
                "Unsqueeze",
                g.add("Gather", g.weight(f"rope.{n}", np.concatenate([t, t], 1)), ids),
                g.ints(1),
            )
            for n, t in zip(("cos", "sin"), tables, strict=True)
        )
        zero, one = (g.weight(f"int_{n}", np.array(n, np.int64)) for n in (0, 1))
        total = g.add("Gather", g.add("Shape", self.mask), one)
        new = g.add("Gather", g.add("Shape", ids), one)
        keys = g.add("Range", zero, total, one)
        queries = g.add("Range", g.add("Sub", total, new), total, one)
        causal = g.add("LessOrEqual", keys, g.add("Unsqueeze", queries, g.ints(1)))
        given = g.add("Cast", self.mask, to=TensorProto.BOOL)
        allowed = g.add("And", g.add("Unsqueeze", given, g.ints(1, 2, 3)), causal)
        self._bias = g.add("Where", allowed, g.scalar(0.0), g.scalar(FORBIDDEN))

    def _norm(self, x: str, name: str) -> str:
        g = self.g
        square = g.add("ReduceMean", g.add("Pow", x, g.scalar(2.0)), axes=[-1], keepdims=1)
        root = g.add("Sqrt", g.add("Add", square, g.scalar(self.m.epsilon)))
        return g.add("Mul", g.add("Div", x, root), self.norm_weight(name))

    def _attention(self, x: str, i: int) -> str:
        m, g, name = self.m, self.g, f"{self.layer(i)}.self_attn"
        split = g.ints(m.heads * m.head, m.kv_heads * m.head, m.kv_heads * m.head)
        outs = [f"{name}.{p}" for p in "qkv"]
        parts = g.add_many("Split", self.qkv(x, name), split, outs=outs, axis=-1)
        q, k, v = (
            g.add("Transpose", g.add("Reshape", p, g.ints(0, 0, n, m.head)), perm=[0, 2, 1, 3])
            for p, n in zip(parts, (m.heads, m.kv_heads, m.kv_heads), strict=True)
        )
        q, k = self._rotate(q, name + ".q"), self._rotate(k, name + ".k")
        joined = []
        for kind, value in (("key", k), ("value", v)):
            past, present = self.caches(i, kind)
            g.add("Concat", past, value, out=present, axis=2)
            joined.append(g.add("Unsqueeze", present, g.ints(2)))
        # Every key head serves heads / kv_heads query heads: a dimension of their own.
        q = g.add("Mul", q, g.scalar(m.head**-0.5))
        q = g.add("Reshape", q, g.ints(0, m.kv_heads, m.heads // m.kv_heads, -1, m.head))
        scores = g.add("MatMul", q, g.add("Transpose", joined[0], perm=[0, 1, 2, 4, 3]))
        share = g.add("Softmax", g.add("Add", scores, self._bias), axis=-1)
        y = g.add("MatMul", share, joined[1])
        y = g.add("Transpose", y, perm=[0, 3, 1, 2, 4])
        y = g.add("Reshape", y, g.ints(0, 0, m.heads * m.head))
        return self.linear(y, f"{name}.o_proj", m.hidden, m.heads * m.head)

    def _rotate(self, x: str, name: str) -> str:
        g, half = self.g, self.m.head // 2
        outs = [f"{name}.low", f"{name}.high"]
        low, high = g.add_many("Split", x, g.ints(half, half), outs=outs, axis=-1)
        turned = g.add("Concat", g.add("Neg", high), low, axis=-1)
        return g.add("Add", g.add("Mul", x, self._cos), g.add("Mul", turned, self._sin))


class _Fused(_Builder):
    def build(self) -> Graph:
        m, g = self.m, self.g
        self._prepare()
        x = self.x
        first = self.norm_weight(f"{self.layer(0)}.input_layernorm")
        y = g.add("SimplifiedLayerNormalization", x, first, axis=-1, epsilon=m.epsilon)
        for i in range(m.layers):
            name = self.layer(i)
            y = self._attention(y, i)
            y, x = self._add_norm(y, x, f"{name}.post_attention_layernorm")
            gate, up = self.gate_up(y, f"{name}.mlp")
            y = g.add("Mul", g.add("QuickGelu", gate, domain=CONTRIB, alpha=1.0), up)
            y = self.linear(y, f"{name}.mlp.down_proj", m.hidden, m.inner)
            last = i + 1 == m.layers
            after = f"{m.root}.norm" if last else f"{self.layer(i + 1)}.input_layernorm"
            y, x = self._add_norm(y, x, after)
        return self.head(self._last(y))

    def _prepare(self) -> None:
        """Add what GroupQueryAttention wants to know about lengths, and its rotations."""
        g = self.g
        cos, sin = rotations(self.m)
        self._tables = [g.weight("rope.cos", cos), g.weight("rope.sin", sin)]
        count = g.add("ReduceSum", self.mask, g.ints(1), keepdims=0)
        before = g.add("Sub", count, g.weight("int_1", np.array(1, np.int64)))
        total = g.add("Gather", g.add("Shape", self.mask), g.weight("int_1", np.array(1, np.int64)))
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
        m, name = self.m, f"{self.layer(i)}.self_attn"
        (past_key, key), (past_value, value) = (self.caches(i, k) for k in ("key", "value"))
        y, *_ = self.g.add_many(
            "GroupQueryAttention", self.qkv(x, name), "", "", past_key, past_value,
            *self._lengths, *self._tables, outs=[f"{name}.out", key, value], domain=CONTRIB,
            num_heads=m.heads, kv_num_heads=m.kv_heads, do_rotary=1, rotary_interleaved=0,
            scale=m.head**-0.5,
        )  # fmt: skip
        return self.linear(y, f"{name}.o_proj", m.hidden, m.heads * m.head)

    def _last(self, x: str) -> str:
        """Keep the last ``num_logits_to_keep`` places; 0 keeps all."""
        g = self.g
        count = g.input("num_logits_to_keep", [], TensorProto.INT64)
        start = g.add("Unsqueeze", g.add("Neg", count), g.ints(0))
        return g.add("Slice", x, start, g.ints(LAST), g.ints(1))


def rotations(m: Llama) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return cosines and sines, float32 of shape (context, head / 2)."""
    # float32 from here on, as transformers computes them.
    powers = np.arange(0, m.head, 2, dtype=np.float32) / np.float32(m.head)
    steps = np.float32(1.0) / np.power(np.float32(m.theta), powers)
    angles = np.arange(m.context, dtype=np.float32)[:, None] * steps[None]
    return np.cos(angles), np.sin(angles)


def _embedding(m: Llama, weights: Weights) -> npt.NDArray[np.float32]:
    return weights.get(f"{m.root}.embed_tokens.weight", (m.vocabulary, m.hidden))
