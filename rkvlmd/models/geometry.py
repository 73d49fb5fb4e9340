"""Where a picture's pixels go in the inputs of an encoder: integers in, integers out."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from rkvlmd.models.manifest import Encoder

Size = tuple[int, int]


class Place(NamedTuple):
    """A rectangle in pixels: ``left`` and ``top`` are its first column and row."""

    left: int
    top: int
    width: int
    height: int


class Cut(NamedTuple):
    """One input made of a picture.

    The whole picture is resized to each of ``sizes`` in turn; ``place`` is
    the input in the last one, and what it covers beyond it is filled.
    ``padded``: the picture is put on a ``canvas`` of the input's aspect ratio
    before it is resized. ``tile``: it is for the encoder of tiles.
    """

    sizes: tuple[Size, ...]
    place: Place
    padded: bool = False
    tile: bool = False


class Cuts(NamedTuple):
    """All inputs of a picture, in the order of its rows.

    ``rows`` x ``columns`` of them are a grid, row by row, and ``whole`` is the
    index of the one that shows everything; without a grid there is but that.
    """

    cuts: tuple[Cut, ...]
    rows: int = 0
    columns: int = 0
    whole: int | None = 0

    def cell(self, row: int, column: int) -> int:
        """Return the index of one of the grid."""
        return row * self.columns + column + (self.whole == 0)


def cut(width: int, height: int, encoder: Encoder, tile: Encoder | None = None) -> Cuts:
    """Cut a picture of this size as the encoder's rule says; ``tile`` is that of ``base_tiles``."""
    rule = encoder.resize.rule
    if rule == "tiles":
        return _tiles(width, height, encoder)
    if rule == "split":
        return _split(width, height, encoder)
    if rule == "slices":
        return _slices(width, height, encoder)
    if rule == "base_tiles" and tile is not None:
        return _base_tiles(width, height, encoder, tile)
    return Cuts((single(width, height, encoder),))


def single(width: int, height: int, encoder: Encoder) -> Cut:
    """Return the one input that shows the whole picture (its middle, for ``crop``)."""
    resize = encoder.resize
    size = (encoder.width, encoder.height)
    if resize.rule == "aspect":
        size = snapped(width, height, resize.multiple, resize.min_pixels, resize.max_pixels)
    elif resize.rule == "slices" and resize.multiple:
        return _stretch(_fitted(width, height, encoder, upscale=True))
    elif resize.rule == "split":
        first = _longest(width, height, resize.longest)
        return Cut((first, size), Place(0, 0, *size))
    elif resize.rule == "crop":
        return _crop(width, height, encoder)
    elif resize.rule in {"pad", "base_tiles", "slices"}:
        return _pad(width, height, encoder)
    return _stretch(size)


