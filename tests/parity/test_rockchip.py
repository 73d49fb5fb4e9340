"""Rockchip's rule against OpenCV: a grey square, then bilinear without antialiasing.

OpenCV computes 8-bit pictures with weights of 11 bits, we with float32: one
level of 255 may lie between them.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from rkvlmd.engine import resample
from rkvlmd.models.manifest import Encoder, Resize
from tests.parity import pictures as files

#: The demo's 127.5, as an 8-bit matrix of OpenCV keeps it.
GREY = (128, 128, 128)
TOLERANCE = 1


def encoder(width: int, height: int) -> Encoder:
    resize = Resize(rule="pad", resample="bilinear", antialias=False, fill=GREY)
    return Encoder(
        engine="rknn", file="v.rknn", sha256="0" * 64, width=width, height=height, tokens=4,
        embedding=8, baked=True, layout="nhwc", resize=resize,
    )  # fmt: skip


def demo(image: Any, side: int) -> Any:
    """Do what Rockchip's demo does: ``expand2square``, then ``cv::resize``."""
    height, width = image.shape[:2]
    size = max(height, width)
    top, left = (size - height) // 2, (size - width) // 2
    square = cv2.copyMakeBorder(
        image, top, size - height - top, left, size - width - left, cv2.BORDER_CONSTANT,
        value=(127.5, 127.5, 127.5),
    )  # fmt: skip
    return cv2.resize(square, (side, side), interpolation=cv2.INTER_LINEAR)


@pytest.mark.parametrize("index", range(len(files.KINDS)), ids=files.name)
def test_the_grey_square(index: int) -> None:
    image = files.opened(index).convert("RGB")
    side = 392 if index % 2 else 448
    found = resample.to_pixels(image, encoder(side, side), exact=index % 3 == 0)
    wanted = demo(np.asarray(image), side)
    assert found.shape == wanted.shape
    assert np.abs(found.astype(int) - wanted).max() <= TOLERANCE


def test_the_grey_itself() -> None:
    made = demo(np.zeros((1, 3, 3), np.uint8), 3)
    assert (made[0] == GREY).all()
    found = resample.to_pixels(Image.new("RGB", (3, 1)), encoder(3, 3), exact=True)
    assert np.array_equal(found, made)
