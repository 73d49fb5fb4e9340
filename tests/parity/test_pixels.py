"""The exact path against ``transformers``' own image processors, bit by bit.

They are those that resample with Pillow, made offline with the checkpoints'
real values. Both sides get the same forty files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rkvlmd.engine import pictures
from rkvlmd.models import views
from tests.parity import pictures as files
from tests.parity.cases import CASES, Case

pytest.importorskip("transformers")

pytestmark = pytest.mark.torch

LIMITS = pictures.Limits(1 << 30, 1 << 30, 1, 1000)


def ours(case: Case, data: bytes, *, exact: bool = True) -> pictures.Views:
    model = case.manifest
    return pictures.prepare_views(
        data, lambda w, h: views.plan(model, w, h), model.encoders, LIMITS, exact=exact
    )


def theirs(case: Case, index: int) -> list[Any]:
    """Return one array for each input, as the processor orders them."""
    found = case.image_processor()(images=[files.opened(index)], return_tensors="np")
    if case.family.startswith("qwen"):
        return [found["pixel_values"]]
    if case.family in {"smolvlm", "idefics3"}:
        return list(found["pixel_values"][0])
    if case.family == "minicpmv":
        ends = np.cumsum(found["target_sizes"].prod(axis=1) * 14)[:-1]
        return np.split(found["pixel_values"][0], ends, axis=2)
    tiles = list(found["pixel_values_local"]) if "pixel_values_local" in found else []
    return [*tiles, *found["pixel_values"]]


def as_patches(tensor: Any) -> Any:
    """Return an input of MiniCPM-V in the order in which its processor gives it."""
    _, channels, height, width = tensor.shape
    cells = tensor.reshape(channels, height // 14, 14, width // 14, 14).transpose(0, 2, 1, 3, 4)
    return cells.reshape(channels, 14, -1)


def check_grid(case: Case, view: views.View, index: int) -> None:
    """Compare the grid, and with it the number of image tokens, with what the processor tells."""
    found = case.image_processor()(images=[files.opened(index)], return_tensors="np")
    assert view.patches == tuple(found["image_grid_thw"][0])
    assert view.tokens * 4 == np.prod(view.patches)
    assert view.grid == (1, view.patches[1] // 2, view.patches[2] // 2)


@pytest.mark.parametrize("index", range(len(files.KINDS)), ids=files.name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_exact_path_is_the_processors(case: Case, index: int) -> None:
    data = files.file(index)
    made = ours(case, data)
    wanted = theirs(case, index)
    assert len(made.tensors) == len(wanted)
    for view, tensor, other in zip(made.plan.views, made.tensors, wanted, strict=True):
        entry = case.encoders[view.encoder]
        if entry.patches is None:
            assert view.tokens == entry.tokens
        else:
            check_grid(case, view, index)
        if case.family == "minicpmv":
            tensor = as_patches(tensor)
        other = other.reshape(tensor.shape)
        assert tensor.dtype == other.dtype == np.float32
        assert np.array_equal(tensor, other), np.abs(tensor - other).max()
