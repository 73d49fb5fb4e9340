"""The vision encoder of SmolVLM (SigLIP and pixel shuffle) as an ONNX graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .graph import Graph, Precision
from .weights import CheckpointError, Weights

ROOT = "model.vision_model"


@dataclass(frozen=True)
class Vision:
    """Sizes of a vision tower and its connector; ``embedding`` is the decoder's."""

    side: int
    patch: int
    hidden: int
    inner: int
    layers: int
    heads: int
    epsilon: float
    scale: int
    embedding: int

    @property
    def tokens(self) -> int:
        """Rows that one picture becomes."""
        return (self.side // self.patch // self.scale) ** 2


def sizes(config: dict[str, Any]) -> Vision:
    """Read the sizes from a SmolVLM ``config.json``, with the defaults of transformers."""
    vision: dict[str, Any] = config.get("vision_config", {})
    if vision.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise CheckpointError("vision_config.hidden_act: only gelu_pytorch_tanh is known")
    found = Vision(
        side=int(vision.get("image_size", 224)),
        patch=int(vision.get("patch_size", 32)),
        hidden=int(vision.get("hidden_size", 1152)),
        inner=int(vision.get("intermediate_size", 3072)),
        layers=int(vision.get("num_hidden_layers", 12)),
        heads=int(vision.get("num_attention_heads", 16)),
        epsilon=float(vision.get("layer_norm_eps", 1e-6)),
        scale=int(config.get("scale_factor", 2)),
        embedding=int(config["text_config"]["hidden_size"]),
    )
    if found.side % (found.patch * found.scale):
        raise CheckpointError("vision_config: patches and scale_factor do not divide image_size")
    return found


def build(v: Vision, weights: Weights, precision: Precision) -> Graph:
    """Return the graph ``pixel_values`` (pictures, 3, side, side) to ``image_features``."""
    g = Graph("vision_encoder", precision)
    x = g.input("pixel_values", ["num_images", 3, v.side, v.side])
    x = _patches(g, v, weights, x)
    for i in range(v.layers):
        x = _layer(g, v, weights, f"{ROOT}.encoder.layers.{i}", x)
    x = _norm(g, v, weights, f"{ROOT}.post_layernorm", x)
    x = _shuffle(g, v, x)
    name = "model.connector.modality_projection.proj"
    size = v.hidden * v.scale**2
    g.linear(x, name, weights.get(f"{name}.weight", (v.embedding, size)), out="image_features")
    g.output("image_features", ["num_images", v.tokens, v.embedding])
    return g


def _patches(g: Graph, v: Vision, weights: Weights, x: str) -> str:
    # A convolution whose step is its size is a product with the flattened patches.
    name = f"{ROOT}.embeddings.patch_embedding"
    across = v.side // v.patch
    x = g.add("Reshape", x, g.ints(-1, 3, across, v.patch, across, v.patch))
    x = g.add("Transpose", x, perm=[0, 2, 4, 1, 3, 5])
    size = 3 * v.patch**2
    x = g.add("Reshape", x, g.ints(-1, across**2, size))
    kernel = weights.get(f"{name}.weight", (v.hidden, 3, v.patch, v.patch))
    bias = weights.get(f"{name}.bias", (v.hidden,))
    x = g.linear(x, name, kernel.reshape(v.hidden, size), bias)
    places = weights.get(f"{ROOT}.embeddings.position_embedding.weight", (across**2, v.hidden))
    return g.add("Add", x, g.weight("positions", places[None]))


def _layer(g: Graph, v: Vision, weights: Weights, name: str, x: str) -> str:
    y = _norm(g, v, weights, f"{name}.layer_norm1", x)
    y = _attention(g, v, weights, f"{name}.self_attn", y)
    x = g.add("Add", x, y)
    y = _norm(g, v, weights, f"{name}.layer_norm2", x)
    y = _linear(g, weights, f"{name}.mlp.fc1", y, (v.inner, v.hidden))
    y = _gelu(g, y)
    y = _linear(g, weights, f"{name}.mlp.fc2", y, (v.hidden, v.inner))
    return g.add("Add", x, y)


def _attention(g: Graph, v: Vision, weights: Weights, name: str, x: str) -> str:
    head, count = v.hidden // v.heads, (v.side // v.patch) ** 2
    parts = [f"{name}.{p}_proj" for p in "qkv"]
    size = (v.hidden, v.hidden)
    matrix = [weights.get(f"{p}.weight", size) for p in parts]
    bias = [weights.get(f"{p}.bias", (v.hidden,)) for p in parts]
    matrix[0], bias[0] = matrix[0] * head**-0.5, bias[0] * head**-0.5
    x = g.linear(x, f"{name}.qkv", np.concatenate(matrix), np.concatenate(bias))
    x = g.add("Reshape", x, g.ints(-1, count, 3, v.heads, head))
    x = g.add("Transpose", x, perm=[2, 0, 3, 1, 4])
    q, k, value = (
        g.add("Gather", x, g.weight(f"index_{i}", np.array(i, np.int64)), axis=0) for i in range(3)
    )
    k = g.add("Transpose", k, perm=[0, 1, 3, 2])
    share = g.add("Softmax", g.add("MatMul", q, k), axis=-1)
    x = g.add("Transpose", g.add("MatMul", share, value), perm=[0, 2, 1, 3])
    x = g.add("Reshape", x, g.ints(-1, count, v.hidden))
    return _linear(g, weights, f"{name}.out_proj", x, size)


def _shuffle(g: Graph, v: Vision, x: str) -> str:
    """Join scale x scale neighbouring patches into one row."""
    across, s = v.side // v.patch // v.scale, v.scale
    x = g.add("Reshape", x, g.ints(-1, across, s, across, s * v.hidden))
    x = g.add("Transpose", x, perm=[0, 1, 3, 2, 4])
    return g.add("Reshape", x, g.ints(-1, v.tokens, s * s * v.hidden))


def _norm(g: Graph, v: Vision, weights: Weights, name: str, x: str) -> str:
    scale, bias = (
        g.weight(f"{name}.{part}", weights.get(f"{name}.{part}", (v.hidden,)))
        for part in ("weight", "bias")
    )
    return g.add("LayerNormalization", x, scale, bias, axis=-1, epsilon=v.epsilon)


def _linear(g: Graph, weights: Weights, name: str, x: str, shape: tuple[int, int]) -> str:
    bias = weights.get(f"{name}.bias", (shape[0],))
    return g.linear(x, name, weights.get(f"{name}.weight", shape), bias)


def _gelu(g: Graph, x: str) -> str:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), from operators that every tool knows."""
    cube = g.add("Mul", g.add("Mul", x, x), x)
    inner = g.add("Add", x, g.add("Mul", cube, g.scalar(0.044715)))
    tanh = g.add("Tanh", g.add("Mul", inner, g.scalar(0.7978845608028654)))
    return g.add("Mul", g.add("Mul", x, g.scalar(0.5)), g.add("Add", tanh, g.scalar(1.0)))
