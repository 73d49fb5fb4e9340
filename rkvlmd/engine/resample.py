"""From a decoded RGB picture to an encoder's input tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from rkvlmd.engine.sample import sample
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
REDUCE_GAP = 1.45
#: Blocks of memory that Pillow keeps while it resizes one picture (its block allocator): getting
#: fresh ones for each tile takes a seventh of the time.
BLOCKS = 8


def to_inputs(
    image: Image.Image, views: Sequence[View], encoders: Sequence[Encoder], *, exact: bool
) -> list[npt.NDArray[Any]]:
    """Return the tensor of each view: batch 1, the encoder's layout and dtype; or its patches.

    uint8 for an encoder with mean and std baked in, else float32.
    """
    counts = [_floats(view, encoders[view.encoder]) for view in views]
    # One block, for which numpy asks the kernel for huge pages: as many 4 KiB pages as tiles
    # have take longer to get than their floats to compute.
    block = np.empty(sum(counts), np.float32)
    rooms = iter(np.split(block, np.cumsum(counts)[:-1]))
    return list(inputs(image, views, encoders, lambda _: next(rooms), exact=exact))


def inputs_in_turn(
    image: Image.Image, views: Sequence[View], encoders: Sequence[Encoder], *, exact: bool
) -> Iterator[npt.NDArray[Any]]:
    """Make the tensors of ``to_inputs`` one by one: each is valid until the next one is asked for.

    Those of a size are made in the same memory.
    """
    rooms: dict[int, npt.NDArray[np.float32]] = {}

    def room(count: int) -> npt.NDArray[np.float32]:
        if count not in rooms:
            rooms[count] = np.empty(count, np.float32)
        return rooms[count]

    return inputs(image, views, encoders, room, exact=exact)


def inputs(
    image: Image.Image,
    views: Sequence[View],
    encoders: Sequence[Encoder],
    room: Callable[[int], npt.NDArray[np.float32]],
    *,
    exact: bool,
) -> Iterator[npt.NDArray[Any]]:
    """Make the tensors of ``to_inputs``; ``room`` returns memory for so many floats.

    It is asked once for each view, with 0 where a tensor has memory of its own.
    """
    with _blocks_kept():
        yield from _inputs(image, views, encoders, room, exact=exact)


@contextmanager
def _blocks_kept() -> Iterator[None]:
    # Documented under "Block allocator", but not in Pillow's types.
    core: Any = Image.core  # type: ignore[attr-defined]
    before = core.get_blocks_max()
    core.set_blocks_max(BLOCKS)
    try:
        yield
    finally:
        core.set_blocks_max(before)


def _inputs(
    image: Image.Image,
    views: Sequence[View],
    encoders: Sequence[Encoder],
    room: Callable[[int], npt.NDArray[np.float32]],
    *,
    exact: bool,
) -> Iterator[npt.NDArray[Any]]:
    sheets = Sheets(image, exact=exact)
    if not exact:
        # The large sizes first: the small ones are made of them.
        for view in sorted(views, key=lambda view: -math.prod(view.cut.sizes[-1])):
            sheets.prepare(view.cut, encoders[view.encoder].resize)
    for view in views:
        encoder = encoders[view.encoder]
        floats = room(_floats(view, encoder))
        if floats.size and encoder.layout == "nchw" and encoder.resize.antialias:
            image = sheets.image(view.cut, encoder.resize)
            yield _planes(image, encoder, floats, exact=exact)
        else:
            pixels = sheets.pixels(view.cut, encoder.resize)
            yield to_tensor(pixels, encoder, exact=exact, room=floats)


def _floats(view: View, encoder: Encoder) -> int:
    """Return how many floats a view becomes, 0 if something else becomes of it."""
    if encoder.baked or encoder.patches is not None:
        return 0
    return view.cut.place.width * view.cut.place.height * 3


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
        if resize.antialias:
            return np.asarray(self.image(cut, resize))
        return _crop(self._sampled(cut, resize), cut.place, resize.fill)

    def image(self, cut: geometry.Cut, resize: Resize) -> Image.Image:
        """Return the picture of a view that is resized with antialiasing."""
        place, how = cut.place, _FILTERS[resize.resample]
        if self._is_cell(cut):
            return self._cell(cut, how)
        resized = self._resized(cut.sizes, how)
        if (place.left, place.top, place.width, place.height) == (0, 0, *resized.size):
            return resized
        sheet = Image.new("RGB", (place.width, place.height), resize.fill)
        sheet.paste(resized, (-place.left, -place.top))
        return sheet

    def prepare(self, cut: geometry.Cut, resize: Resize) -> None:
        """Resize for a view, so that ``pixels`` has it ready."""
        if resize.antialias and not self._is_cell(cut):
            self._resized(cut.sizes, _FILTERS[resize.resample])

    def _is_cell(self, cut: geometry.Cut) -> bool:
        """Whether the view alone is resized, and not the whole picture of which it is a part.

        Each part stays in the processor's cache, and nothing has to be cut out and
        kept. Together they have the pixels of the whole, but for what Pillow rounds
        between rows and columns, of which it does the cheaper ones first. That is
        more in a picture that grows, which is therefore resized as a whole.
        """
        (width, height), place = cut.sizes[-1], cut.place
        return (
            self._at_once((*cut.sizes, cut.sizes[-1]))
            and 0 <= place.left <= width - place.width
            and 0 <= place.top <= height - place.height
            and (place.width, place.height) != (width, height)
        )

    def _cell(self, cut: geometry.Cut, how: Image.Resampling) -> Image.Image:
        place = cut.place
        x, y = (have / want for have, want in zip(self._image.size, cut.sizes[-1], strict=True))
        right, bottom = place.left + place.width, place.top + place.height
        # The last ones end where the picture ends: no rounding may take them beyond.
        box = (
            x * place.left,
            y * place.top,
            min(x * right, self._image.width),
            min(y * bottom, self._image.height),
        )
        size = (place.width, place.height)
        return self._image.resize(size, how, box=box, reducing_gap=REDUCE_GAP)

    def _at_once(self, sizes: tuple[geometry.Size, ...]) -> bool:
        """Whether a view is made of the picture as it is, without the sizes in between.

        Not if one of them is larger than the picture: a picture that grows first is another one.
        """
        return not self._exact and all(
            have >= LARGE_GAP * want
            for size in sizes[:-1]
            for have, want in zip(self._image.size, size, strict=True)
        )

    def _resized(self, sizes: tuple[geometry.Size, ...], how: Image.Resampling) -> Image.Image:
        key = (sizes, how)
        if key not in self._made:
            if self._at_once(sizes):
                before = self._nearest(sizes[-1], how)
            elif len(sizes) > 1:
                before = self._resized(sizes[:-1], how)
            else:
                before = self._image
            gap = None if self._exact else REDUCE_GAP
            same = before.size == sizes[-1]
            self._made[key] = before if same else before.resize(sizes[-1], how, reducing_gap=gap)
        return self._made[key]

    def _nearest(self, size: geometry.Size, how: Image.Resampling) -> Image.Image:
        """Return the smallest picture made so far that has ``GAP`` times this size.

        None that grew: it has no more in it than the picture itself, and is another one.
        """
        found = [
            made
            for (sizes, other), made in self._made.items()
            if other == how
            and all(
                GAP * want <= have <= whole
                for have, want, whole in zip(sizes[-1], size, self._image.size, strict=True)
            )
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
                source = sample(source, size, sheet, resize)
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


def to_tensor(
    pixels: Pixels,
    encoder: Encoder,
    *,
    exact: bool = True,
    room: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[Any]:
    """Order channels and axes, and normalise unless that is baked into the encoder.

    ``mean`` and ``std`` are in the order in which the encoder sees the
    channels. What is not ``exact`` multiplies and adds once, which differs in
    the last bits. ``room`` is memory for the floats, where no patches are made.
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
    tensor = np.empty(pixels.shape, np.float32) if room is None else room.reshape(pixels.shape)
    _normalise(pixels, tensor, encoder, channel, exact=exact)
    return tensor


def _planes(
    image: Image.Image, encoder: Encoder, room: npt.NDArray[np.float32], *, exact: bool
) -> npt.NDArray[np.float32]:
    """Do what ``to_tensor`` does, a channel at a time, which Pillow takes out."""
    tensor = room.reshape(1, 3, image.height, image.width)
    for number, band in enumerate(encoder.colour.upper()):
        pixels = np.frombuffer(image.tobytes("raw", band), np.uint8).reshape(tensor.shape[2:])
        mean, std = np.float32(encoder.mean[number]), np.float32(encoder.std[number])
        _scale(pixels, tensor[0, number], mean, std, exact=exact)
    return tensor


def _normalise(
    pixels: Pixels, into: npt.NDArray[np.float32], encoder: Encoder, channel: int, *, exact: bool
) -> None:
    shape = [1] * pixels.ndim
    shape[channel] = 3
    mean = np.asarray(encoder.mean, np.float32).reshape(shape)
    std = np.asarray(encoder.std, np.float32).reshape(shape)
    _scale(pixels, into, mean, std, exact=exact)


def _scale(
    pixels: Pixels, into: npt.NDArray[np.float32], mean: Any, std: Any, *, exact: bool
) -> None:
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
