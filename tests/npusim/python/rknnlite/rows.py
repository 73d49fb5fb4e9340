"""The rows that a simulated encoder makes of a picture."""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

#: The first value of the part of a row that comes from output j is this plus j.
MARK = 7000


def number_of(pixels: npt.NDArray[np.uint8]) -> int:
    """Return the number of a picture: 24 bits, which a float32 holds exactly."""
    return zlib.crc32(np.ascontiguousarray(pixels).tobytes()) & 0xFFFFFF


def rows_of(picture: int, tokens: int, embed: int, outputs: int = 1) -> npt.NDArray[np.float32]:
    """Return the rows of a picture, marked so that a receiver can tell them when out of place.

    Shape (tokens, outputs x embed): row i holds the outputs of token i one
    after the other. Each part begins with the mark of its output, the
    picture's number, the row and a checksum over the rest.
    """
    rest = np.random.default_rng(picture).standard_normal(
        (tokens, outputs, embed), dtype=np.float32
    )
    for row in range(tokens):
        for output in range(outputs):
            part = rest[row, output]
            total = zlib.crc32(part[4:].tobytes()) & 0xFFFFFF
            part[:4] = (MARK + output, picture & 0xFFFFFF, row, total)
    return rest.reshape(tokens, outputs * embed)
