"""Vision transformers of one picture size (SigLIP, CLIP, InternViT) as ONNX graphs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import parts
from .graph import Graph
from .weights import CheckpointError, Weights

#: Activations that a tower may have.
ACTIVATIONS = {"gelu", "gelu_pytorch_tanh", "quick_gelu"}


@dataclass(frozen=True)
class Names:
    """How a tower calls its weights, after the root."""

    layer: str = "encoder.layers"
    first_norm: str = "layer_norm1"
    second_norm: str = "layer_norm2"
    attention: str = "self_attn"
    out: str = "out_proj"
    patch: str = "embeddings.patch_embedding"
    positions: str = "embeddings.position_embedding.weight"
    single: str = ""
    before: str = ""
    after: str = "post_layernorm"


SIGLIP = Names()
CLIP = Names(single="embeddings.class_embedding", before="pre_layrnorm", after="")
JANUS = Names(out="projection_layer")
INTERN = Names(
    layer="encoder.layer",
    first_norm="layernorm_before",
    second_norm="layernorm_after",
    attention="attention",
    out="projection_layer",
    patch="embeddings.patch_embeddings.projection",
    positions="embeddings.position_embeddings",
    single="embeddings.cls_token",
    after="",
)


@dataclass(frozen=True)
class Tower:
    """Sizes of a tower. ``keep``: how many of its layers are computed."""

    root: str
    names: Names
    side: int
    patch: int
    hidden: int
    inner: int
    layers: int
    heads: int
    epsilon: float
    activation: str
    keep: int

    @property
    def across(self) -> int:
        """Patches in a row and in a column."""
        return self.side // self.patch

    @property
    def count(self) -> int:
        """Patches, and the one token that stands for the whole picture."""
        return self.across**2 + bool(self.names.single)


def sizes(vision: dict[str, Any], roots: tuple[str, ...], names: Names, weights: Weights) -> Tower:
    """Read a tower's sizes from its configuration; ``roots`` are prefixes of old and new files."""
    defaults: dict[str, Any] = {
        "hidden_act": "gelu_pytorch_tanh", "image_size": 224, "patch_size": 32,
        "hidden_size": 1152, "num_hidden_layers": 12, "num_attention_heads": 16,
        "layer_norm_eps": 1e-6,
    }  # fmt: skip
    found = defaults | {k: v for k, v in vision.items() if v is not None}
    if found["hidden_act"] not in ACTIVATIONS:
        raise CheckpointError(f"vision_config.hidden_act: {found['hidden_act']} is not known")
    for key in ("use_qk_norm", "use_mask_token"):
        if found.get(key):
            raise CheckpointError(f"vision_config.{key} is not known")
    if found.get("norm_type", "layer_norm") != "layer_norm":
        raise CheckpointError(f"vision_config.norm_type: {found['norm_type']} is not known")
    hidden = int(found["hidden_size"])
    inner = found.get("intermediate_size", hidden * found.get("mlp_ratio", 4.0))
    root = next((r for r in roots if f"{r}.{names.positions}" in weights), roots[0])
    tower = Tower(
        root=root,
        names=names,
        side=_square(found["image_size"], "image_size"),
        patch=_square(found["patch_size"], "patch_size"),
        hidden=hidden,
        inner=int(inner),
        layers=int(found["num_hidden_layers"]),
        heads=int(found["num_attention_heads"]),
        epsilon=float(found["layer_norm_eps"]),
        activation=str(found["hidden_act"]),
        keep=int(found["num_hidden_layers"]),
    )
    if tower.side % tower.patch:
        raise CheckpointError("vision_config: patches do not divide image_size")
    return tower


def until(tower: Tower, layer: int) -> Tower:
    """Return the tower up to a hidden state, counted as transformers does: -1 is the last."""
    keep = layer if layer >= 0 else tower.layers + 1 + layer
    if not 0 < keep <= tower.layers:
        raise CheckpointError(f"vision_feature_layer: there is no {layer}")
    return replace(tower, keep=keep)


def build(g: Graph, t: Tower, weights: Weights, *, whole: bool = False) -> str:
    """Add ``pixel_values`` (pictures, 3, side, side) and the tower.

    Returns the hidden states of the patches, (pictures, across x across,
    hidden), without the token that stands for the whole picture; or that token
    alone, (pictures, hidden), with ``whole``.
    """
    x = g.input("pixel_values", ["num_images", 3, t.side, t.side])
    x = _patches(g, t, weights, x)
    if t.names.before:
        x = _norm(g, t, weights, f"{t.root}.{t.names.before}", x)
    for i in range(t.keep):
        x = _layer(g, t, weights, f"{t.root}.{t.names.layer}.{i}", x)
    if whole:
        x = g.add("Gather", x, g.weight("first", np.array(0, np.int64)), axis=1)
    if t.names.after and t.keep == t.layers:
        x = _norm(g, t, weights, f"{t.root}.{t.names.after}", x)
    if t.names.single and not whole:
        x = g.add("Slice", x, g.ints(1), g.ints(t.count), g.ints(1))
    return x


