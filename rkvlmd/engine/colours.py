"""Pictures of every mode that a file can have as RGB, with white where they are transparent."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFile

#: What Pillow makes of the largest value of a grey PNG's pixels of 1, 2 and 4 bits, by raw mode:
#: their largest value, and how many steps of 8 bits one of theirs is.
_FEW_BITS = {"1": (1, 255), "L;2": (3, 85), "L;4": (15, 17)}


def stored(image: ImageFile.ImageFile) -> str:
    """Return how the file holds its pixels, as Pillow's raw modes; only before they are loaded."""
    return " ".join(str(tile.args) for tile in image.tile)


def to_rgb(image: Image.Image, stored: str) -> Image.Image:
    """Return a decoded picture in RGB; what is transparent becomes white.

    ``stored`` is what the function of that name said of it.
    """
    if image.mode.startswith("I"):
        return _grey16(image)
    transparent = image.info.get("transparency")
    if transparent is not None and image.mode != "P":
        image.info["transparency"] = transparent = _key(transparent, stored)
    if "A" in image.getbands() or transparent is not None:
        image = image.convert("RGBA") if image.mode != "RGBA" else image
        alpha = image.getchannel("A")
        if alpha.getextrema() == (255, 255):
            return image.convert("RGB")
        sheet = Image.new("RGB", image.size, (255, 255, 255))
        sheet.paste(image, mask=alpha)
        return sheet
    return image if image.mode == "RGB" else image.convert("RGB")


def _key(key: object, stored: str) -> object:
    """Return a transparent colour in the 8 bits that decoded pixels have.

    A PNG gives it in as many bits as its pixels, the lowest of a field of 16.
    """
    if isinstance(key, tuple):
        # Of 16 bits a channel the decoded pixels have the upper 8.
        return tuple(v >> 8 if stored == "RGB;16B" else v & 0xFF for v in key)
    if not isinstance(key, int):
        return key
    if stored == "1":
        # Newer releases of Pillow have turned 1 into 255 already.
        return 255 if key else 0
    most, step = _FEW_BITS.get(stored, (0xFF, 1))
    return (key & most) * step


def _grey16(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    grey = np.clip(values >> 8, 0, 255).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")
