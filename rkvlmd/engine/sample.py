"""Resizing without antialiasing, as OpenCV and PyTorch do it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rkvlmd.models.geometry import Place, Size
from rkvlmd.models.manifest import Resize

Pixels = npt.NDArray[np.uint8]


def sample(source: Pixels, size: Size, sheet: Place, resize: Resize) -> Pixels:
    """Sample without antialiasing, pixel centres on pixel centres as in OpenCV and PyTorch.

    ``source`` lies at ``sheet``'s left and top in a canvas of its size. Only
    as many source pixels as the kernel has taps count, however much the
    picture shrinks. Memory follows the target's size, never the source's.
    """
    height, width = source.shape[:2]
    radius, kernel = _KERNELS[resize.resample]
    rows, row_weights = _taps(sheet.height, size[1], radius, kernel)
    columns, column_weights = _taps(sheet.width, size[0], radius, kernel)
    fill = np.asarray(resize.fill, np.float32)
    total = np.zeros((size[1], size[0], 3), np.float32)
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
