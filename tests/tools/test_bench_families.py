"""``tools/bench families``: the shape of what it prints."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("transformers")

from rkvlmd.engine import resample
from rkvlmd.models.manifest import Patches
from tests.parity import cases
from tools.benchlib import cli, families
from tools.benchlib.figures import BenchError, Figure

pytestmark = [pytest.mark.process, pytest.mark.torch]


def test_one_family_at_one_size() -> None:
    sizes = (("small", 320, 240),)
    ratio, share, mean, largest = families.run(repeats=1, names=["llava"], sizes=sizes)
    assert ratio.name == "llava, small: speed-up over transformers"
    assert ratio.value > 0
    assert share.value >= 0
    assert ratio.target == ""  # sizes with a target have their names
    assert set(ratio.detail) == {"fast", "exact", "transformers", "views"}
    assert ratio.detail["views"] == 1
    for way in families.WAYS:
        assert ratio.detail[way]["seconds"]["runs"] == 1
        assert ratio.detail[way]["file_bytes"] > 0
    assert (mean.unit, mean.target, largest.target) == ("of 255", "", "")
    # Nothing is decoded at a reduced scale here: the target is as large as the picture.
    assert mean.detail == {"mean": mean.value, "largest": largest.value, "views": 1}
    assert mean.value == largest.value == 0


def test_targets_are_for_the_large_sizes() -> None:
    found = {
        way: {"seconds": {"median": 1.0}, "peak_bytes": 1, "views": 1} for way in families.WAYS
    } | {families.PIXELS: {"mean": 0.5, "largest": 7}}
    for name in families.AIMED:
        ratio, share, _, _ = families._figures("llava", name, found)
        assert (ratio.least, share.most) == (3.0, 0.5)
        assert (ratio.met, share.met) == (False, False)
    assert families._figures("llava", "640x480", found)[0].met is None


def test_what_fails_is_told() -> None:
    with pytest.raises(BenchError, match="StopIteration"):
        families._measured("nobody", "fast", Path("/nonexistent"), 1)


def case_of(name: str) -> cases.Case:
    (case,) = [case for case in cases.CASES if case.name == name]
    return case


BAKED = cases.encoder(30, 20, 1, cases.CLIP, baked=True)
ENCODERS = {
    "floats, channels first": cases.encoder(30, 20, 1, cases.CLIP),
    "floats, channels last": cases.encoder(30, 20, 1, cases.IMAGENET, layout="nhwc"),
    "patches": cases.encoder(56, 56, 4, cases.CLIP, patches=Patches(size=14, temporal=2, merge=2)),
    "bytes": BAKED,
}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", ENCODERS)
def test_levels_are_the_pixels_that_went_in(kind: str, exact: bool) -> None:
    """Of every kind of input; the channels have different means, so their order counts."""
    encoder = ENCODERS[kind]
    size = (encoder.height, encoder.width, 3)
    pixels = np.random.default_rng(5).integers(0, 256, size, np.uint8)
    moved = pixels.astype(np.int16)
    moved[..., 2] = np.minimum(moved[..., 2] + 9, 255)
    found, other = (
        families.levels(resample.to_tensor(p.astype(np.uint8), encoder, exact=exact), encoder)
        for p in (pixels, moved)
    )
    times = encoder.patches.temporal if encoder.patches else 1
    expected = np.repeat(pixels.ravel(), times)
    assert np.array_equal(np.sort(found.ravel()), np.sort(expected))
    assert np.abs(found - other).sum() == times * (moved - pixels).sum()


def test_the_difference_is_that_of_the_two_paths() -> None:
    """A picture twice as large as the reduced scale allows for: the paths differ, a little."""
    case, data = case_of("llava"), families.photo(1600, 1200)
    error = families.difference(case, data)
    fast, exact = (families._ours(case, exact=exact)(data).tensors[0] for exact in (False, True))
    apart = np.abs(fast - exact) * 255 * np.asarray(cases.CLIP[1]).reshape(1, 3, 1, 1)
    assert error["mean"] == pytest.approx(float(apart.mean()), abs=1e-3)
    assert error["largest"] == round(float(apart.max()))
    assert 0 < error["mean"] < 2


def test_another_layout_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    made = resample.to_inputs

    def turned(*arguments: object, exact: bool) -> list[object]:
        tensors = made(*arguments, exact=exact)  # type: ignore[arg-type]
        return [t if exact else t.transpose(0, 2, 3, 1) for t in tensors]

    monkeypatch.setattr(resample, "to_inputs", turned)
    with pytest.raises(BenchError, match="another layout"):
        families.difference(case_of("llava"), families.photo(320, 240))


def test_a_picture_without_a_reduced_scale_does_not_differ() -> None:
    file = io.BytesIO()
    Image.new("RGB", (300, 300), (200, 30, 90)).save(file, "PNG")
    error = families.difference(case_of("qwen2_vl"), file.getvalue())
    assert (error["mean"], error["largest"]) == (0, 0)


def test_the_table_has_a_row_a_family(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [
        Figure(f"{family}, {size}: {what}", value, unit)
        for family in ("one", "two")
        for size in ("640x480", "12 megapixels")
        for what, value, unit in (
            ("speed-up", 4.0, "x"), ("memory", 0.26, "x"),
            ("mean", 0.318, "of 255"), ("largest", 41, "of 255"),
        )
    ]  # fmt: skip
    monkeypatch.setattr(families, "run", lambda **_: found)
    assert cli.main(["families", "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert "| figure |" not in printed
    lines = printed.splitlines()
    assert [line.count("|") for line in lines if line.startswith("|")] == [8] * 4
    assert "| one | 4 x | 26 % | 0.32, 41 | 4 x | 26 % | 0.32, 41 |" in lines
    assert lines.index("|---|---:|---:|---:|---:|---:|---:|") == len(lines) - 4
    assert cli.main(["families"]) == 0
    assert '"name": "two, 12 megapixels: largest"' in capsys.readouterr().out
