"""Hidden states, or a picture's rows, to the one vector that ``/v1/embeddings`` gives."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rkvlmd.errors import RkvlmdError
from rkvlmd.models.manifest import Embeddings

Floats = npt.NDArray[np.float32]


def pooled(blocks: Sequence[Floats], how: Embeddings) -> npt.NDArray[np.float64]:
    """Return one vector of float64, from float32 blocks of (places, size) in order.

    Raises:
      RkvlmdError: ``engine_error`` when there is none, or a value is no number.

    """
    blocks = [block.reshape(-1, block.shape[-1]) for block in blocks if block.size]
    if not blocks:
        raise RkvlmdError("engine_error", "The model gave nothing to make an embedding of.")
    if how.pool == "last":
        found: npt.NDArray[np.float64] = blocks[-1][-1].astype(np.float64)
    elif how.pool == "first":
        found = blocks[0][0].astype(np.float64)
    else:
        count = sum(len(block) for block in blocks)
        found = np.sum([b.sum(axis=0, dtype=np.float64) for b in blocks], axis=0) / count
    if not np.isfinite(found).all():
        raise RkvlmdError("engine_error", "The embedding holds a value that is not a number.")
    return found


def vector(blocks: Sequence[Floats], how: Embeddings, size: int = 0) -> Floats:
    """Return the vector: pooled, its first ``size`` floats (0: all), of length one where so said.

    A vector of zeros stays one: it has no direction.
    """
    found = pooled(blocks, how)
    if size:
        found = found[:size]
    if how.normalise:
        length = float(np.linalg.norm(found))
        found = found / length if length > 0 else found
    return np.ascontiguousarray(found, np.float32)


def text(values: Floats) -> str:
    """Return float32 values as base64 of their bytes, little endian: OpenAI's compact form."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")
