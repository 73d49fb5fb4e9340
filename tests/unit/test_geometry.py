"""Where pixels go, and what they become: stretch, pad, colours, axes, sampling."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rkvlmd.engine import resample
from rkvlmd.models import geometry
from rkvlmd.models.manifest import Encoder, Resize

SIDES = st.integers(1, 5000)
TARGETS = st.integers(1, 600)


def encoder(width: int, height: int, **more: Any) -> Encoder:
    return Encoder(
        engine="onnx", file="v.onnx", sha256="0" * 64, tokens=4, embedding=8,
        width=width, height=height, **more,
    )  # fmt: skip


def picture(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))


@given(SIDES, SIDES, TARGETS, TARGETS)
def test_stretch_fills_the_input(width: int, height: int, w: int, h: int) -> None:
    cut = geometry.single(width, height, encoder(w, h))
    assert cut == geometry.Cut(((w, h),), geometry.Place(0, 0, w, h))


@given(SIDES, SIDES, TARGETS, TARGETS)
def test_pad_keeps_the_aspect_ratio_and_centres(width: int, height: int, w: int, h: int) -> None:
    to = encoder(w, h, resize=Resize(rule="pad"))
    place = geometry.content(width, height, to)
    assert place.width == w or place.height == h
    assert 1 <= place.width <= w
    assert 1 <= place.height <= h
    scale = min(w / width, h / height)
    assert abs(place.width - max(1.0, width * scale)) <= 0.5 + 1e-6
    assert abs(place.height - max(1.0, height * scale)) <= 0.5 + 1e-6
    assert abs((w - place.width) - 2 * place.left) <= 1
    assert abs((h - place.height) - 2 * place.top) <= 1
    sheet = geometry.canvas(width, height, (w, h))
    assert sheet.width == width or sheet.height == height
    assert sheet.width >= width
    assert sheet.height >= height


def test_pad_to_a_square() -> None:
    to = encoder(448, 448, resize=Resize(rule="pad"))
    assert geometry.content(640, 480, to) == (0, 56, 448, 336)
    assert geometry.content(480, 640, to) == (56, 0, 336, 448)
    assert geometry.canvas(640, 480, (448, 448)) == (0, 80, 640, 640)
    assert geometry.content(30_000, 2, to).height == 1


@pytest.mark.parametrize("antialias", [True, False])
def test_pad_fills_with_its_colour(antialias: bool) -> None:
    resize = Resize(rule="pad", fill=(10, 20, 30), antialias=antialias, resample="bilinear")
    to = encoder(64, 64, resize=resize)
    pixels = resample.to_pixels(Image.new("RGB", (100, 50), (200, 0, 0)), to, exact=True)
    assert pixels.shape == (64, 64, 3)
    assert (pixels[:15] == (10, 20, 30)).all()
    assert (pixels[-15:] == (10, 20, 30)).all()
    assert (pixels[18:46] == (200, 0, 0)).all()


@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_antialiased_is_pillow(name: Any) -> None:
    image = picture(90, 70)
    wanted = np.asarray(image.resize((32, 24), resample._FILTERS[name]))
    to = encoder(32, 24, resize=Resize(resample=name))
    assert np.array_equal(resample.to_pixels(image, to, exact=True), wanted)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("colour", ["rgb", "bgr"])
@pytest.mark.parametrize("baked", [True, False])
def test_tensor(layout: Any, colour: Any, baked: bool) -> None:
    pixels = np.asarray(picture(5, 3))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    to = encoder(5, 3, layout=layout, colour=colour, baked=baked, mean=mean, std=std)
    tensor = resample.to_tensor(pixels, to)
    assert tensor.shape == ((1, 3, 3, 5) if layout == "nchw" else (1, 3, 5, 3))
    assert tensor.dtype == (np.uint8 if baked else np.float32)
    assert tensor.flags.c_contiguous
    for y, x, c in itertools.product(range(3), range(5), range(3)):
        value = np.float32(pixels[y, x, c if colour == "rgb" else 2 - c])
        if not baked:
            value = (value / np.float32(255) - np.float32(mean[c])) / np.float32(std[c])
        assert tensor[(0, c, y, x) if layout == "nchw" else (0, y, x, c)] == value


# --- without antialiasing ------------------------------------------------------------


def reference(source: np.ndarray, width: int, height: int) -> np.ndarray:
    """Bilinear, one pixel at a time: centres map to centres, the border repeats."""
    rows, columns = source.shape[:2]
    out = np.zeros((height, width, 3))
    for y, x in itertools.product(range(height), range(width)):
        v = (y + 0.5) * rows / height - 0.5
        u = (x + 0.5) * columns / width - 0.5
        top, left = int(np.floor(v)), int(np.floor(u))
        for dy, dx in itertools.product((0, 1), (0, 1)):
            weight = (1 - abs(v - (top + dy))) * (1 - abs(u - (left + dx)))
            a, b = np.clip(top + dy, 0, rows - 1), np.clip(left + dx, 0, columns - 1)
            out[y, x] += weight * source[a, b]
    return out


@pytest.mark.parametrize("size", [(7, 5), (40, 31), (3, 90), (16, 12)])
def test_bilinear_without_antialiasing(size: tuple[int, int]) -> None:
    image = picture(*size)
    resize = Resize(resample="bilinear", antialias=False)
    found = resample.to_pixels(image, encoder(16, 12, resize=resize), exact=True)
    assert np.abs(found - reference(np.asarray(image), 16, 12)).max() <= 0.5 + 1e-3


def test_pad_without_antialiasing_pads_before_it_samples() -> None:
    image = picture(20, 11)
    square = np.full((20, 20, 3), 127, np.uint8)
    square[4:15] = np.asarray(image)
    resize = Resize(rule="pad", resample="bilinear", antialias=False)
    found = resample.to_pixels(image, encoder(14, 14, resize=resize), exact=True)
    assert np.abs(found - reference(square, 14, 14)).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_the_same_size_changes_nothing(name: Any) -> None:
    image = picture(17, 13)
    to = encoder(17, 13, resize=Resize(resample=name, antialias=False))
    assert np.array_equal(resample.to_pixels(image, to, exact=True), np.asarray(image))


@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_one_colour_stays_that_colour(name: Any) -> None:
    image = Image.new("RGB", (37, 91), (3, 250, 128))
    to = encoder(24, 18, resize=Resize(resample=name, antialias=False))
    assert (resample.to_pixels(image, to, exact=True) == (3, 250, 128)).all()


def test_nearest_is_pillows() -> None:
    image = picture(100, 33)
    to = encoder(19, 50, resize=Resize(resample="nearest", antialias=False))
    wanted = np.asarray(image.resize((19, 50), Image.Resampling.NEAREST))
    assert np.array_equal(resample.to_pixels(image, to, exact=True), wanted)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(9, 7), (61, 45)])
def test_without_antialiasing_is_pytorch(name: Any, size: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    image = picture(*size)
    source = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].float()
    wanted = torch.nn.functional.interpolate(source, size=(24, 32), mode=name, align_corners=False)
    wanted = wanted.clamp(0, 255)[0].permute(1, 2, 0).numpy()
    to = encoder(32, 24, resize=Resize(resample=name, antialias=False))
    assert np.abs(resample.to_pixels(image, to, exact=True) - wanted).max() <= 0.5 + 1e-2
