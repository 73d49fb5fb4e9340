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


def caches_of(
    picture: int, tokens: int, layers: int, heads: int, dim: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the keys (layers, tokens, heads, dim) and values (layers, heads, dim, tokens).

    Each key says its place, and each value says half a more, so that a
    receiver can tell one that is out of place; every float32 is exact.
    """
    layer, head, number = np.meshgrid(
        np.arange(layers), np.arange(heads), np.arange(dim), indexing="ij"
    )
    place = (layer * heads + head) * dim + number
    first = layers * heads * dim * (1 + np.arange(tokens)) + (picture % 4096)
    keys = (place[:, None] + first[None, :, None, None]).astype(np.float32)
    return keys, np.ascontiguousarray(keys.transpose(0, 2, 3, 1) + np.float32(0.5))


def rows_of(picture: int, tokens: int, embed: int, outputs: int = 1) -> npt.NDArray[np.float32]:
    """Return the rows of a picture, marked so that a receiver can tell them when out of place.

    Shape (tokens, outputs x embed): row i holds the outputs of token i one
    after the other. Each part begins with the mark of its output, the
    picture's number, the row and a checksum over the rest.
    """
    # Numbers of (-1, 1) by a mix of 32 bits; NumPy's generators would add 2 MB to the encoder
    # child that no real library needs.
    bits = np.arange(tokens * outputs * embed, dtype=np.uint32)
    bits += np.uint32(picture * 0x9E3779B1 & 0xFFFFFFFF)
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        bits ^= bits >> np.uint32(shift)
        bits *= np.uint32(factor)
    signed = bits.view(np.int32).astype(np.float32)
    rest = (signed * np.float32(2**-31)).reshape(tokens, outputs, embed)
    for row in range(tokens):
        for output in range(outputs):
            part = rest[row, output]
            total = zlib.crc32(part[4:].tobytes()) & 0xFFFFFF
            part[:4] = (MARK + output, picture & 0xFFFFFF, row, total)
    return rest.reshape(tokens, outputs * embed)
