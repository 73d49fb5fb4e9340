"""What ``config.json`` and ``preprocessor_config.json`` of a checkpoint say of its pictures; pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

#: PIL's numbers of resampling filters, as ``preprocessor_config.json`` has them.
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
#: Most image tokens of one picture of a model that takes any size, unless its own limit is lower:
#: what Qwen's model cards advise for small memory.
MOST_TOKENS = 1280
#: Most positions a second on a video's time axis; Qwen2.5-VL has 2.
MOST_RATE = 1000
#: Largest side of an encoder input that makes sense, pixels.
_MAX_SIDE = 1 << 14
#: Largest of any number: more than any limit on pixels that is published.
_MAX_NUMBER = 1 << 40
#: Pixels where no file says them (transformers, ``CLIPVisionConfig``).
_CLIP_SIDE = 224

Tree = Mapping[str, Any]


def encoder(family: str, config: Tree, picture: Tree, context: int) -> dict[str, Any]:
    """Return the keys of an encoder that the files say, for this family; others are left out.

    ``context`` (tokens) bounds a picture of a model that takes any size: one
    takes half of it at most.
    """
    made = _common(picture)
    special = _FAMILIES.get(family)
    if special is not None:
        for key, value in special(config, picture, context).items():
            made[key] = made[key] | value if key == "resize" and key in made else value
    return made


def decoder(config: Tree) -> dict[str, Any]:
    """Return the keys of a decoder that the files say."""
    vision = config.get("vision_config")
    deep = vision.get("deepstack_visual_indexes") if isinstance(vision, Mapping) else None
    # Rows of the encoder's layers are added after as many first layers of the decoder.
    return {"deepstack": list(range(len(deep)))} if isinstance(deep, list) and deep else {}


def video(config: Tree, film: Tree) -> dict[str, Any]:
    """Return the numbers of a video that the files say; ``film`` is its processor's.

    The file is ``video_preprocessor_config.json``.
    """
    made: dict[str, Any] = {}
    least = _number(film, "min_pixels") or _number(film, "size", "shortest_edge")
    most = _number(film, "max_pixels") or _number(film, "size", "longest_edge")
    if least and most and least <= most:
        made |= {"min_pixels": least, "max_pixels": most}
    vision = config.get("vision_config")
    rate: Any = vision.get("tokens_per_second") if isinstance(vision, Mapping) else None
    if _is_real(rate) and 0 < rate <= MOST_RATE:
        made["tokens_per_second"] = float(rate)
    return made


def _common(picture: Tree) -> dict[str, Any]:
    """Return normalisation and filter, which are the same for every family."""
    made: dict[str, Any] = {}
    if picture.get("do_normalize", True):
        for key, ours in (("image_mean", "mean"), ("image_std", "std")):
            three = picture.get(key)
            if isinstance(three, list) and len(three) == 3 and all(map(_is_real, three)):
                made[ours] = [float(value) for value in three]
    number = picture.get("resample")
    if type(number) is int and number in RESAMPLE:
        made["resize"] = {"resample": RESAMPLE[number]}
    return made


def _is_real(value: Any) -> bool:
    return type(value) in {int, float} and math.isfinite(value)


def _number(tree: Tree, *keys: str) -> int | None:
    """Return the number at ``keys``, one inside the other; ``None`` if there is none."""
    value: Any = tree
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 < value <= _MAX_NUMBER else None


def _side(*found: int | None) -> int | None:
    return next((side for side in found if side is not None and side <= _MAX_SIDE), None)


def _square(side: int | None, tokens: int | None) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if side is not None:
        made |= {"width": side, "height": side}
    if tokens is not None:
        made["tokens"] = tokens
    return made


def _split(config: Tree, picture: Tree, context: int) -> dict[str, Any]:
    """SmolVLM, Idefics3."""
    size, patch = (_number(config, "vision_config", k) for k in ("image_size", "patch_size"))
    side = _side(_number(picture, "max_image_size", "longest_edge"), size)
    scale = _number(config, "scale_factor")
    tokens = (side // patch // scale) ** 2 if side and patch and scale else None
    longest = _number(picture, "size", "longest_edge")
    if not picture:
        return _square(side, tokens)
    resize: dict[str, Any] = {"rule": "stretch", "longest": 0}
    if picture.get("do_image_splitting", True) and longest and side and longest >= side:
        resize = {"rule": "split", "longest": longest}
    return _square(side, tokens) | {"resize": resize}


def _aspect(config: Tree, picture: Tree, context: int) -> dict[str, Any]:
    """The Qwen models that see pictures."""
    patch = _number(picture, "patch_size") or _number(config, "vision_config", "patch_size")
    merge = _number(picture, "merge_size") or _number(config, "vision_config", "spatial_merge_size")
    temporal = _number(picture, "temporal_patch_size") or _number(
        config, "vision_config", "temporal_patch_size"
    )
    if not (patch and merge and temporal):
        return {}
    unit = patch * merge
    if unit > _MAX_SIDE or temporal > _MAX_SIDE:
        return {}
    least = _number(picture, "min_pixels") or _number(picture, "size", "shortest_edge")
    most = _number(picture, "max_pixels") or _number(picture, "size", "longest_edge")
    least = max(unit**2, least or unit**2)
    room = max(1, min(MOST_TOKENS, context // 2)) * unit**2
    most = max(unit**2, min(most or room, room))
    least = min(least, most)
    tokens = most // unit**2
    rows = math.isqrt(tokens)
    deep = decoder(config)
    return ({"outputs": 1 + len(deep["deepstack"])} if deep else {}) | {
        "width": unit * (tokens // rows),
        "height": unit * rows,
        "tokens": tokens,
        "patches": {"size": patch, "temporal": temporal, "merge": merge},
        "resize": {
            "rule": "aspect", "multiple": unit, "min_pixels": least, "max_pixels": most,
        },
    }  # fmt: skip


def _tiles(config: Tree, picture: Tree, context: int) -> dict[str, Any]:
    """InternVL."""
    side = _side(_number(picture, "size", "height"), _first(config, "image_size"))
    tokens = _number(config, "image_seq_length")
    made = _square(side, tokens)
    resize = {
        ours: value
        for ours, key in (("min_tiles", "min_patches"), ("max_tiles", "max_patches"))
        if (value := _number(picture, key)) is not None
    }
    return made | ({"resize": resize} if resize else {})


def _first(config: Tree, key: str) -> int | None:
    """Return a number of ``vision_config`` that may be a pair."""
    vision = config.get("vision_config")
    value = vision.get(key) if isinstance(vision, Mapping) else None
    value = value[0] if isinstance(value, list) and value else value
    return value if type(value) is int and value > 0 else None


def _crop(config: Tree, picture: Tree, context: int) -> dict[str, Any]:
    """LLaVA: the tower's tokens without the one for the class."""
    side = _side(_number(picture, "crop_size", "height"), _first(config, "image_size"))
    patch = _first(config, "patch_size")
    made = _square(side, (side // patch) ** 2 if side and patch else None)
    short = _number(picture, "size", "shortest_edge")
    if short and side and short >= side:
        made["resize"] = {"short": short}
    return made


def _clip(config: Tree, picture: Tree, context: int) -> dict[str, Any]:
    """CLIP: one vector a picture; sizes are numbers in older files."""
    crop = picture.get("crop_size")
    side = _side(
        _number(picture, "crop_size", "height"), _number(picture, "crop_size"),
        _first(config, "image_size"), _CLIP_SIDE,
    )  # fmt: skip
    made = _square(side, 1)
    short = _number(picture, "size", "shortest_edge") or _number(picture, "size")
    if picture.get("do_center_crop", crop is not None) is False:
        made["resize"] = {"rule": "stretch"}
    elif short and side and short >= side:
        made["resize"] = {"short": short}
    return made


def _one_size(config: Tree, picture: Tree, context: int) -> dict[str, Any]:
    """Gemma 3, Janus (which pads with ``background_color``)."""
    side = _side(_number(picture, "size", "height"), _first(config, "image_size"))
    tokens = _number(config, "mm_tokens_per_image")
    patch = _first(config, "patch_size")
    if tokens is None and side and patch:
        tokens = (side // patch) ** 2
    made = _square(side, tokens)
    fill = picture.get("background_color")
    if isinstance(fill, list) and len(fill) == 3 and all(type(c) is int for c in fill):
        made["resize"] = {"fill": fill}
    return made


_FAMILIES: dict[str, Callable[[Tree, Tree, int], dict[str, Any]]] = {
    "smolvlm": _split, "idefics3": _split,
    "qwen2_vl": _aspect, "qwen2_5_vl": _aspect, "qwen3_vl": _aspect, "qwen3_5": _aspect,
    "internvl": _tiles, "llava": _crop, "clip": _clip, "gemma3": _one_size, "janus": _one_size,
}  # fmt: skip
