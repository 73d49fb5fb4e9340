"""What stands between a vision tower and the decoder, one function a family."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import parts, vision
from .graph import Graph
from .vision import Tower
from .weights import CheckpointError, Weights

OUT = "image_features"


def finish(g: Graph, x: str, tokens: int, embedding: int) -> Graph:
    """Declare the rows of a picture, (pictures, tokens, embedding), and return the graph."""
    if x != OUT:
        g.add("Identity", x, out=OUT)
    g.output(OUT, ["num_images", tokens, embedding])
    return g


def shuffle(g: Graph, x: str, across: int, scale: int, hidden: int) -> str:
    """Join scale x scale neighbouring patches into one row."""
    small = across // scale
    x = g.add("Reshape", x, g.ints(-1, small, scale, small, scale * hidden))
    x = g.add("Transpose", x, perm=[0, 1, 3, 2, 4])
    return g.add("Reshape", x, g.ints(-1, small**2, scale * scale * hidden))


def smolvlm(g: Graph, x: str, t: Tower, weights: Weights, scale: int, embedding: int) -> str:
    """Idefics3, SmolVLM: neighbours joined, one product."""
    if t.across % scale:
        raise CheckpointError("vision_config: patches and scale_factor do not divide image_size")
    x = shuffle(g, x, t.across, scale, t.hidden)
    name = "model.connector.modality_projection.proj"
    return vision.linear(g, weights, name, x, (embedding, t.hidden * scale**2), out=OUT)


def internvl(
    g: Graph, x: str, t: Tower, weights: Weights, scale: int, embedding: int, act: str
) -> str:
    """InternVL: neighbours joined, normed, two products."""
    if t.across % scale:
        raise CheckpointError("downsample_ratio: does not divide the patches")
    root, size = first(weights, PROJECTORS, "layer_norm.weight"), t.hidden * scale**2
    x = shuffle(g, x, t.across, scale, t.hidden)
    # The norm has torch's own epsilon.
    x = vision.norm(g, weights, f"{root}.layer_norm", x, size, 1e-5)
    return two(g, x, root, weights, (size, embedding), act)


def two(
    g: Graph, x: str, root: str, weights: Weights, shape: tuple[int, int], act: str
) -> str:  # fmt: skip
    """LLaVA: two products with an activation between; ``shape`` is (input, output)."""
    size, embedding = shape
    x = vision.linear(g, weights, f"{root}.linear_1", x, (embedding, size))
    x = parts.activate(g, x, act)
    return vision.linear(g, weights, f"{root}.linear_2", x, (embedding, embedding), out=OUT)


def janus(g: Graph, x: str, t: Tower, weights: Weights, depth: int, embedding: int) -> str:
    """Janus: ``depth`` products with activations between."""
    root = first(weights, ("model.aligner", "aligner"), "fc1.weight")
    x = vision.linear(g, weights, f"{root}.fc1", x, (embedding, t.hidden))
    for i in range(depth - 1):
        x = parts.activate(g, x, t.activation)
        x = vision.linear(g, weights, f"{root}.hidden_layers.{i}", x, (embedding, embedding))
    return x


def gemma(g: Graph, x: str, t: Tower, weights: Weights, tokens: int, embedding: int) -> str:
    """Gemma 3: squares of patches averaged, normed, one product."""
    side = round(tokens**0.5)
    if side**2 != tokens or t.across % side:
        raise CheckpointError("mm_tokens_per_image: does not divide the patches")
    size = t.across // side
    x = g.add("Reshape", x, g.ints(-1, side, size, side, size * t.hidden))
    x = g.add("Transpose", x, perm=[0, 1, 3, 2, 4])
    x = g.add("Reshape", x, g.ints(-1, tokens, size * size, t.hidden))
    x = g.add("ReduceMean", x, axes=[2], keepdims=0)
    root = first(weights, PROJECTORS, "mm_input_projection_weight")
    scale = weights.get(f"{root}.mm_soft_emb_norm.weight", (t.hidden,)) + np.float32(1.0)
    x = parts.rms_norm(g, x, g.weight("mm_soft_emb_norm", scale), t.epsilon)
    matrix = weights.get(f"{root}.mm_input_projection_weight", (t.hidden, embedding))
    return g.linear(x, "mm_input_projection", np.ascontiguousarray(matrix.T), out=OUT)


#: Prefixes of a projector's weights in checkpoints old and new.
PROJECTORS = ("multi_modal_projector", "model.multi_modal_projector")


def first(weights: Weights, roots: tuple[str, ...], name: str) -> str:
    """Return the prefix that the checkpoint has."""
    for root in roots:
        if f"{root}.{name}" in weights:
            return root
    raise CheckpointError(f"the weights have no {name}")


def level(config: dict[str, Any]) -> int:
    """Return which hidden state of the tower is used."""
    layer = config.get("vision_feature_layer", -1)
    if not isinstance(layer, int):
        raise CheckpointError("vision_feature_layer: several are not known")
    if config.get("vision_feature_select_strategy", "default") != "default":
        raise CheckpointError("vision_feature_select_strategy: only default is known")
    return layer
