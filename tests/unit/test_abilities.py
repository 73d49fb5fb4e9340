"""Several pictures and videos: which models and library versions take them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from rkvlmd.models import abilities
from rkvlmd.models import manifest as manifests
from tests.fakes import models


def manifest(*, capabilities: tuple[str, ...] = ("image", "multi_image"), video: bool = False,
             **decoder: Any) -> manifests.Manifest:  # fmt: skip
    tree = models.tree(capabilities=list(capabilities))
    if decoder.get("engine") == "rkllm":
        tree["decoder"]["files"] = {"model": tree["decoder"]["files"]["decoder"]}
    tree["decoder"] |= decoder
    if video:
        tree["video"] = {"start": "<a>", "content": "<v>", "end": "<b>"}
    return manifests.parse(msgspec.json.encode(tree))


def loaded(version: str) -> dict[str, Any]:
    return {"libraries": {"librkllmrt": version}}


def test_what_a_model_takes_and_makes() -> None:
    assert abilities.makes(manifest()) == ("text",)
    assert abilities.videos(manifest())
    assert not abilities.videos(manifest(capabilities=("image",)))
    tree = models.tree(embeddings={}, capabilities=["image", "multi_image", "embeddings"])
    assert abilities.makes(manifests.parse(msgspec.json.encode(tree))) == ("text", "embeddings")


def test_one_picture_is_one_picture() -> None:
    assert abilities.several_pictures(manifest(capabilities=("image",)), {})
    assert not abilities.several_pictures(manifest(), {})


@pytest.mark.parametrize(
    ("version", "may"), [("1.2.3", False), ("1.2.3b1", False), ("1.3.0", True), ("1.10.0", True)]
)
def test_a_library_that_mixes_pictures(version: str, may: bool) -> None:
    found = manifest(engine="rkllm", multi_image_from="1.3.0")
    assert (abilities.several_pictures(found, loaded(version)) == "") is may
    # Not loaded yet: the versions of the manifest count; nobody knows: it is tried.
    named = manifest(engine="rkllm", multi_image_from="1.3.0", runtime_versions=[version])
    assert (abilities.several_pictures(named, {}) == "") is may
    assert not abilities.several_pictures(found, {})
    # One of several can; which one is there shows when it is loaded.
    both = manifest(engine="rkllm", multi_image_from="1.3.0", runtime_versions=["1.2.3", "1.3"])
    assert not abilities.several_pictures(both, {})
    assert (abilities.several_pictures(both, loaded(version)) == "") is may


@pytest.mark.parametrize(("version", "native"), [("1.2.3", False), ("1.3.0", True)])
def test_frames_are_a_video_where_tags_and_library_say_so(version: str, native: bool) -> None:
    assert abilities.native_video(manifest(engine="rkllm", video=True), loaded(version)) is native
    assert not abilities.native_video(manifest(engine="rkllm"), loaded(version))
    assert not abilities.native_video(manifest(video=True), loaded(version))
    assert not abilities.native_video(manifest(engine="rkllm", video=True), {})
    listed = manifest(engine="rkllm", video=True, runtime_versions=["1.3"])
    assert abilities.native_video(listed, {})
    both = manifest(engine="rkllm", video=True, runtime_versions=["1.2.3", "1.3"])
    assert not abilities.native_video(both, {})
