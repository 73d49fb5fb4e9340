"""How much faster the fast path is than decoding everything, and what it costs in pixels."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from rkvlmd.engine import pictures, resample
from rkvlmd.models.manifest import Encoder

_LIMITS = pictures.Limits(max_bytes=1 << 30, max_pixels=1 << 30, min_side=1, max_aspect=1 << 30)


def measure(data: bytes, encoder: Encoder, repeats: int = 5) -> dict[str, Any]:
    """Time a picture file from bytes to encoder input in three ways, medians in seconds.

    ``plain_seconds`` is Pillow as in its tutorial: open, convert, turn,
    resize. ``error_mean`` and ``error_max`` are absolute differences between
    the fast and the exact pixels, on the scale 0..255.
    """
    times = {
        "plain_seconds": _median(lambda: _plain(data, encoder), repeats),
        "exact_seconds": _median(lambda: _prepare(data, encoder, exact=True), repeats),
        "fast_seconds": _median(lambda: _prepare(data, encoder, exact=False), repeats),
    }
    pixels = encoder_of_pixels(encoder)
    fast, exact = (
        pictures.prepare(data, pixels, _LIMITS, exact=e).tensor.astype(np.int16)
        for e in (False, True)
    )
    difference = np.abs(fast - exact)
    return times | {
        "speedup": times["plain_seconds"] / times["fast_seconds"],
        "error_mean": float(difference.mean()),
        "error_max": int(difference.max()),
    }


def encoder_of_pixels(encoder: Encoder) -> Encoder:
    """Return an encoder of the same geometry whose input is plain pixels, 0..255."""
    return Encoder(
        engine=encoder.engine,
        file=encoder.file,
        sha256=encoder.sha256,
        width=encoder.width,
        height=encoder.height,
        resize=encoder.resize,
        tokens=encoder.tokens,
        embedding=encoder.embedding,
        baked=True,
    )


def _prepare(data: bytes, encoder: Encoder, *, exact: bool) -> npt.NDArray[Any]:
    return pictures.prepare(data, encoder, _LIMITS, exact=exact).tensor


def _plain(data: bytes, encoder: Encoder) -> npt.NDArray[Any]:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)).convert("RGB"))
    return resample.to_tensor(resample.to_pixels(image, encoder, exact=True), encoder)


def _median(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
