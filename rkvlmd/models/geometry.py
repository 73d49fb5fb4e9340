"""Where a picture's pixels go in an encoder's input: integers alone."""

from __future__ import annotations

from typing import NamedTuple

from rkvlmd.models.manifest import Encoder


class Place(NamedTuple):
    """A rectangle in pixels: ``left`` and ``top`` are its first column and row."""

    left: int
    top: int
    width: int
    height: int


def content(width: int, height: int, encoder: Encoder) -> Place:
    """Return where a picture of this size ends up in the encoder's input.

    The whole input for ``stretch``. For ``pad`` the largest centred rectangle
    with the picture's aspect ratio, each side at least one pixel.
    """
    if encoder.resize.rule == "stretch":
        return Place(0, 0, encoder.width, encoder.height)
    if width * encoder.height >= height * encoder.width:
        inner = (encoder.width, max(1, _round(height * encoder.width, width)))
    else:
        inner = (max(1, _round(width * encoder.height, height)), encoder.height)
    return Place((encoder.width - inner[0]) // 2, (encoder.height - inner[1]) // 2, *inner)


def canvas(width: int, height: int, encoder: Encoder) -> Place:
    """Return the canvas, in source pixels, that covers the encoder's input.

    ``left`` and ``top`` say where the picture lies in it, ``width`` and
    ``height`` are the canvas's own. For ``pad`` it is the smallest one with
    the input's aspect ratio, the picture centred on whole pixels, as
    Rockchip's demo pads before it resizes.
    """
    if encoder.resize.rule == "stretch":
        return Place(0, 0, width, height)
    if width * encoder.height >= height * encoder.width:
        size = (width, -(-width * encoder.height // encoder.width))
    else:
        size = (-(-height * encoder.width // encoder.height), height)
    return Place((size[0] - width) // 2, (size[1] - height) // 2, *size)


def _round(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)
