"""Pictures that a load sends: JPEGs of any size, each different in its pixels."""

from __future__ import annotations

import base64
import io
from functools import cache, lru_cache
from typing import Any

#: The sizes that figures use: a plain camera's, and 12 megapixels.
SMALL, LARGE = (640, 480), (4000, 3000)
QUALITY = 88
#: Most pictures that are kept, so that a load does not have to draw them while it runs.
KEPT = 256


@cache
def _scene(width: int, height: int) -> Any:
    """A soft picture with the noise of a camera."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(3)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    noise = rng.integers(-3, 4, (height, width, 1), np.int16)
    pixels = np.asarray(image).astype(np.int16) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@lru_cache(maxsize=KEPT)
def photo(number: int, width: int = SMALL[0], height: int = SMALL[1]) -> str:
    """Return picture ``number`` of that size as a data URI; another number, other pixels."""
    from PIL import Image

    image = _scene(width, height).copy()
    side = min(width, height) // 2
    colour = (number * 37 % 256, number * 91 % 256, (number // 7) * 53 % 256)
    image.paste(Image.new("RGB", (side, side), colour), (side // 2, side // 2))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