def _patches(g: Graph, t: Tower, weights: Weights, x: str) -> str:
    # A convolution whose step is its size is a product with the flattened patches.
    name, across = f"{t.root}.{t.names.patch}", t.across
    x = g.add("Reshape", x, g.ints(-1, 3, across, t.patch, across, t.patch))
    x = g.add("Transpose", x, perm=[0, 2, 4, 1, 3, 5])
    size = 3 * t.patch**2
    x = g.add("Reshape", x, g.ints(-1, across**2, size))
    kernel = weights.get(f"{name}.weight", (t.hidden, 3, t.patch, t.patch))
    bias = weights.get(f"{name}.bias", (t.hidden,)) if f"{name}.bias" in weights else None
    x = g.linear(x, name, kernel.reshape(t.hidden, size), bias)
    places = weights.get(f"{t.root}.{t.names.positions}").reshape(1, -1, t.hidden)
    if places.shape[1] != t.count:
        raise CheckpointError(f"{t.names.positions} has {places.shape[1]} rows, not {t.count}")
    if not t.names.single:
        return g.add("Add", x, g.weight("positions", places))
    # The first row is the same for every picture; the others are added to the patches.
    single = weights.get(f"{t.root}.{t.names.single}").reshape(1, 1, t.hidden) + places[:, :1]
    x = g.add("Add", x, g.weight("positions", places[:, 1:]))
    first = g.add("Slice", x, g.ints(0), g.ints(1), g.ints(1))
    first = g.add("Mul", first, g.scalar(0.0))
    first = g.add("Add", first, g.weight("single", single))
    return g.add("Concat", first, x, axis=1)


def _layer(g: Graph, t: Tower, weights: Weights, name: str, x: str) -> str:
    y = _norm(g, t, weights, f"{name}.{t.names.first_norm}", x)
    y = _attention(g, t, weights, f"{name}.{t.names.attention}", y)
    x = g.add("Add", x, _scaled(g, weights, f"{name}.lambda_1", y))
    y = _norm(g, t, weights, f"{name}.{t.names.second_norm}", x)
    y = linear(g, weights, f"{name}.mlp.fc1", y, (t.inner, t.hidden))
    y = parts.activate(g, y, t.activation)
    y = linear(g, weights, f"{name}.mlp.fc2", y, (t.hidden, t.inner))
    return g.add("Add", x, _scaled(g, weights, f"{name}.lambda_2", y))


def _scaled(g: Graph, weights: Weights, name: str, x: str) -> str:
    return g.add("Mul", x, g.weight(name, weights.get(name))) if name in weights else x


def _attention(g: Graph, t: Tower, weights: Weights, name: str, x: str) -> str:
    head = t.hidden // t.heads
    x = attention_input(g, weights, [f"{name}.{p}_proj" for p in "qkv"], x, t.hidden, head)
    x = g.add("Reshape", x, g.ints(-1, t.count, 3, t.heads, head))
    x = g.add("Transpose", x, perm=[2, 0, 3, 1, 4])
    q, k, value = (
        g.add("Gather", x, g.weight(f"index_{i}", np.array(i, np.int64)), axis=0) for i in range(3)
    )
    k = g.add("Transpose", k, perm=[0, 1, 3, 2])
    share = g.add("Softmax", g.add("MatMul", q, k), axis=-1)
    x = g.add("Transpose", g.add("MatMul", share, value), perm=[0, 2, 1, 3])
    x = g.add("Reshape", x, g.ints(-1, t.count, t.hidden))
    return linear(g, weights, f"{name}.{t.names.out}", x, (t.hidden, t.hidden))


def attention_input(
    g: Graph, weights: Weights, names: list[str], x: str, hidden: int, head: int
) -> str:
    """Add queries (scaled), keys and values as one product, with biases where there are any."""
    matrix = [weights.get(f"{name}.weight", (hidden, hidden)) for name in names]
    matrix[0] = matrix[0] * head**-0.5
    bias = None
    if f"{names[0]}.bias" in weights:
        each = [weights.get(f"{name}.bias", (hidden,)) for name in names]
        each[0] = each[0] * head**-0.5
        bias = np.concatenate(each)
    return g.linear(x, f"{names[0]}.qkv", np.concatenate(matrix), bias)


def _norm(g: Graph, t: Tower, weights: Weights, name: str, x: str) -> str:
    return norm(g, weights, name, x, t.hidden, t.epsilon)


def norm(g: Graph, weights: Weights, name: str, x: str, size: int, epsilon: float) -> str:
    """Add a layer norm."""
    scale, bias = (
        g.weight(f"{name}.{part}", weights.get(f"{name}.{part}", (size,)))
        for part in ("weight", "bias")
    )
    return g.add("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)


def linear(
    g: Graph, weights: Weights, name: str, x: str, shape: tuple[int, int], *, out: str = ""
) -> str:
    """Add a product with a checkpoint's weights, and its bias where it has one."""
    bias = weights.get(f"{name}.bias", (shape[0],)) if f"{name}.bias" in weights else None
    return g.linear(x, name, weights.get(f"{name}.weight", shape), bias, out=out)


def _square(size: Any, key: str) -> int:
    sides = {int(s) for s in size} if isinstance(size, list) else {int(size)}
    if len(sides) != 1:
        raise CheckpointError(f"vision_config.{key}: only squares are known")
    return sides.pop()
