"""Cross attention: key/value caches of an encoder as rows, and as ``librkllmrt.so`` takes them.

A row is what one token of a picture has: its keys in all layers and heads, then
its values. So pictures follow each other like rows of any other encoder, and
are kept and passed in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rkvlmd.engine import rkllm_types as types
from rkvlmd.engine.backend import Rows
from rkvlmd.errors import RkvlmdError
from rkvlmd.models.manifest import CrossAttention


def width(shape: CrossAttention) -> int:
    """Return how many floats a row has: a token's keys and values."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim


def rows_of(
    outputs: Sequence[Any], shape: CrossAttention, tokens: int, into: Rows | None = None
) -> Rows:
    """Return the two outputs of an encoder as rows, (tokens, 2 x layers x heads x dim).

    ``into`` is where they are put, else in a new array.

    Keys are (layers, tokens, kv_heads, head_dim), values (layers, kv_heads,
    head_dim, tokens), each with or without a leading dimension of one.

    Raises:
      RkvlmdError: ``engine_error`` for outputs of another shape.

    """
    layers, heads, dim = shape.layers, shape.kv_heads, shape.head_dim
    wanted = {"keys": (layers, tokens, heads, dim), "values": (layers, heads, dim, tokens)}
    found = [np.asarray(output, np.float32) for output in outputs]
    found = [a[0] if a.ndim == 5 and a.shape[0] == 1 else a for a in found]
    for array, (name, size) in zip(found, wanted.items(), strict=True):
        if array.shape != size:
            raise RkvlmdError(
                "engine_error",
                f"The encoder's {name} are {' x '.join(map(str, array.shape))} values instead of"
                f" {' x '.join(map(str, size))}.",
            )
    keys, values = found
    return np.concatenate(
        [
            keys.transpose(1, 0, 2, 3).reshape(tokens, -1),
            values.transpose(3, 0, 1, 2).reshape(tokens, -1),
        ],
        axis=1,
        out=into,
    )


@dataclass(frozen=True, slots=True)
class Caches:
    """What ``rkllm_set_cross_attn_params`` points to; must outlive the runs that use it.

    ``keys`` (layers, tokens, kv_heads, head_dim) and ``values`` (layers,
    kv_heads, head_dim, tokens) are float32, ``mask`` float32 and
    ``positions`` int32, one a token; all in C order.
    """

    keys: npt.NDArray[np.float32]
    values: npt.NDArray[np.float32]
    mask: npt.NDArray[np.float32]
    positions: npt.NDArray[np.int32]

    @property
    def param(self) -> types.CrossAttnParam:
        """The structure, with pointers into this object."""
        return types.CrossAttnParam(
            encoder_k_cache=types.pointer(self.keys, types.Floats),
            encoder_v_cache=types.pointer(self.values, types.Floats),
            encoder_mask=types.pointer(self.mask, types.Floats),
            encoder_pos=types.pointer(self.positions, types.Ints),
            num_tokens=len(self.mask),
        )


def caches(rows: Sequence[Rows], shape: CrossAttention) -> Caches:
    """Return the rows of all pictures, one after the other, as the library takes them.

    Without a picture there is one token of zeros, whose values add nothing.

    Raises:
      RkvlmdError: ``engine_error`` when a row has another length: the library
        would read past the buffer.

    """
    layers, heads, dim = shape.layers, shape.kv_heads, shape.head_dim
    half = layers * heads * dim
    for picture in rows:
        if picture.ndim != 2 or picture.shape[1] != 2 * half or picture.dtype != np.float32:
            raise RkvlmdError(
                "engine_error",
                f"A picture's rows are {' x '.join(map(str, picture.shape))}, but the model takes"
                f" rows of {2 * half}.",
            )
    whole = np.concatenate(list(rows)) if rows else np.zeros((1, 2 * half), np.float32)
    tokens = len(whole)
    return Caches(
        np.ascontiguousarray(
            whole[:, :half].reshape(tokens, layers, heads, dim).transpose(1, 0, 2, 3)
        ),
        np.ascontiguousarray(
            whole[:, half:].reshape(tokens, layers, heads, dim).transpose(1, 2, 3, 0)
        ),
        np.full(tokens, shape.mask, np.float32),
        np.arange(tokens, dtype=np.int32),
    )
