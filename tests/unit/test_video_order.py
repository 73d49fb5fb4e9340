"""``video`` orders of a prep child: what goes in and out beside the frame, and how many frames."""

from __future__ import annotations

import base64
import io
import os
from typing import Any

import msgspec
import pytest
from PIL import Image

from rkvlmd.engine import memfd, video_order
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import manifest as manifests
from rkvlmd.wire import child, frames
from tests.fakes import models, videos

#: 16 tokens a picture.
PLAIN = manifests.to_builtins(manifests.parse(msgspec.json.encode(models.tree())))


def order(encoding: Any = "raw", **changes: Any) -> child.Video:
    fields: dict[str, Any] = {
        "max_frames": 8, "max_tokens": 1000, "max_bytes": 1 << 20, "max_pixels": 1 << 20,
        "max_seconds": 60.0, "frame_pixels": 1 << 20, "seconds": 30.0,
    }  # fmt: skip
    return child.Video(id=5, encoding=encoding, manifest=PLAIN, **{**fields, **changes})


def done(asked: child.Video, data: bytes) -> tuple[child.VideoDone, list[bytes]]:
    heard: list[tuple[Any, list[bytes]]] = []

    def send(message: child.FromChild, fds: Any = ()) -> None:
        heard.append((message, [memfd.read(fd) for fd in fds]))

    before = len(os.listdir("/proc/self/fd"))
    fd = memfd.create(data)
    try:
        video_order.work(asked, [fd], send)
    finally:
        os.close(fd)
    assert len(os.listdir("/proc/self/fd")) <= before
    ((found, files),) = heard
    assert isinstance(found, child.VideoDone)
    assert (found.id, found.frames) == (5, len(files))
    return found, files


def test_frames_are_picture_files_in_memory() -> None:
    found, files = done(order(), videos.film(count=30))
    assert (found.format, len(found.times)) == ("mp4", 8)
    assert {Image.open(io.BytesIO(file)).size for file in files} == {(64, 48)}


@pytest.mark.parametrize(
    ("tokens", "frames"), [(16, 1), (40, 2), (100, 6), (1000, 8), (3, 1), (0, 1)]
)
def test_no_more_frames_than_tokens_are_left_for(tokens: int, frames: int) -> None:
    found, _ = done(order(max_tokens=tokens), videos.gif(20))
    assert found.frames == frames
    listed = b",".join(base64.b64encode(videos.jpeg(i)) for i in range(20))
    found, files = done(order("frames", max_tokens=tokens), listed)
    assert found.frames == len(files) == frames


def test_never_more_than_one_message_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_FDS", 64)
    found, _ = done(order(max_frames=500, max_tokens=1 << 20), videos.gif(80))
    assert found.frames == 64


def test_base64_is_that_of_a_video() -> None:
    found, _ = done(order("base64"), base64.b64encode(videos.gif(3)))
    assert found.format == "gif"
    with pytest.raises(RkvlmdError, match="The video is not valid base64"):
        done(order("base64"), b"%%%")


def test_the_daemon_sent_something_else() -> None:
    with pytest.raises(memfd.MemoryFileError):
        video_order.work(order(), [], lambda *_: None)
