"""Videos of the Qwen models against their video processors: sizes, pixels, and whole prompts.

The processors resample with torchvision, which for bytes is ``interpolate`` of
PyTorch: Pillow's algorithm with weights of 16 bits, where Pillow has 22. So
fewer than one value in a hundred differs, by two levels of 255 at most.
"""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rkvlmd.engine import render, resample
from rkvlmd.models import families, films
from rkvlmd.models.manifest import Manifest, Video
from rkvlmd.wire.child import Laid
from tests.parity import test_prompts as prompts
from tests.parity.cases import CASES, Case

pytest.importorskip("transformers")

pytestmark = pytest.mark.torch
NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
#: Pixels of one frame (qwen-vl-utils), and of all frames (the processor's file of Qwen3-VL).
LIMITS = {"run": (128 * 28 * 28, 768 * 28 * 28), "timed": (4096, 25165824)}
#: More tokens than any of these videos has.
PLENTY = 1 << 30


def case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def manifest(name: str, **video: Any) -> Manifest:
    found = case(name)
    least, most = LIMITS[families.get(found.family).film or "run"]
    tags = Video(start="<|vision_start|>", content="<|video_pad|>", end="<|vision_end|>",
                 **{"min_pixels": least, "max_pixels": most} | video)  # fmt: skip
    # No frame is bounded by what the encoder may see of a picture.
    eyes = msgspec.structs.replace(found.encoders[0], tokens=1 << 20)
    return msgspec.structs.replace(found.manifest, video=tags, encoders=(eyes,))


def rule(name: str, **video: Any) -> films.Film:
    found = films.of(manifest(name, **video))
    assert found is not None
    return found


@cache
def three() -> Any:
    """Return the module of Qwen3-VL's video processor; that of Qwen2-VL needs torchvision."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("transformers.models.qwen3_vl.video_processing_qwen3_vl")


@cache
def two() -> Any:
    """Return the module of which Qwen2-VL's video processor has its copy of ``smart_resize``."""
    name = "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl"
    return importlib.import_module(name)


SIDES = st.integers(8, 2400)


@settings(deadline=None, max_examples=300)
@given(frames=st.integers(2, 64), width=SIDES, height=SIDES)
def test_sizes_are_the_processors(frames: int, width: int, height: int) -> None:
    if max(width, height) > 100 * min(width, height):
        return
    least, most = LIMITS["run"]
    wanted = two().smart_resize(height, width, 28, least, most)
    found = films.size(rule("qwen2_vl"), frames, width, height, PLENTY)
    assert found == wanted[::-1]
    least, most = LIMITS["timed"]
    wanted = three().smart_resize(frames, height, width, 2, 32, least, most)
    found = films.size(rule("qwen3_vl"), frames, width, height, PLENTY)
    assert found == wanted[::-1]


