"""Language decoders as ONNX graphs, in two layouts with the same names.

``plain`` uses standard operators and caches that grow by concatenation, the
layout of published checkpoints. ``gqa`` has the same inputs and outputs and
computes with ONNX Runtime's fused operators; its caches may be one buffer for
input and output, which its metadata says.
"""

from __future__ import annotations

from typing import Literal

from onnx import TensorProto

from . import builder, gemma_n
from .builder import HIDDEN
from .fused import Fused
from .gemma_n_sizes import GemmaN
from .graph import Graph, Precision
from .plain import Plain
from .text import Llama, placed, sizes
from .weights import Weights

__all__ = [
    "HIDDEN",
    "SHARED",
    "Attention",
    "Llama",
    "build_decoder",
    "build_embed",
    "placed",
    "sizes",
]

Attention = Literal["plain", "gqa"]
#: What the runtime reads in a file whose caches may be shared buffers.
SHARED = {"rkvlmd.kv_cache": "shared"}


def build_embed(m: Llama, weights: Weights, precision: Precision) -> Graph:
    """Return the graph ``input_ids`` to ``inputs_embeds``."""
    if isinstance(m, GemmaN):
        return gemma_n.build_embed(m, weights, precision)
    g = Graph("embed_tokens", precision)
    ids = g.input("input_ids", ["batch_size", "sequence_length"], TensorProto.INT64)
    rows = builder.embedding(m, weights)
    out = "rows" if m.gemma else "inputs_embeds"
    found = g.table(ids, "embed_tokens", rows, out=out)
    if m.gemma:
        g.add("Mul", found, g.scalar(float(m.hidden) ** 0.5), out="inputs_embeds")
    g.output("inputs_embeds", ["batch_size", "sequence_length", m.hidden])
    return g


def build_decoder(
    m: Llama,
    weights: Weights,
    precision: Precision,
    attention: Attention,
    *,
    hidden: bool = False,
) -> Graph:
    """Return the graph ``inputs_embeds``, mask and caches to ``logits`` and caches.

    ``hidden``: also an output with the last hidden states, normed.
    """
    if isinstance(m, GemmaN):
        return gemma_n.Layered(m, weights, precision, hidden=hidden).build()
    if attention == "gqa":
        return Fused(m, weights, precision, hidden=hidden).build()
    return Plain(m, weights, precision, hidden=hidden).build()
