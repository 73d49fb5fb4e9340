"""From a decoded RGB picture to an encoder's input tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from rkvlmd.models import geometry
from rkvlmd.models.manifest import Encoder

Pixels = npt.NDArray[np.uint8]

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
#: The fast path first shrinks by whole factors to no less than this many times the target.
GAP = 2.0
#: How far Pillow may reduce by whole numbers before it resamples, in target sizes.
REDUCE_GAP = 1.5


def to_input(image: Image.Image, encoder: Encoder, *, exact: bool) -> npt.NDArray[Any]:
    """Return the tensor of one picture: batch 1, the encoder's layout and dtype.

    uint8 for an encoder with mean and std baked in, else float32.
    """
    return to_tensor(to_pixels(image, encoder, exact=exact), encoder)


def to_pixels(image: Image.Image, encoder: Encoder, *, exact: bool) -> Pixels:
    """Return an RGB picture at the encoder's size, uint8 of shape (height, width, 3)."""
    if not encoder.resize.antialias:
        return _sample(np.asarray(image), encoder)
    place = geometry.content(*image.size, encoder)
    resized = image.resize(
        (place.width, place.height),
        _FILTERS[encoder.resize.resample],
        reducing_gap=None if exact else REDUCE_GAP,
    )
    if encoder.resize.rule == "pad":
        sheet = Image.new("RGB", (encoder.width, encoder.height), encoder.resize.fill)
        sheet.paste(resized, (place.left, place.top))
        resized = sheet
    return np.asarray(resized)


def to_tensor(pixels: Pixels, encoder: Encoder) -> npt.NDArray[Any]:
    """Order channels and axes, and normalise unless that is baked into the encoder.

    ``mean`` and ``std`` are in the order in which the encoder sees the
    channels.
    """
    if encoder.colour == "bgr":
        pixels = pixels[:, :, ::-1]
    tensor: npt.NDArray[Any] = pixels
    if not encoder.baked:
        # This order, in float32, is what the published image processors compute.
        tensor = pixels.astype(np.float32)
        tensor /= np.float32(255)
        tensor -= np.asarray(encoder.mean, np.float32)
        tensor /= np.asarray(encoder.std, np.float32)
    if encoder.layout == "nchw":
        tensor = tensor.transpose(2, 0, 1)
    return np.ascontiguousarray(tensor[None])


# --- without antialiasing ------------------------------------------------------------


def _sample(source: Pixels, encoder: Encoder) -> Pixels:
    """Sample without antialiasing, pixel centres on pixel centres as in OpenCV and PyTorch.

    Only as many source pixels as the kernel has taps count, however much the
    picture shrinks. Memory follows the target's size, never the source's.
    """
    height, width = source.shape[:2]
    sheet = geometry.canvas(width, height, encoder)
    radius, kernel = _KERNELS[encoder.resize.resample]
    rows, row_weights = _taps(sheet.height, encoder.height, radius, kernel)
    columns, column_weights = _taps(sheet.width, encoder.width, radius, kernel)
    fill = np.asarray(encoder.resize.fill, np.float32)
    total = np.zeros((encoder.height, encoder.width, 3), np.float32)
    for i in range(rows.shape[1]):
        y, y_inside = _inside(rows[:, i] - sheet.top, height)
        for j in range(columns.shape[1]):
            x, x_inside = _inside(columns[:, j] - sheet.left, width)
            values = source[y[:, None], x[None, :]].astype(np.float32)
            values[~(y_inside[:, None] & x_inside[None, :])] = fill
            values *= (row_weights[:, i, None] * column_weights[None, :, j])[:, :, None]
            total += values
    rounded: Pixels = np.clip(np.floor(total + 0.5), 0, 255).astype(np.uint8)
    return rounded


def _taps(
    source: int, target: int, radius: int, kernel: Any
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return for each target pixel its source pixels and their weights, (target, taps)."""
    centre = (np.arange(target) + 0.5) * (source / target) - 0.5
    if radius == 0:
        nearest = np.floor((np.arange(target) + 0.5) * (source / target)).astype(np.int64)
        return nearest[:, None], np.ones((target, 1), np.float32)
    first = np.floor(centre).astype(np.int64) - radius + 1
    index = first[:, None] + np.arange(2 * radius)
    weights = kernel(np.abs(index - centre[:, None]))
    weights /= weights.sum(axis=1, keepdims=True)
    return np.clip(index, 0, source - 1), weights.astype(np.float32)


def _inside(
    index: npt.NDArray[np.int64], size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    return np.clip(index, 0, size - 1), (index >= 0) & (index < size)


def _linear(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.maximum(0.0, 1.0 - x)


def _cubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    a = -0.75  # OpenCV's and PyTorch's; Pillow's, with antialiasing, is -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _lanczos(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


_KERNELS = {
    "nearest": (0, None),
    "bilinear": (1, _linear),
    "bicubic": (2, _cubic),
    "lanczos": (3, _lanczos),
}
