"""CLIP: a text tower and a vision tower with their projections, as two ONNX graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from onnx import TensorProto

from rkvlmd.models import manifest as manifests
from rkvlmd.models import published

from . import parts, vision
from .graph import Graph, Precision
from .vision import Tower
from .weights import CheckpointError, Weights

KIND = "clip"
TEXT, VISION = "text_model.onnx", "vision_model.onnx"
#: What a configuration may leave out (transformers, ``CLIPTextConfig`` and ``CLIPVisionConfig``).
TEXT_SIZES = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 8, "max_position_embeddings": 77, "vocab_size": 49408,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 49407,
}  # fmt: skip
VISION_SIZES = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
#: The id with which the first checkpoints call the end of text; it is the largest of their ids.
_OLD_END = 2
#: What is added to the scores of places that come later.
_NEVER = np.float32(-1e9)


def towers(config: dict[str, Any], weights: Weights, precision: Precision) -> dict[str, Graph]:
    """Return the two graphs by file name.

    The text tower takes ``input_ids`` (batch, places) and gives ``text_embeds``
    (batch, projection), the vision tower ``pixel_values`` (pictures, 3, side,
    side) and ``image_embeds`` (pictures, projection).

    Raises:
      CheckpointError: weights are missing or of another kind.

    """
    size = int(config.get("projection_dim", 512))
    return {
        TEXT: _text(TEXT_SIZES | config.get("text_config", {}), size, weights, precision),
        VISION: _vision(VISION_SIZES | config.get("vision_config", {}), size, weights, precision),
    }


def described(config: dict[str, Any], picture: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest's keys for these towers, less files, name and tokenizer."""
    text = TEXT_SIZES | config.get("text_config", {})
    size, context = int(config.get("projection_dim", 512)), int(text["max_position_embeddings"])
    said = published.encoder(KIND, config, picture, context)
    resize = {"rule": "crop"} | said.pop("resize", {})
    return {
        "family": KIND,
        "encoder": {**said, "embedding": size, "resize": resize},
        "decoder": {"engine": "tower", "context": context, "embedding": size},
        "embeddings": {"inputs": ["text", "image"], "pictures": "rows", "trained": True},
        "capabilities": ["image", "embeddings"],
    }


def manifest(
    name: str,
    description: str,
    about: dict[str, Any],
    files: dict[str, dict[str, str]],
    data: dict[str, list[dict[str, str]]],
    special: list[str],
) -> manifests.Manifest:
    """Return the manifest.

    ``files`` are those of the folder with their hashes, by name; ``data`` the
    files with weights that lie outside a graph, by the graph's.
    """
    text = {"text": files[TEXT]} | {f"text_data{i}": f for i, f in enumerate(data[TEXT])}
    eyes = {"engine": "onnx", **files[VISION], "data": data[VISION], **about["encoder"]}
    return manifests.from_builtins({
        "schema": 1,
        "name": name,
        "family": about["family"],
        "description": description,
        "encoders": [eyes],
        "decoder": {**about["decoder"], "files": text},
        "tokenizer": files["tokenizer.json"],
        "embeddings": about["embeddings"],
        "capabilities": about["capabilities"],
        "special_strings": special,
    })  # fmt: skip


def _text(t: dict[str, Any], size: int, weights: Weights, precision: Precision) -> Graph:
    hidden, heads, places = (
        int(t[k]) for k in ("hidden_size", "num_attention_heads", "max_position_embeddings")
    )
    if t["hidden_act"] not in vision.ACTIVATIONS:
        raise CheckpointError(f"text_config.hidden_act: {t['hidden_act']} is not known")
    g, root = Graph("text_model", precision), "text_model"
    ids = g.input("input_ids", ["batch", "places"], TensorProto.INT64)
    table = weights.get(f"{root}.embeddings.token_embedding.weight", (int(t["vocab_size"]), hidden))
    x = g.table(ids, "token_embedding", table, out="tokens")
    count = g.add("Slice", g.add("Shape", ids), g.ints(1), g.ints(2))
    where = weights.get(f"{root}.embeddings.position_embedding.weight", (places, hidden))
    kept = g.add("Slice", g.weight("positions", where), g.ints(0), count, g.ints(0))
    x = g.add("Add", x, kept)
    later = np.triu(np.full((places, places), _NEVER, np.float32), 1)
    both = g.add("Concat", count, count, axis=0)
    mask = g.add("Slice", g.weight("later", later), g.ints(0, 0), both, g.ints(0, 1))
    epsilon = float(t["layer_norm_eps"])
    for i in range(int(t["num_hidden_layers"])):
        layer = f"{root}.encoder.layers.{i}"
        y = vision.norm(g, weights, f"{layer}.layer_norm1", x, hidden, epsilon)
        x = g.add("Add", x, _attention(g, weights, f"{layer}.self_attn", y, mask, hidden, heads))
        y = vision.norm(g, weights, f"{layer}.layer_norm2", x, hidden, epsilon)
        inner = int(t["intermediate_size"])
        y = vision.linear(g, weights, f"{layer}.mlp.fc1", y, (inner, hidden))
        y = parts.activate(g, y, str(t["hidden_act"]))
        x = g.add("Add", x, vision.linear(g, weights, f"{layer}.mlp.fc2", y, (hidden, inner)))
    x = vision.norm(g, weights, f"{root}.final_layer_norm", x, hidden, epsilon)
    x = g.add("GatherND", x, _end(g, ids, int(t["eos_token_id"])), batch_dims=1)
    vision.linear(g, weights, "text_projection", x, (size, hidden), out="text_embeds")
    g.output("text_embeds", ["batch", size])
    return g


def _end(g: Graph, ids: str, end: int) -> str:
    """Return the place of the end of text, (batch, 1)."""
    values = ids
    if end != _OLD_END:
        values = g.add("Equal", ids, g.weight("end", np.array(end, np.int64)))
    values = g.add("Cast", values, to=TensorProto.INT32)
    return g.add("ArgMax", values, axis=1, keepdims=1)


def _attention(
    g: Graph, weights: Weights, name: str, x: str, mask: str, hidden: int, heads: int
) -> str:
    head = hidden // heads
    names = [f"{name}.{p}_proj" for p in "qkv"]
    x = vision.attention_input(g, weights, names, x, hidden, head)
    x = g.add("Reshape", x, g.ints(0, 0, 3, heads, head))
    x = g.add("Transpose", x, perm=[2, 0, 3, 1, 4])
    q, k, value = (
        g.add("Gather", x, g.weight(f"index_{i}", np.array(i, np.int64)), axis=0) for i in range(3)
    )
    scores = g.add("MatMul", q, g.add("Transpose", k, perm=[0, 1, 3, 2]))
    share = g.add("Softmax", g.add("Add", scores, mask), axis=-1)
    x = g.add("Transpose", g.add("MatMul", share, value), perm=[0, 2, 1, 3])
    x = g.add("Reshape", x, g.ints(0, 0, hidden))
    return vision.linear(g, weights, f"{name}.out_proj", x, (hidden, hidden))


def _vision(v: dict[str, Any], size: int, weights: Weights, precision: Precision) -> Graph:
    t: Tower = vision.sizes(v, ("vision_model",), vision.CLIP, weights)
    g = Graph("vision_model", precision)
    t = replace(t, names=replace(t.names, after="post_layernorm"))
    x = vision.build(g, t, weights, whole=True)
    vision.linear(g, weights, "visual_projection", x, (size, t.hidden), out="image_embeds")
    g.output("image_embeds", ["num_images", size])
    return g
