"""Forty picture files of different sizes, modes, formats and aspect ratios, drawn here."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from PIL import Image, ImageOps

#: (width, height, mode, format, orientation): modes as files have them, EXIF orientations.
KINDS = (
    (640, 480, "RGB", "JPEG", 1), (480, 640, "RGB", "JPEG", 1), (512, 512, "RGB", "PNG", 1),
    (1024, 768, "RGB", "JPEG", 1), (768, 1024, "RGB", "PNG", 1), (1280, 720, "RGB", "JPEG", 1),
    (720, 1280, "RGB", "JPEG", 6), (900, 300, "RGB", "PNG", 1), (300, 900, "RGB", "PNG", 1),
    (1200, 200, "RGB", "JPEG", 1), (160, 1100, "RGB", "JPEG", 1), (2000, 40, "RGB", "PNG", 1),
    (37, 911, "RGB", "PNG", 1), (17, 19, "RGB", "PNG", 1), (64, 64, "RGB", "PNG", 1),
    (101, 67, "RGB", "PNG", 1), (333, 777, "RGB", "JPEG", 1), (447, 449, "RGB", "PNG", 1),
    (448, 448, "RGB", "PNG", 1), (449, 447, "RGB", "PNG", 1), (896, 448, "RGB", "JPEG", 1),
    (448, 1344, "RGB", "JPEG", 1), (513, 511, "RGB", "WEBP", 1), (1023, 1025, "RGB", "JPEG", 1),
    (641, 639, "RGB", "JPEG", 3), (640, 427, "RGB", "JPEG", 8), (427, 640, "RGB", "JPEG", 5),
    (300, 200, "RGB", "JPEG", 2), (300, 200, "RGB", "JPEG", 4), (300, 200, "RGB", "JPEG", 7),
    (500, 375, "RGBA", "PNG", 1), (375, 500, "RGBA", "WEBP", 1), (320, 240, "LA", "PNG", 1),
    (612, 792, "L", "JPEG", 1), (792, 612, "L", "PNG", 1), (850, 1100, "1", "PNG", 1),
    (256, 192, "P", "GIF", 1), (400, 600, "P", "PNG", 1), (613, 431, "CMYK", "JPEG", 1),
    (384, 384, "RGB", "WEBP", 1),
)  # fmt: skip


def name(index: int) -> str:
    """Return what a picture is called in a test's name."""
    width, height, mode, form, turn = KINDS[index]
    return f"{width}x{height}-{mode}-{form}" + (f"-turned{turn}" if turn > 1 else "")


@cache
def file(index: int) -> bytes:
    """Return the bytes of a picture: slopes, edges and noise."""
    width, height, mode, form, turn = KINDS[index]
    random = np.random.default_rng(index)
    y, x = np.mgrid[0:height, 0:width]
    planes = [
        x * 255 // max(1, width - 1), y * 255 // max(1, height - 1),
        ((x // 7 + y // 5) % 2) * 200, (x + y) % 256,
    ]  # fmt: skip
    noise = random.integers(-40, 41, (height, width, 4))
    values = np.clip(np.stack(planes, axis=2) + noise, 0, 255).astype(np.uint8)
    image = Image.fromarray(values, "RGBA")
    if mode == "P":
        image = image.convert("RGB").quantize(64)
    elif mode != "RGBA":
        image = image.convert("LA" if mode == "LA" else "RGB").convert(mode)
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = turn
    more = {"quality": 85, "exif": exif} if form == "JPEG" else {}
    more |= {"lossless": True} if form == "WEBP" else {}
    image.save(buffer, form, **more)
    return buffer.getvalue()


def opened(index: int) -> Image.Image:
    """Return the picture as Pillow's users open it: decoded whole, upright, its own mode."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(file(index))))
