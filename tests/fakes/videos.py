"""Small videos, drawn frame by frame: frame ``i`` of ``n`` is grey of the level ``level(i, n)``."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import av
import numpy as np
from PIL import Image


def level(i: int, count: int) -> int:
    """Return the grey of a frame."""
    return 20 + 200 * i // max(1, count - 1)


def film(
    container: str = "mp4",
    codec: str = "mpeg4",
    *,
    count: int = 40,
    rate: int = 10,
    size: tuple[int, int] = (64, 48),
    times: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
) -> bytes:
    """Return a video file; ``times`` are those of the frames in units of 1 / ``rate`` seconds."""
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=options or {}) as out:
        stream: Any = out.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.options = {"g": "10"}
        for i in range(count):
            pixels = np.full((size[1], size[0], 3), level(i, count), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts = i if times is None else times[i]
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def sound() -> bytes:
    """Return an MP4 file without any picture in it."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream: Any = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def gif(count: int = 6, *, seconds: float = 0.5, size: tuple[int, int] = (32, 24)) -> bytes:
    """Return an animated GIF."""
    frames = [Image.new("L", size, level(i, count)) for i in range(count)]
    file = io.BytesIO()
    frames[0].save(
        file, "GIF", save_all=True, append_images=frames[1:], duration=int(1000 * seconds)
    )
    return file.getvalue()


def jpeg(grey: int, size: tuple[int, int] = (32, 24)) -> bytes:
    """Return a JPEG of one grey."""
    file = io.BytesIO()
    Image.new("L", size, grey).save(file, "JPEG")
    return file.getvalue()


def uri(data: bytes, kind: str = "video/mp4") -> str:
    """Return a data URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def frames_uri(frames: Sequence[bytes]) -> str:
    """Return the data URI of a list of frames."""
    texts = (base64.b64encode(frame).decode() for frame in frames)
    return "data:video/jpeg;base64," + ",".join(texts)
