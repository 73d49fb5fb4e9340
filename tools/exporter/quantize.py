"""Rounds float32 matrices to 8 or 4 bits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

#: Weights of one 4-bit scale; 32 is what all CPU kernels of MatMulNBits have.
BLOCK = 32

Floats = npt.NDArray[np.float32]


def rows(weight: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """Return a matrix (rows, columns) as int8 with one scale a row, symmetric."""
    scales = np.abs(weight).max(axis=1) / 127.0
    scales[scales == 0] = 1.0
    small = np.clip(np.rint(weight / scales[:, None]), -127, 127).astype(np.int8)
    return small, scales.astype(np.float32)


def blocks(weight: Floats) -> tuple[npt.NDArray[np.uint8], Floats]:
    """Return a matrix (outputs, inputs) as MatMulNBits takes it, 4 bits, zero point 8.

    The first array is (outputs, blocks, BLOCK / 2), two weights a byte, the
    first one in the low half; the second holds the scales, (outputs x blocks,).
    The value of largest magnitude in a block becomes -8, which uses all 16 steps.
    """
    n, k = weight.shape
    block = weight.reshape(n, k // BLOCK, BLOCK)
    at = np.abs(block).argmax(axis=2)[..., None]
    scales = np.take_along_axis(block, at, axis=2)[..., 0] / -8.0
    divide = np.where(scales == 0, 1.0, scales)
    small = np.clip(np.rint(block / divide[..., None]) + 8, 0, 15).astype(np.uint8)
    packed = small[..., 0::2] | small[..., 1::2] << 4
    return packed, scales.astype(np.float32).reshape(-1)
