"""Videos as patches of several frames: which models, how many frames, how large, where in time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkvlmd.ctl import showing
from rkvlmd.errors import ManifestError
from rkvlmd.models import abilities, building, catalog, films
from rkvlmd.models import manifest as manifests
from rkvlmd.models.templates import Template
from tests.fakes import models
from tests.unit.test_catalogue import CATALOGUE, digest, parts, tower

ASPECT = {"rule": "aspect", "multiple": 28, "min_pixels": 784, "max_pixels": 784 * 100}
PATCHES = {"size": 14, "temporal": 2, "merge": 2}
VIDEO = {"start": "<a>", "content": "<v>", "end": "<b>"}


def manifest(
    family: str = "qwen2_vl", *, video: dict[str, Any] | None = VIDEO, **encoder: Any
) -> manifests.Manifest:
    tree = models.tree(family=family, video=video)
    tree["encoders"][0] |= {
        "width": 280, "height": 280, "tokens": 100, "resize": ASPECT, "patches": PATCHES,
    } | encoder  # fmt: skip
    return manifests.parse(msgspec.json.encode(tree))


def film(family: str = "qwen2_vl", **video: Any) -> films.Film:
    found = films.of(manifest(family, video=VIDEO | video))
    assert found is not None
    return found


def test_tags_a_family_and_patches_of_several_frames_make_a_video() -> None:
    assert films.of(manifest()) is not None
    assert abilities.native_video(manifest(), {})
    for other in (
        manifest(video=None),
        manifest("smolvlm"),
        manifest(patches=PATCHES | {"temporal": 1}),
        manifest(patches=None),
    ):
        assert films.of(other) is None
        assert not abilities.native_video(other, {})


@pytest.mark.parametrize(
    "template",
    [
        t
        for t in CATALOGUE.values()
        if t.family in {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"}
    ],
    ids=lambda t: t.model,
)
def test_the_catalogues_models_take_videos_on_the_cpu(template: Template) -> None:
    known = parts(template, "onnx")
    tree, _ = building.build(template, "x", known, digest)
    rule = films.of(manifests.from_builtins(tree))
    assert rule is not None
    assert rule.video.max_pixels > rule.video.min_pixels > 0
    assert bool(rule.video.tokens_per_second) is (template.family == "qwen2_5_vl")
    # An encoder that was exported for one size takes pictures alone.
    fixed = replace(known, towers=(tower(template, "onnx"),))
    tree, _ = building.build(template, "x", fixed, digest)
    assert films.of(manifests.from_builtins(tree)) is None


@given(
    st.sampled_from(["qwen2_vl", "qwen3_vl"]),
    st.integers(1, 64),
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.integers(0, 10_000),
)
def test_frames_are_within_every_limit(
    family: str, most: int, width: int, height: int, tokens: int
) -> None:
    rule = film(family)
    count = films.count(rule, most, width, height, tokens)
    assert 1 <= count <= most
    assert count % 2 == 0 or most == 1
    size = films.size(rule, count, width, height, tokens)
    assert size[0] % 28 == size[1] % 28 == 0 < min(size)
    # No frame has more tokens than the encoder may give.
    assert films.tokens(rule, 2, size) <= 100
    assert films.view(rule, width, height, size).tokens == films.tokens(rule, 1, size)
    if count > 2:
        assert films.tokens(rule, count, size) <= tokens


def test_frames_become_smaller_before_they_become_fewer() -> None:
    rule = film()
    assert films.size(rule, 8, 640, 360, 10_000) == (364, 196)
    assert films.count(rule, 8, 640, 360, 10_000) == 8
    smaller = films.size(rule, 8, 640, 360, 200)
    assert films.count(rule, 8, 640, 360, 200) == 8
    assert films.tokens(rule, 8, smaller) <= 200 < films.tokens(rule, 8, (364, 196))
    # Until they are as small as they may be.
    least = film(min_pixels=784 * 40)
    assert films.count(least, 8, 640, 360, 100) == 6
    assert films.count(least, 8, 640, 360, 10) == 2


def test_an_encoder_of_one_size_has_that() -> None:
    found = films.of(manifest(width=56, height=84, tokens=6, resize={"rule": "stretch"}))
    assert found is not None
    assert films.size(found, 4, 640, 360, 10) == (56, 84)
    view = films.view(found, 640, 360, (56, 84))
    assert (view.patches, view.grid, view.tokens) == ((1, 6, 4), (1, 3, 2), 6)
    padded = films.of(manifest(width=56, height=56, tokens=4, resize={"rule": "pad"}))
    assert padded is not None
    cut = films.view(padded, 640, 320, (56, 56)).cut
    assert (cut.sizes, cut.place.top) == (((56, 28),), -14)


def test_the_time_axis() -> None:
    assert films.axis(film(), 6, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == [0, 1, 2]
    timed = film("qwen2_5_vl", tokens_per_second=2.0)
    assert films.axis(timed, 6, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == [0, 4, 8]
    assert films.axis(timed, 5, [0.0, 0.25, 0.5, 0.75, 1.0]) == [0, 1, 2]
    # Nobody knows: two frames a second.
    assert films.axis(timed, 4, []) == [0, 2]
    assert films.axis(timed, 1, [7.0]) == [0]
    # All frames at one time, as broken files have them.
    assert films.axis(timed, 4, [0.0] * 4) == [0, 0]
    assert films.axis(film("qwen3_vl"), 4, [0.0, 1.0, 2.0, 3.0]) == [0, 0]


def test_what_stands_at_a_videos_place() -> None:
    assert films.layout(film(), 5, []) == ["<a>", 0, 1, 2, "<b>"]
    rule = film("qwen3_vl")
    assert films.layout(rule, 3, [0.0, 1.0, 2.6]) == [
        "<a>", "<0.5 seconds>", "<a>", 0, "<b>", "<2.6 seconds>", "<a>", 1, "<b>", "<b>",
    ]  # fmt: skip
    assert films.layout(rule, 4, [])[1:-1:4] == ["<0.2 seconds>", "<1.2 seconds>"]


def test_numbers_of_a_video_are_checked() -> None:
    with pytest.raises(ManifestError, match="tokens_per_second"):
        film(tokens_per_second=-1)
    with pytest.raises(ManifestError, match="min_pixels"):
        film(min_pixels=-1)


@pytest.mark.parametrize(("patches", "native"), [(PATCHES, True), (None, False)])
def test_show_says_which_way_frames_go(
    patches: dict[str, int] | None, *, native: bool, tmp_path: Path
) -> None:
    known = manifests.to_builtins(manifest(patches=patches))
    folder = models.write_model(
        tmp_path / "m", family="qwen2_vl", video=VIDEO, encoders=known["encoders"],
        capabilities=["image", "multi_image", "video"],
    )  # fmt: skip
    told = showing.of_model(catalog.open_folder(folder))
    assert told["video"] == {"native": native, "frames": 8}


def test_what_the_checkpoints_files_say_goes_over_the_catalogue() -> None:
    known = parts(CATALOGUE["qwen2.5-vl-3b"], "onnx")

    def made(config: dict[str, Any], film: dict[str, Any]) -> dict[str, Any]:
        said = replace(known, config=config, film=film)
        tree, _ = building.build(CATALOGUE["qwen2.5-vl-3b"], "x", said, digest)
        video = manifests.from_builtins(tree).video
        assert video is not None
        return {n: getattr(video, n) for n in ("min_pixels", "max_pixels", "tokens_per_second")}

    usual = made({}, {})
    assert usual == {"min_pixels": 100352, "max_pixels": 602112, "tokens_per_second": 2.0}
    size = {"shortest_edge": 3136, "longest_edge": 12845056}
    assert made({"vision_config": {"tokens_per_second": 4}}, {"size": size}) == {
        "min_pixels": 3136, "max_pixels": 12845056, "tokens_per_second": 4.0,
    }  # fmt: skip
    assert made({}, {"min_pixels": 9, "max_pixels": 10})["max_pixels"] == 10
    # What makes no sense is as if it were not there.
    for config, film in (
        ({"vision_config": {"tokens_per_second": "4"}}, {"size": 5}),
        ({"vision_config": {"tokens_per_second": -1}}, {"min_pixels": 10, "max_pixels": 9}),
        ({"vision_config": 7}, {"size": {"shortest_edge": 1}}),
    ):
        assert made(config, film) == usual