def content(width: int, height: int, encoder: Encoder) -> Place:
    """Return the largest centred rectangle of the input with the picture's aspect ratio.

    Its short side has at least the rule's ``short`` pixels, and one. The
    arithmetic is that of Janus and DeepSeek-OCR, its floats included.
    """
    least = max(1, encoder.resize.short)
    if width * encoder.height >= height * encoder.width:
        short = max(least, round(height * (encoder.width / width)))
        inner = (encoder.width, min(short, encoder.height))
    else:
        short = max(least, round(width * (encoder.height / height)))
        inner = (min(short, encoder.width), encoder.height)
    return Place((encoder.width - inner[0]) // 2, (encoder.height - inner[1]) // 2, *inner)


def canvas(width: int, height: int, size: Size) -> Place:
    """Return the smallest canvas, in source pixels, with the aspect ratio of ``size``.

    ``left`` and ``top`` say where the picture lies in it, ``width`` and
    ``height`` are the canvas's own. The picture is centred on whole pixels, as
    Rockchip's demo pads before it resizes.
    """
    if width * size[1] >= height * size[0]:
        sheet = (width, -(-width * size[1] // size[0]))
    else:
        sheet = (-(-height * size[0] // size[1]), height)
    return Place((sheet[0] - width) // 2, (sheet[1] - height) // 2, *sheet)


# --- one input -----------------------------------------------------------------------


def _stretch(size: Size) -> Cut:
    return Cut((size,), Place(0, 0, *size))


def _pad(width: int, height: int, encoder: Encoder) -> Cut:
    size = (encoder.width, encoder.height)
    if not encoder.resize.antialias:
        return _stretch(size)._replace(padded=True)
    inner = content(width, height, encoder)
    return Cut(((inner.width, inner.height),), Place(-inner.left, -inner.top, *size))


def _crop(width: int, height: int, encoder: Encoder) -> Cut:
    """Return the centre, as CLIP: the short side first, fractions of pixels cut off."""
    short = encoder.resize.short or max(encoder.width, encoder.height)
    size = (short * width // min(width, height), short * height // min(width, height))
    left, top = (size[0] - encoder.width) // 2, (size[1] - encoder.height) // 2
    return Cut((size,), Place(left, top, encoder.width, encoder.height))


def snapped(width: int, height: int, multiple: int, least: int, most: int) -> Size:
    """Return the size nearest to this one whose sides are multiples, within the pixel budget.

    The arithmetic is that of Qwen2-VL's ``smart_resize``, its floats included.
    """
    w, h = round(width / multiple) * multiple, round(height / multiple) * multiple
    if w * h > most:
        shrink = math.sqrt((height * width) / most)
        h = max(multiple, math.floor(height / shrink / multiple) * multiple)
        w = max(multiple, math.floor(width / shrink / multiple) * multiple)
    elif w * h < least:
        grow = math.sqrt(least / (height * width))
        h = math.ceil(height * grow / multiple) * multiple
        w = math.ceil(width * grow / multiple) * multiple
    if w * h > most:
        # A very long strip: its short side is one multiple already, the long one pays for it.
        short = min(w, h)
        long = max(multiple, most // short // multiple * multiple)
        return (long, short) if w > h else (short, long)
    return w, h


# --- several -------------------------------------------------------------------------


def _grid(
    size: Size, tile: Size, columns: int, rows: int, *, before: tuple[Size, ...] = ()
) -> list[Cut]:
    """Return the cells of a picture that is resized to ``size``, row by row."""
    return [
        Cut((*before, size), Place(x * tile[0], y * tile[1], *tile))
        for y in range(rows)
        for x in range(columns)
    ]


def _tiles(width: int, height: int, encoder: Encoder) -> Cuts:
    resize, side = encoder.resize, (encoder.width, encoder.height)
    columns, rows = best_grid(width, height, side, resize.min_tiles, resize.max_tiles)
    cuts = _grid((side[0] * columns, side[1] * rows), side, columns, rows)
    if len(cuts) == 1:
        return Cuts(tuple(cuts))
    whole = None
    if resize.thumbnail:
        whole = len(cuts)
        cuts.append(_stretch(side))
    return Cuts(tuple(cuts), rows, columns, whole)


def best_grid(width: int, height: int, tile: Size, least: int, most: int) -> Size:
    """Return the columns and rows of tiles whose ratio is nearest to the picture's.

    InternVL's rule: of grids with the same ratio the larger one, as long as
    the picture has more than half of its pixels.
    """
    ratio, area = width / height, width * height
    best, distance = (1, 1), math.inf
    for columns, rows in _grids(least, most):
        found = abs(ratio - columns / rows)
        if found < distance:
            best, distance = (columns, rows), found
        elif found == distance and area > 0.5 * tile[0] * tile[1] * columns * rows:
            best = (columns, rows)
    return best


@lru_cache(maxsize=16)
def _grids(least: int, most: int) -> tuple[Size, ...]:
    found = [
        (columns, rows)
        for columns in range(1, most + 1)
        for rows in range(1, most + 1)
        if least <= columns * rows <= most
    ]
    return tuple(sorted(found, key=lambda grid: grid[0] * grid[1]))


def _split(width: int, height: int, encoder: Encoder) -> Cuts:
    """Idefics3: the long side first, then up to whole inputs, then the whole of that again."""
    side = encoder.width
    first = _longest(width, height, encoder.resize.longest)
    second = _up_to_multiples(*first, side)
    columns, rows = second[0] // side, second[1] // side
    if columns * rows == 1:
        return Cuts((Cut((first, second), Place(0, 0, side, side)),))
    cuts = _grid(second, (side, side), columns, rows, before=(first,))
    whole = Cut((first, second, (side, side)), Place(0, 0, side, side))
    return Cuts((*cuts, whole), rows, columns, len(cuts))


def _longest(width: int, height: int, longest: int) -> Size:
    """Return the size with a long side of ``longest``, the other even (Idefics3's floats)."""
    ratio = width / height
    if width >= height:
        short = int(longest / ratio)
        return longest, max(1, short + short % 2)
    short = int(longest * ratio)
    return max(1, short + short % 2), longest


def _up_to_multiples(width: int, height: int, side: int) -> Size:
    ratio = width / height
    if width >= height:
        width = math.ceil(width / side) * side
        return width, max(1, math.ceil(int(width / ratio) / side)) * side
    height = math.ceil(height / side) * side
    return max(1, math.ceil(int(height * ratio) / side)) * side, height


def _slices(width: int, height: int, encoder: Encoder) -> Cuts:
    """MiniCPM-V: the whole picture, then slices that each have about one input's pixels.

    An encoder of one size cannot take sizes that follow the picture, as the
    model's own code makes them: there the whole picture is padded, and each
    slice, which is nearly square, resized to the input.
    """
    columns, rows = _slice_grid(width, height, encoder)
    if columns * rows <= 1:
        return Cuts((single(width, height, encoder),))
    side = (encoder.width, encoder.height)
    whole, cell = _pad(width, height, encoder), side
    if encoder.resize.multiple:
        whole = _stretch(_fitted(width, height, encoder, upscale=False))
        unit = encoder.resize.multiple
        wide, high = _near(width, columns), _near(height, rows)
        cell = _fit(wide / columns, high / rows, encoder.width, unit)
    cuts = _grid((cell[0] * columns, cell[1] * rows), cell, columns, rows)
    return Cuts((whole, *cuts), rows, columns, 0)


def _slice_grid(width: int, height: int, encoder: Encoder) -> Size:
    """Return the columns and rows of slices, (1, 1) for none."""
    most, side = encoder.resize.max_tiles, encoder.width
    wanted = min(math.ceil(width * height / (side * side)), most)
    best, distance = (1, 1), math.inf
    if wanted <= 1:
        return best
    ratio = math.log(width / height)
    for count in (wanted - 1, wanted, wanted + 1):
        if count == 1 or count > most:
            continue
        for columns in range(1, count + 1):
            if count % columns == 0:
                found = abs(ratio - math.log(columns / (count // columns)))
                if found < distance:
                    best, distance = (columns, count // columns), found
    return best


def _fitted(width: int, height: int, encoder: Encoder, *, upscale: bool) -> Size:
    """Return the size with about one input's pixels; a small picture grows only if ``upscale``."""
    side, unit = encoder.width, encoder.resize.multiple
    if width * height > side * side or upscale:
        return _fit(width, height, side, unit)
    return _near(width, unit), _near(height, unit)


def _fit(width: float, height: float, side: int, unit: int) -> Size:
    ratio = width / height
    high = int(side / math.sqrt(ratio))
    return _near(int(high * ratio), unit), _near(high, unit)


def _near(length: int, unit: int) -> int:
    """Return the multiple that is nearest, one at least."""
    return max(round(length / unit) * unit, unit)


def _base_tiles(width: int, height: int, encoder: Encoder, tile: Encoder) -> Cuts:
    """DeepSeek-OCR: tiles of a picture that is larger than one, then the whole of it, padded."""
    whole = _pad(width, height, encoder)
    side = (tile.width, tile.height)
    if width <= side[0] and height <= side[1]:
        return Cuts((whole,))
    resize = encoder.resize
    columns, rows = best_grid(width, height, side, resize.min_tiles, resize.max_tiles)
    cuts = _grid((side[0] * columns, side[1] * rows), side, columns, rows)
    tiles = [cut._replace(tile=True) for cut in cuts]
    return Cuts((*tiles, whole), rows, columns, len(tiles))
