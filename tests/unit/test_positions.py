"""Rotary positions with pictures: against transformers, and past the prompt."""

from __future__ import annotations

import functools
import types
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkvlmd.models import films, positions
from rkvlmd.models import manifest as manifests

MERGE = 2
#: Positions a second on the time axis of Qwen2.5-VL.
RATE = 2


def test_text_alone_counts_on() -> None:
    found = positions.mrope(4, ())
    assert (found.time, found.row, found.column, found.offset) == ((0, 1, 2, 3),) * 3 + (0,)
    assert found.rows(3, 6) == ([3, 4, 5],) * 3


def test_a_picture_takes_as_many_positions_as_its_longer_side() -> None:
    found = positions.mrope(2 + 6 + 2, [(2, 6, (1, 2, 3))])
    assert found.time == (0, 1, 2, 2, 2, 2, 2, 2, 5, 6)
    assert found.row == (0, 1, 2, 2, 2, 3, 3, 3, 5, 6)
    assert found.column == (0, 1, 2, 3, 4, 2, 3, 4, 5, 6)
    assert found.offset == -3
    # What is generated goes on from there, and a piece of the prompt is a piece of the whole.
    assert found.rows(9, 12) == ([6, 7, 8],) * 3
    assert found.rows(10, 11) == ([7],) * 3
    assert found.rows(4, 6) == ([2, 2], [2, 3], [4, 2])


def test_a_picture_without_a_grid_counts_on_like_text() -> None:
    assert positions.mrope(9, [(2, 6, None)]) == positions.mrope(9, ())


@pytest.mark.parametrize(
    "spans",
    [
        [(2, 6, (1, 2, 2))],
        [(2, 6, (1, 2, 3)), (7, 1, (1, 1, 1))],
        [(6, 6, (1, 2, 3))],
        [(2, 0, (1, 0, 3))],
    ],
)
def test_what_does_not_fit_is_refused(spans: Any) -> None:
    with pytest.raises(ValueError, match="picture"):
        positions.mrope(10, spans)


@functools.cache
def _theirs(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl as between
        import transformers.models.qwen2_vl.modeling_qwen2_vl as two
        import transformers.models.qwen3_vl.modeling_qwen3_vl as three
    model = {
        "qwen2_vl": two.Qwen2VLModel,
        "qwen2_5_vl": between.Qwen2_5_VLModel,
        "qwen3_vl": three.Qwen3VLModel,
    }[name]
    vision = types.SimpleNamespace(spatial_merge_size=MERGE, tokens_per_second=RATE)
    me = types.SimpleNamespace(config=types.SimpleNamespace(vision_config=vision))
    me.get_vision_position_ids = functools.partial(model.get_vision_position_ids, me)
    return functools.partial(model.get_rope_index, me)


SIDES = st.integers(1, 5)
PICTURES = st.lists(st.tuples(st.integers(1, 4), SIDES, SIDES), max_size=4)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
@settings(deadline=None, max_examples=25)
@given(pictures=PICTURES, tail=st.integers(1, 4))
def test_positions_equal_those_of_transformers(
    name: str, pictures: list[tuple[int, int, int]], tail: int
) -> None:
    import torch

    kinds: list[int] = []
    spans, grids = [], []
    for words, rows, columns in pictures:
        kinds += [0] * words
        spans.append((len(kinds), rows * columns, (1, rows, columns)))
        kinds += [1] * (rows * columns)
        grids.append([1, rows * MERGE, columns * MERGE])
    kinds += [0] * tail
    ids = torch.tensor([kinds])
    given_grids = torch.tensor(grids) if grids else None
    wanted, offset = _theirs(name)(ids, mm_token_type_ids=ids, image_grid_thw=given_grids)
    found = positions.mrope(len(kinds), spans)
    assert [list(axis) for axis in (found.time, found.row, found.column)] == wanted[:, 0].tolist()
    assert found.offset == int(offset)


@pytest.mark.torch
def test_frames_of_a_video_equal_those_of_transformers() -> None:
    import torch

    grid, places = (3, 2, 4), 24
    kinds = torch.tensor([[0] * 3 + [2] * places + [0] * 2])
    raw = torch.tensor([[3, 2 * MERGE, 4 * MERGE]])
    wanted, _ = _theirs("qwen2_vl")(kinds, mm_token_type_ids=kinds, video_grid_thw=raw)
    found = positions.mrope(kinds.shape[1], [(3, places, grid)])
    assert [list(axis) for axis in (found.time, found.row, found.column)] == wanted[:, 0].tolist()


def film(kind: str, rate: float = RATE) -> films.Film:
    """Return how a model takes videos; of its encoder the time axis needs the patches alone."""
    patches = manifests.Patches(size=14, temporal=2, merge=MERGE)
    video = manifests.Video(content="<v>", tokens_per_second=rate)
    return films.Film(0, None, patches, video, kind)  # type: ignore[arg-type]


VIDEOS = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 9), SIDES, SIDES, st.floats(0.01, 20.0)),
    min_size=1, max_size=3,
)  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@settings(deadline=None, max_examples=40)
@given(videos=VIDEOS)
def test_patches_in_time_equal_the_whole_video_of_transformers(
    name: str, videos: list[tuple[int, int, int, int, float]]
) -> None:
    """Each patch in time has a span of its own; a video is one for Qwen2-VL and Qwen2.5-VL."""
    import torch

    timed = name == "qwen3_vl"
    rule = film("timed" if timed else "run", RATE if name == "qwen2_5_vl" else 0.0)
    kinds: list[int] = []
    spans, grids, seconds = [], [], []
    for number, (words, count, rows, columns, gap) in enumerate(videos):
        # The processor says the seconds of a patch, frames lie half of that apart.
        times = [gap / 2 * n for n in range(2 * count)]
        for piece, time in enumerate(films.axis(rule, 2 * count, times)):
            if piece == 0 or timed:
                kinds += [0] * words
            spans.append(
                positions.Seen(len(kinds), rows * columns, (1, rows, columns), number, time)
            )
            kinds += [2] * (rows * columns)
        grids.append([count, rows * MERGE, columns * MERGE])
        seconds.append(2 * (times[-1] - times[0]) / (2 * count - 1))
    kinds += [0]
    ids = torch.tensor([kinds])
    more = {"second_per_grid_ts": torch.tensor(seconds)} if name == "qwen2_5_vl" else {}
    wanted, _ = _theirs(name)(
        ids, mm_token_type_ids=ids, video_grid_thw=torch.tensor(grids), **more
    )
    found = positions.mrope(len(kinds), spans)
    assert [list(axis) for axis in (found.time, found.row, found.column)] == wanted[:, 0].tolist()


def test_patches_of_two_videos_side_by_side_are_two_videos() -> None:
    one, two = (1, 2, 2), (1, 2, 2)
    found = positions.mrope(12, [
        positions.Seen(0, 4, one, 0, 0), positions.Seen(4, 4, one, 0, 3),
        positions.Seen(8, 4, two, 1, 0),
    ])  # fmt: skip
    assert found.time == (0,) * 4 + (3,) * 4 + (2,) * 4
    assert found.row == (0, 0, 1, 1) * 2 + (2, 2, 3, 3)
    assert found.offset == 4 - 12
