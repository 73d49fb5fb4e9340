"""From the last byte of a request to the first token of its answer, with a new picture each time."""

from __future__ import annotations

import base64
import io
import statistics
from pathlib import Path
from typing import Any

from rkvlmd.ctl.client import Client

from . import idle, process
from .client import Stream, text_of
from .figures import BenchError, Figure, percentile, significant, spread

#: Targets in milliseconds.
MOST = 60.0
REPEATS = 50
WARM_UP = 5
SIDE = 448
_QUESTION = "What is in this picture?"
_STAGES = ("queue", "prepare", "load", "encode", "prefill", "first_token")


def run(*, repeats: int = REPEATS, models: Path | None = None, model: str = "") -> list[Figure]:
    """Ask about ``repeats`` different pictures, one after the other, of a loaded model.

    Raises:
      BenchError: there is no model.

    """
    pictures = [_picture(seed) for seed in range(WARM_UP + repeats)]
    waits: list[float] = []
    stages: dict[str, list[float]] = {stage: [] for stage in _STAGES}
    with process.running(models=models) as daemon:
        with Client(daemon.control) as client:
            name = idle.choose(client, model)
            if not name:
                raise BenchError("there is no model; give one with --models")
            client.call("load", {"model": name}, progress=lambda _: None)
        for number, picture in enumerate(pictures):
            wait, timings = _ask(daemon, _body(picture, name))
            if number < WARM_UP:
                continue
            waits.append(wait)
            for stage, seconds in stages.items():
                seconds.append(float(timings.get(stage, 0)) * 1000)
    detail: dict[str, Any] = {
        "model": name,
        "picture": f"{SIDE}x{SIDE} PNG of {len(pictures[0])} bytes",
        **spread(waits),
        "server_medians": {
            stage: significant(statistics.median(values)) for stage, values in stages.items()
        },
    }
    return [
        Figure("first token, warm: median", statistics.median(waits), "ms", MOST, detail=detail),
        Figure("first token, warm: p90", percentile(waits, 0.9), "ms"),
    ]


def _ask(daemon: process.Daemon, body: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Return the wait for the first text in milliseconds, and the server's own timings."""
    first = None
    timings: dict[str, Any] = {}
    with Stream(daemon.host, daemon.port, body) as stream:
        stream.send()
        while not stream.ended:
            read = stream.read()
            for event in stream.events(read.data):
                if first is None and text_of(event):
                    first = read.at
                timings = event.get("timings") or timings
    if first is None:
        raise BenchError("the answer has no text")
    return (first - stream.sent_at) / 1e6, timings


def _body(picture: bytes, model: str) -> dict[str, Any]:
    uri = "data:image/png;base64," + base64.b64encode(picture).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "text", "text": _QUESTION},
    ]
    messages = [{"role": "user", "content": parts}]
    return {"model": model, "messages": messages, "max_tokens": 8, "temperature": 0}


def _picture(seed: int) -> bytes:
    """A few shapes and the noise of a camera, so that the PNG is as large as that of a photo."""
    import numpy as np
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (SIDE, SIDE), tuple(rng.integers(8, 248, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for shape in (draw.ellipse, draw.rectangle, draw.ellipse):
        left, top, size = rng.integers([0, 0, 60], [300, 300, 140]).tolist()
        colour = tuple(rng.integers(8, 248, 3).tolist())
        shape((left, top, left + size, top + size), fill=colour)
    noise = rng.integers(-4, 5, (SIDE, SIDE, 3))
    file = io.BytesIO()
    Image.fromarray((np.asarray(image) + noise).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
