"""What a model can take: several pictures, videos of its own; pure functions of its manifest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from rkvlmd.models import films
from rkvlmd.models.manifest import Manifest

#: The first RKLLM version with video input (its changelog).
VIDEO_FROM = "1.3.0"


def makes(manifest: Manifest) -> tuple[Literal["text", "embeddings"], ...]:
    """Return what a request may ask of this model."""
    if manifest.decoder.engine == "tower":
        return ("embeddings",)
    return ("text", "embeddings") if manifest.embeddings is not None else ("text",)


def videos(manifest: Manifest) -> bool:
    """Whether a prompt of this model may hold the frames of a video, as such or as pictures."""
    return bool(manifest.encoders) and (
        manifest.video is not None or "multi_image" in manifest.capabilities
    )


def several_pictures(manifest: Manifest, info: Mapping[str, Any]) -> str:
    """Return why a prompt of this model may not hold several pictures; empty: it may.

    ``info`` is what the decoder said when it was loaded, empty while that is
    not known: then it may if one of the manifest's versions can.
    """
    if "multi_image" not in manifest.capabilities:
        return "takes one picture at a time"
    first = manifest.decoder.multi_image_from
    known = _versions(manifest, info)
    if manifest.decoder.engine == "rkllm" and first and known and not any(_reach(known, first)):
        return f"keeps several pictures apart from version {first} of the RKLLM library on"
    return ""


def native_video(manifest: Manifest, info: Mapping[str, Any]) -> bool:
    """Whether frames go to the model as a video; else they go as pictures."""
    decoder = manifest.decoder
    if decoder.engine == "onnx":
        return films.of(manifest) is not None
    if manifest.video is None or decoder.engine != "rkllm":
        return False
    if decoder.input != "text" or decoder.cross_attention is not None:
        return False  # the library sees no place in the prompt that it could fill
    known = _versions(manifest, info)
    return bool(known) and all(_reach(known, VIDEO_FROM))


def _reach(versions: Iterable[str], least: str) -> Iterator[bool]:
    """Yield for each version whether it is ``least`` or later; 1.3 stands for all of 1.3."""
    wanted = _number(least)
    for version in versions:
        number = _number(version)
        yield number >= wanted[: len(number)]


def _versions(manifest: Manifest, info: Mapping[str, Any]) -> list[str]:
    libraries = info.get("libraries")
    loaded = libraries.get("librkllmrt") if isinstance(libraries, Mapping) else None
    return [loaded] if isinstance(loaded, str) else list(manifest.decoder.runtime_versions)


def _number(version: str) -> tuple[int, ...]:
    """Return the numbers at the beginning of a version: 1.2.1b1 is (1, 2, 1)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
