"""From a decoded RGB picture to an encoder's input tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from rkvlmd.models import geometry
from rkvlmd.models.geometry import Place
from rkvlmd.models.manifest import Encoder, Patches, Resize
from rkvlmd.models.views import View

Pixels = npt.NDArray[np.uint8]

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
#: The fast path first shrinks by whole factors to no less than this many times the target.
GAP = 2.0
#: The same for targets of more than ``LARGE`` pixels, as those of pictures that are cut have:
#: resizing twice as many in each axis would take longer than everything else.
LARGE_GAP, LARGE = 0.95, 600_000
#: How far Pillow may reduce by whole numbers before it resamples, in target sizes.
REDUCE_GAP = 1.5


def to_inputs(
    image: Image.Image, views: Sequence[View], encoders: Sequence[Encoder], *, exact: bool
) -> list[npt.NDArray[Any]]:
    """Return the tensor of each view: batch 1, the encoder's layout and dtype; or its patches.

    uint8 for an encoder with mean and std baked in, else float32.
    """
    sheets = Sheets(image, exact=exact)
    if not exact:
        # The large sizes first: the small ones are made of them.
        for view in sorted(views, key=lambda view: -math.prod(view.cut.sizes[-1])):
            sheets.prepare(view.cut, encoders[view.encoder].resize)
    return [
        to_tensor(
            sheets.pixels(view.cut, encoders[view.encoder].resize),
            encoders[view.encoder],
            exact=exact,
        )
        for view in views
    ]


def frames_to_patches(
    frames: Sequence[Pixels], encoder: Encoder, patches: Patches, *, exact: bool
) -> npt.NDArray[np.float32]:
    """Return the flattened patches of ``patches.temporal`` frames of one size, as ``_flatten``.

    The last frame stands for those that are missing.
    """
    if encoder.colour == "bgr":
        frames = [pixels[:, :, ::-1] for pixels in frames]
    return _flatten(frames, encoder, patches, exact=exact)


def to_pixels(image: Image.Image, encoder: Encoder, *, exact: bool) -> Pixels:
    """Return the one input of a rule that cuts nothing, uint8 of shape (height, width, 3)."""
    return Sheets(image, exact=exact).pixels(geometry.single(*image.size, encoder), encoder.resize)


class Sheets:
    """A decoded RGB picture and the sizes to which it was resized for its views."""

    def __init__(self, image: Image.Image, *, exact: bool) -> None:
        self._image = image
        self._exact = exact
        self._source: Pixels | None = None
        self._made: dict[tuple[tuple[geometry.Size, ...], Image.Resampling], Image.Image] = {}
        self._dots: dict[Any, Pixels] = {}

    def pixels(self, cut: geometry.Cut, resize: Resize) -> Pixels:
        """Return the pixels of a view, uint8 of shape (height, width, 3)."""
        sizes, place = cut.sizes, cut.place
        if not resize.antialias:
            return _crop(self._sampled(cut, resize), place, resize.fill)
        resized = self._resized(sizes, _FILTERS[resize.resample])
        if (place.left, place.top, place.width, place.height) != (0, 0, *resized.size):
            sheet = Image.new("RGB", (place.width, place.height), resize.fill)
            sheet.paste(resized, (-place.left, -place.top))
            resized = sheet
        return np.asarray(resized)

    def prepare(self, cut: geometry.Cut, resize: Resize) -> None:
        """Resize for a view, so that ``pixels`` has it ready."""
        if resize.antialias:
            self._resized(cut.sizes, _FILTERS[resize.resample])

    def _resized(self, sizes: tuple[geometry.Size, ...], how: Image.Resampling) -> Image.Image:
        key = (sizes, how)
        if key not in self._made:
            if len(sizes) > 1:
                before = self._resized(sizes[:-1], how)
            elif self._exact:
                before = self._image
            else:
                before = self._nearest(sizes[0], how)
            gap = None if self._exact else REDUCE_GAP
            same = before.size == sizes[-1]
            self._made[key] = before if same else before.resize(sizes[-1], how, reducing_gap=gap)
        return self._made[key]

    def _nearest(self, size: geometry.Size, how: Image.Resampling) -> Image.Image:
        """Return the smallest picture made so far that has ``GAP`` times this size."""
        found = [
            made
            for (sizes, other), made in self._made.items()
            if other == how
            and all(have >= GAP * want for have, want in zip(sizes[-1], size, strict=True))
        ]
        return min(found, key=lambda made: math.prod(made.size), default=self._image)

    def _sampled(self, cut: geometry.Cut, resize: Resize) -> Pixels:
        key = (cut.sizes, cut.padded, resize.resample, resize.fill)
        if key not in self._dots:
            if self._source is None:
                self._source = np.asarray(self._image)
            source = self._source
            for number, size in enumerate(cut.sizes):
                height, width = source.shape[:2]
                sheet = Place(0, 0, width, height)
                if cut.padded and number == 0:
                    # Of the decoded picture, which may be smaller than the file's.
                    sheet = geometry.canvas(width, height, size)
                source = _sample(source, size, sheet, resize)
            self._dots[key] = source
        return self._dots[key]


def _crop(pixels: Pixels, place: Place, fill: tuple[int, int, int]) -> Pixels:
    height, width = pixels.shape[:2]
    left, top = max(0, place.left), max(0, place.top)
    right, bottom = min(width, place.left + place.width), min(height, place.top + place.height)
    inner = pixels[top:bottom, left:right]
    if inner.shape[:2] == (place.height, place.width):
        return inner
    sheet = np.empty((place.height, place.width, 3), np.uint8)
    sheet[:] = fill
    x, y = left - place.left, top - place.top
    sheet[y : y + inner.shape[0], x : x + inner.shape[1]] = inner
    return sheet


def to_tensor(pixels: Pixels, encoder: Encoder, *, exact: bool = True) -> npt.NDArray[Any]:
    """Order channels and axes, and normalise unless that is baked into the encoder.

    ``mean`` and ``std`` are in the order in which the encoder sees the
    channels. What is not ``exact`` multiplies and adds once, which differs in
    the last bits.
    """
    if encoder.colour == "bgr":
        pixels = pixels[:, :, ::-1]
    if encoder.patches is not None:
        return _flatten([pixels], encoder, encoder.patches, exact=exact)
    channel = 1 if encoder.layout == "nchw" else 3
    # In bytes, a quarter of the floats to move.
    pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1) if channel == 1 else pixels)[None]
    if encoder.baked:
        return pixels
    tensor = np.empty(pixels.shape, np.float32)
    _normalise(pixels, tensor, encoder, channel, exact=exact)
    return tensor


def _normalise(
    pixels: Pixels, into: npt.NDArray[np.float32], encoder: Encoder, channel: int, *, exact: bool
) -> None:
    shape = [1] * pixels.ndim
    shape[channel] = 3
    mean = np.asarray(encoder.mean, np.float32).reshape(shape)
    std = np.asarray(encoder.std, np.float32).reshape(shape)
    if not exact:
        np.multiply(pixels, 1 / (255 * std), out=into)
        into -= mean / std
        return
    # This order, in float32, is what the published image processors compute.
    into[...] = pixels
    into /= np.float32(255)
    into -= mean
    into /= std


def _flatten(
    frames: Sequence[Pixels], encoder: Encoder, patches: Patches, *, exact: bool
) -> npt.NDArray[np.float32]:
    """Return flattened patches, (patches, 3 x temporal x size x size), merged ones together.

    The order is that of Qwen2-VL's image processor: block rows, block columns,
    rows and columns in a block; in a patch channels, times, rows, columns. One
    block row at a time stays in the processor's cache. ``frames`` are those of
    the times, the last one also of all that are missing.
    """
    size, merge, times = patches.size, patches.merge, patches.temporal
    band = size * merge
    bands, columns = frames[0].shape[0] // band, frames[0].shape[1] // band
    flat = np.empty((bands, columns, merge, merge, 3, times, size, size), np.float32)
    for i, rows in enumerate(flat):
        for time, pixels in enumerate(frames):
            strip = pixels[i * band : (i + 1) * band, : columns * band].transpose(2, 0, 1)
            planes = np.empty(strip.shape, np.float32)
            _normalise(np.ascontiguousarray(strip), planes, encoder, 0, exact=exact)
            cells = planes.reshape(3, merge, size, columns, merge, size).transpose(3, 1, 4, 0, 2, 5)
            rows[:, :, :, :, time:] = cells[:, :, :, :, None]
    return flat.reshape(bands * columns * merge * merge, -1)


# --- without antialiasing ------------------------------------------------------------


def _sample(source: Pixels, size: geometry.Size, sheet: Place, resize: Resize) -> Pixels:
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
