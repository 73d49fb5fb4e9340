"""Which graphs and which manifest each kind of checkpoint becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rkvlmd.models import manifest as manifests

from . import connect, gemma_n_sizes, qwen, text, vision
from .graph import Graph, Precision
from .text import Llama
from .vision import Tower
from .weights import CheckpointError, Weights

VISION_GRAPH = "vision_encoder"
#: Pixels of the smallest and the largest picture where the folder says none (Qwen2-VL).
LEAST, MOST = 56 * 56, 1280 * 28 * 28
Config = dict[str, Any]


@dataclass(frozen=True)
class Wish:
    """What the caller wants of a vision encoder.

    ``size``: width and height in pixels of the only picture that it shall take,
    for towers that could take any.
    """

    precision: Precision
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Eyes:
    """A vision encoder: its graph, and ``fields`` of ``manifest.Encoder``."""

    graph: Graph
    fields: dict[str, Any]


@dataclass(frozen=True)
class Family:
    """``tags``: start, content and end of a picture, as special tokens of the tokenizer.

    ``image_key`` names the configuration's id of the middle one. ``mean`` and
    ``std`` where ``preprocessor_config.json`` has none.
    """

    name: str
    tags: tuple[str, str, str]
    image_keys: tuple[str, ...]
    eyes: Callable[[Config, Config, Llama, Weights, Wish], Eyes] | None
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    marker: str = ""


def decoder(config: Config, weights: Weights) -> Llama:
    """Read the decoder's sizes: from ``text_config``, or the file itself (older folders).

    Raises:
      CheckpointError: for decoders that are not known.

    """
    tree = config.get("text_config") or config
    if "rope_theta" not in tree and "rope_theta" in config:
        tree = {"rope_theta": config["rope_theta"]} | tree
    known = gemma_n_sizes.read(tree) if _layered(tree) else text.sizes(tree)
    found = text.placed(known, weights)
    deep = config.get("vision_config", {}).get("deepstack_visual_indexes")
    if config.get("model_type") == "qwen3_vl" and deep:
        return text.deep(found, len(deep))
    return found


def _layered(tree: Config) -> bool:
    return tree.get("model_type") in gemma_n_sizes.KINDS


def _fixed(t: Tower, tokens: int, embedding: int, resize: manifests.Resize) -> Config:
    return {
        "width": t.side, "height": t.side, "tokens": tokens, "embedding": embedding,
        "resize": resize,
    }  # fmt: skip


def _smolvlm(config: Config, picture: Config, m: Llama, weights: Weights, wish: Wish) -> Eyes:
    roots = ("model.vision_model",)
    v = {"intermediate_size": 3072} | config.get("vision_config", {})
    t = vision.sizes(v, roots, vision.SIGLIP, weights)
    scale = int(config.get("scale_factor", 2))
    g = Graph(VISION_GRAPH, wish.precision)
    x = connect.smolvlm(g, vision.build(g, t, weights), t, weights, scale, m.hidden)
    tokens = (t.across // scale) ** 2
    connect.finish(g, x, tokens, m.hidden)
    longest = int((picture.get("size") or {}).get("longest_edge", 0))
    splits = bool(picture.get("do_image_splitting")) and longest > t.side
    resize = manifests.Resize(
        rule="split" if splits else "stretch",
        resample=resample(picture, 1),
        antialias=True,
        longest=longest if splits else 0,
    )
    return Eyes(g, _fixed(t, tokens, m.hidden, resize))


def _llava(config: Config, picture: Config, m: Llama, weights: Weights, wish: Wish) -> Eyes:
    roots = ("vision_tower.vision_model", "vision_tower", "model.vision_tower")
    v = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5} | config.get("vision_config", {})
    t = vision.sizes(v, roots, vision.CLIP, weights)
    t = vision.until(t, connect.level({"vision_feature_layer": -2} | config))
    g = Graph(VISION_GRAPH, wish.precision)
    root = connect.first(weights, connect.PROJECTORS, "linear_1.weight")
    act = str(config.get("projector_hidden_act", "gelu"))
    x = connect.two(g, vision.build(g, t, weights), root, weights, (t.hidden, m.hidden), act)
    connect.finish(g, x, t.across**2, m.hidden)
    resize = manifests.Resize(rule="crop", resample=resample(picture, 3))
    return Eyes(g, _fixed(t, t.across**2, m.hidden, resize))


def _internvl(config: Config, picture: Config, m: Llama, weights: Weights, wish: Wish) -> Eyes:
    roots = ("vision_tower", "model.vision_tower")
    v = {"hidden_act": "gelu"} | config.get("vision_config", {})
    t = vision.sizes(v, roots, vision.INTERN, weights)
    t = vision.until(t, connect.level(config))
    scale = round(1 / float(config.get("downsample_ratio", 0.5)))
    g = Graph(VISION_GRAPH, wish.precision)
    act = str(config.get("projector_hidden_act", "gelu"))
    x = connect.internvl(g, vision.build(g, t, weights), t, weights, scale, m.hidden, act)
    tokens = (t.across // scale) ** 2
    connect.finish(g, x, tokens, m.hidden)
    # The processor cuts, whatever preprocessor_config.json says of crop_to_patches.
    resize = manifests.Resize(
        rule="tiles",
        resample=resample(picture, 3),
        min_tiles=int(picture.get("min_patches", 1)),
        max_tiles=int(picture.get("max_patches", 12)),
        thumbnail=True,
    )
    return Eyes(g, _fixed(t, tokens, m.hidden, resize))


#: What Janus' configuration may leave out (transformers, ``JanusVisionConfig``).
JANUS = {
    "hidden_act": "gelu", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 384, "patch_size": 16,
}  # fmt: skip


def _janus(config: Config, picture: Config, m: Llama, weights: Weights, wish: Wish) -> Eyes:
    v = JANUS | config.get("vision_config", {})
    roots = ("model.vision_model", "vision_model")
    t = vision.sizes(v, roots, vision.JANUS, weights)
    g = Graph(VISION_GRAPH, wish.precision)
    depth = int(v.get("depth", 2))
    x = connect.janus(g, vision.build(g, t, weights), t, weights, depth, m.hidden)
    connect.finish(g, x, t.across**2, m.hidden)
    fill = tuple(int(c) for c in picture.get("background_color", (127, 127, 127)))
    resize = manifests.Resize(rule="pad", resample=resample(picture, 3), fill=fill)  # type: ignore[arg-type]
    return Eyes(g, _fixed(t, t.across**2, m.hidden, resize))


def _gemma3(config: Config, picture: Config, m: Llama, weights: Weights, wish: Wish) -> Eyes:
    roots = ("vision_tower.vision_model", "vision_tower", "model.vision_tower")
    t = vision.sizes(config.get("vision_config", {}), roots, vision.SIGLIP, weights)
    tokens = int(config.get("mm_tokens_per_image", 256))
    g = Graph(VISION_GRAPH, wish.precision)
    x = connect.gemma(g, vision.build(g, t, weights), t, weights, tokens, m.hidden)
    connect.finish(g, x, tokens, m.hidden)
    resize = manifests.Resize(rule="stretch", resample=resample(picture, 2))
    return Eyes(g, _fixed(t, tokens, m.hidden, resize))


def _qwen(config: Config, picture: Config, m: Llama, weights: Weights, wish: Wish) -> Eyes:
    t = qwen.sizes(config, weights, m.hidden)
    qwen.check(t)
    unit = t.patch * t.merge
    outputs = 1 + len(t.deepstack)
    if wish.size is not None:
        width, height = wish.size
        if width % unit or height % unit:
            raise CheckpointError(f"--size: both sides must be multiples of {unit}")
        tokens = width * height // unit**2
        resize = manifests.Resize(rule="pad", resample=resample(picture, 3))
        fields = {"width": width, "height": height, "tokens": tokens, "embedding": m.hidden,
                  "outputs": outputs, "resize": resize}  # fmt: skip
        return Eyes(qwen.build(t, weights, wish.precision, wish.size), fields)
    size = picture.get("size") or {}
    least = int(picture.get("min_pixels") or size.get("shortest_edge") or LEAST)
    most = int(picture.get("max_pixels") or size.get("longest_edge") or MOST)
    # Within a context that a decoder has, and never less than one row.
    least, most = max(least, unit * unit), max(most, unit * unit)
    tokens = max(1, min(most // unit**2, m.context // 2))
    most = min(most, tokens * unit**2)
    side = max(1, int(tokens**0.5))
    fields = {
        "width": unit * max(1, tokens // side),
        "height": unit * side,
        "tokens": tokens,
        "embedding": m.hidden,
        "outputs": outputs,
        "patches": manifests.Patches(size=t.patch, temporal=t.temporal, merge=t.merge),
        "resize": manifests.Resize(
            rule="aspect",
            resample=resample(picture, 3),
            multiple=unit,
            min_pixels=min(least, most),
            max_pixels=most,
        ),
    }
    return Eyes(qwen.build(t, weights, wish.precision), fields)


def resample(picture: Config, default: int) -> Any:
    """Return the manifest's word for PIL's number of a resampling filter."""
    number = picture.get("resample", default)
    if number not in RESAMPLE:
        raise CheckpointError(f"preprocessor_config.json: resample {number} is not known")
    return RESAMPLE[number]


#: PIL's numbers of resampling filters, as ``preprocessor_config.json`` has them.
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
#: What CLIP's preprocessor has where a folder says nothing.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
#: What InternVL's preprocessor has.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_IDEFICS = ("<fake_token_around_image><global-img>", "<image>", "<fake_token_around_image>")
_QWEN = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
#: The published templates write the tags too.
_QWEN_MARKER = "".join(_QWEN)
_IMAGE = ("image_token_id",)

#: Every kind that is exported, by ``model_type`` of ``config.json``.
FAMILIES = {
    "smolvlm": Family("smolvlm", _IDEFICS, _IMAGE, _smolvlm),
    "idefics3": Family("idefics3", _IDEFICS, _IMAGE, _smolvlm),
    "llava": Family(
        "llava", ("", "<image>", ""), ("image_token_index", "image_token_id"), _llava,
        CLIP_MEAN, CLIP_STD,
    ),
    "internvl": Family(
        "internvl", ("<img>", "<IMG_CONTEXT>", "</img>"), _IMAGE, _internvl,
        IMAGENET_MEAN, IMAGENET_STD,
    ),
    "janus": Family(
        "janus", ("<begin_of_image>", "<image_placeholder>", "<end_of_image>"), _IMAGE, _janus
    ),
    "gemma3": Family(
        "gemma3", ("\n\n<start_of_image>", "<image_soft_token>", "<end_of_image>\n\n"),
        ("image_token_index", "image_token_id"), _gemma3, marker="<start_of_image>",
    ),
    "qwen2_vl": Family("qwen2_vl", _QWEN, _IMAGE, _qwen, CLIP_MEAN, CLIP_STD, marker=_QWEN_MARKER),
    "qwen2_5_vl": Family("qwen2_5_vl", _QWEN, _IMAGE, _qwen, CLIP_MEAN, CLIP_STD, marker=_QWEN_MARKER),
    "qwen3_vl": Family("qwen3_vl", _QWEN, _IMAGE, _qwen, marker=_QWEN_MARKER),
    "qwen3_5": Family("qwen3_5", _QWEN, _IMAGE, _qwen, marker=_QWEN_MARKER),
    "qwen3": Family("qwen3", ("", "", ""), (), None),
    **{
        kind: Family(kind.removesuffix("_text"), ("", "", ""), (), None)
        for kind in ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text")
    },
}  # fmt: skip
