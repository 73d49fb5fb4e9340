"""A JPEG of 12 megapixels from bytes to encoder input, and what the fast path costs in pixels."""

from __future__ import annotations

import io
import statistics

from .figures import Figure, significant, spread

LEAST_RATIO = 3.0
WIDTH, HEIGHT = 4000, 3000
QUALITY = 90
REPEATS = 9
#: Encoder inputs that are measured, pixels; the first one has the target.
SIDES = (448, 224, 512)


def run(*, repeats: int = REPEATS) -> list[Figure]:
    """Measure the fast path against decode-everything-then-resize with Pillow, and its error.

    The error is the absolute difference between its pixels and the exact path's.
    Each repeat times all the ways once, one after the other, so that a machine
    that is busy for a while is so for all of them; the figures are medians.
    """
    from rkvlmd.engine import picture_speed
    from rkvlmd.models.manifest import Encoder

    data = _photo()
    figures = []
    for side in SIDES:
        encoder = Encoder(
            engine="onnx", file="", sha256="", width=side, height=side, tokens=1, embedding=1
        )
        found = [picture_speed.measure(data, encoder, 1) for _ in range(repeats)]
        middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
        figures.append(
            Figure(
                f"12-megapixel JPEG to {side}x{side}: speed-up",
                middle["speedup"],
                "x",
                least=LEAST_RATIO if side == SIDES[0] else None,
                detail={
                    "file_bytes": len(data),
                    "error_scale": "0..255",
                    **{key: significant(value) for key, value in middle.items()},
                    "speedup_spread": spread([one["speedup"] for one in found]),
                },
            )
        )
        figures += [
            Figure(f"12-megapixel JPEG to {side}x{side}: error, {what}", middle[key], "of 255")
            for what, key in (("mean", "error_mean"), ("largest", "error_max"))
        ]
    return figures


def _photo() -> bytes:
    """Soft colours, edges and a little noise, as a camera would give: seeded."""
    import numpy as np
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(7)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
    image = coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(60):
        x, y, size = (int(v) for v in rng.integers(0, [WIDTH, HEIGHT, 500]))
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        draw.ellipse((x, y, x + size + 20, y + size + 20), fill=colour)
    noise = rng.normal(0, 4, (HEIGHT, WIDTH, 1)).astype(np.float32)
    pixels = np.clip(np.asarray(image, np.float32) + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY, subsampling="4:2:0")
    return file.getvalue()
