"""``tools/bench families``: the shape of what it prints."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tools.benchlib import families
from tools.benchlib.figures import BenchError

pytestmark = [pytest.mark.process, pytest.mark.torch]


def test_one_family_at_one_size() -> None:
    sizes = (("small", 320, 240),)
    ratio, share = families.run(repeats=1, names=["llava"], sizes=sizes)
    assert ratio.name == "llava, small: speed-up over transformers"
    assert ratio.value > 0
    assert share.value >= 0
    assert ratio.target == ""  # sizes with a target have their names
    assert set(ratio.detail) == {"fast", "exact", "transformers", "views"}
    assert ratio.detail["views"] == 1
    for way in families.WAYS:
        assert ratio.detail[way]["seconds"]["runs"] == 1
        assert ratio.detail[way]["file_bytes"] > 0


def test_targets_are_for_the_large_sizes() -> None:
    found = {
        way: {"seconds": {"median": 1.0}, "peak_bytes": 1, "views": 1} for way in families.WAYS
    }
    for name in families.AIMED:
        ratio, share = families._figures("llava", name, found)
        assert (ratio.least, share.most) == (3.0, 0.5)
        assert (ratio.met, share.met) == (False, False)
    assert families._figures("llava", "640x480", found)[0].met is None


def test_what_fails_is_told() -> None:
    with pytest.raises(BenchError, match="StopIteration"):
        families._measured("nobody", "fast", Path("/nonexistent"), 1)