@settings(deadline=None, max_examples=200)
@given(frames=st.integers(2, 64), width=SIDES, height=SIDES, tokens=st.integers(1000, 40000))
def test_a_budget_of_all_frames_is_the_processors(
    frames: int, width: int, height: int, tokens: int
) -> None:
    """``cap_pixels_per_frame``: ``Qwen2VLVideoProcessor.resize``, of which 0.9 is one's share."""
    if max(width, height) > 100 * min(width, height):
        return
    least, most = LIMITS["run"]
    total = tokens * 28 * 28
    capped = max(min(most, total * 2 // frames), int(least * 1.05))
    wanted = two().smart_resize(height, width, 28, least, capped)
    assert films.size(rule("qwen2_vl"), frames, width, height, tokens) == wanted[::-1]


def drawn(frames: int, width: int, height: int) -> list[Image.Image]:
    """Return frames with edges, slopes and noise, each a little further."""
    rng = np.random.default_rng(width)
    y, x = np.mgrid[0:height, 0:width]
    found = []
    for n in range(frames):
        slope = np.stack([x + 5 * n, y, x + y], axis=-1) % 256
        edge = np.where(((x + 3 * n) // 17 + y // 11) % 2, 255, 0)[..., None]
        noise = rng.integers(0, 256, (height, width, 3))
        found.append(Image.fromarray(((slope + edge + noise) // 3).astype(np.uint8)))
    return found


def theirs(name: str, frames: list[Image.Image]) -> tuple[np.ndarray, list[int]]:
    """Return the processor's patches, (patches, values), and its grid."""
    import torch

    film = rule(name)
    width, height = frames[0].size
    least, most = LIMITS[film.kind]
    if film.kind == "run":
        high, wide = two().smart_resize(height, width, 28, least, most)
    else:
        high, wide = three().smart_resize(len(frames), height, width, 2, 32, least, most)
    stack = torch.from_numpy(np.stack([np.asarray(f) for f in frames])).permute(0, 3, 1, 2)
    # What torchvision calls for bytes and this filter.
    resized = torch.nn.functional.interpolate(
        stack, size=(high, wide), mode="bicubic", align_corners=False, antialias=True
    )
    scaled = resized.float() / 255
    entry = film.entry
    mean, std = (torch.tensor(three_)[:, None, None] for three_ in (entry.mean, entry.std))
    values = ((scaled - mean) / std)[None]
    made = three().Qwen3VLVideoProcessor(patch_size=film.patches.size)
    flat, *grid = made.patchify(
        values, patch_size=film.patches.size, merge_size=2, temporal_patch_size=2
    )
    return flat[0].numpy(), [int(n) for n in grid]


@pytest.mark.parametrize("count", [4, 5])
@pytest.mark.parametrize("size", [(640, 360), (300, 420), (97, 211), (30, 20)])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_patches_are_the_processors(name: str, size: tuple[int, int], count: int) -> None:
    film = rule(name)
    frames = drawn(count, *size)
    wanted, grid = theirs(name, frames)
    target = films.size(film, count, *size, PLENTY)
    found, seen = [], []
    for at in range(0, count, 2):
        view = films.view(film, *size, target)
        sheets = [
            resample.Sheets(frame, exact=True).pixels(view.cut, film.entry.resize)
            for frame in frames[at : at + 2]
        ]
        found.append(resample.frames_to_patches(sheets, film.entry, film.patches, exact=True))
        seen.append(view)
    assert {view.patches for view in seen} == {(1, *grid[1:])}
    assert len(seen) == grid[0]
    assert sum(view.tokens for view in seen) == np.prod(grid) // 4
    assert sum(view.tokens for view in seen) == films.tokens(film, count, target)
    ours = np.concatenate(found)
    assert ours.shape == wanted.shape
    assert ours.dtype == np.float32
    apart = np.abs(ours - wanted) * _levels(film)
    assert apart.max() < 2.01
    assert (apart > 0.5).mean() < 0.01


def _levels(film: films.Film) -> np.ndarray:
    """Return how many of 255 levels one is, for each value of a patch, on its normalised scale."""
    std = np.asarray(film.entry.std, np.float32)
    return np.repeat(255 * std, 2 * film.patches.size**2)


#: Conversations: texts, and videos as (frames, width, height, first frame's number, rate).
TALKS: tuple[tuple[tuple[str, tuple[Any, ...]], ...], ...] = (
    (("user", ((4, 320, 240, 2.0), "What moves?")),),
    (("user", ((5, 640, 360, 0.7), "and", (2, 200, 200, 4.0), "Which?")),),
    (("user", ((6, 90, 130, 1.5), "One.")), ("assistant", ("Yes.",)), ("user", ("And?",))),
)


class Videos:
    """A video processor that knows sizes alone: what is needed to write a prompt."""

    merge_size = temporal_patch_size = 2
    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __init__(self, name: str, talk: Any) -> None:
        self.film = rule(name)
        self.shown = [part for _, parts in talk for part in parts if not isinstance(part, str)]

    def __call__(self, videos: Any, **_: Any) -> dict[str, Any]:
        grids, told = [], []
        for count, width, height, rate in self.shown:
            least, most = LIMITS[self.film.kind]
            unit = 2 * self.film.patches.size
            if self.film.kind == "run":
                high, wide = two().smart_resize(height, width, unit, least, most)
            else:
                high, wide = three().smart_resize(count, height, width, 2, unit, least, most)
            grids.append([-(-count // 2), 2 * high // unit, 2 * wide // unit])
            told.append(
                SimpleNamespace(fps=rate, sampled_fps=rate, frames_indices=list(range(count)))
            )
        return {"video_grid_thw": np.array(grids), "video_metadata": told}


def ours(name: str, folder: Path, talk: Any) -> list[int]:
    found = rule(name)
    pictures: list[Laid] = []
    turns = []
    for role, parts in talk:
        said: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, str):
                said.append({"text": part})
                continue
            count, width, height, rate = part
            times = [n / rate for n in range(count)]
            view = films.view(found, width, height, films.size(found, count, width, height, PLENTY))
            line = films.layout(found, count, times)
            said.append({"picture": len(pictures)})
            pictures.append(Laid(layout=line, tokens=[view.tokens] * -(-count // 2), video=True))
        turns.append({"role": role, "parts": said})
    return render.render(str(folder), manifest(name), turns, pictures).tokens


@pytest.mark.usefixtures("processor_mixin")
@pytest.mark.parametrize("talk", TALKS, ids=["one", "two", "turns"])
@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_is_the_processors(name: str, talk: Any, tmp_path: Path) -> None:
    known = case(name)
    made = prompts.tokenizer(known.specials)
    made.save(str(tmp_path / "tokenizer.json"))
    processor = prompts.whole_processor(known, made)
    processor.video_processor = Videos(name, talk)
    template = families.get(known.family).template.replace("image_pad", "video_pad")
    messages = prompts.messages_of(talk)
    text = processor.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True
    )
    count = len(Videos(name, talk).shown)
    frames = [np.zeros((2, 3, 4, 4), np.uint8)] * count
    wanted = processor(
        videos=frames, text=[text], add_special_tokens=False, padding=False, return_tensors="np"
    )["input_ids"][0]
    assert ours(name, tmp_path, talk) == [int(token) for token in wanted]


processor_mixin = prompts.processor_mixin
