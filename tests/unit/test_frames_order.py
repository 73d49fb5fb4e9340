"""``frames`` orders of a prep child: frames in memory files become one input, in every form."""

from __future__ import annotations

import base64
import os
from typing import Any

import msgspec
import numpy as np
import pytest

from rkvlmd.engine import frames_order, memfd, video_order
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import manifest as manifests
from rkvlmd.wire import child
from tests.fakes import videos
from tests.unit.test_films import manifest

PLAIN = manifests.to_builtins(manifest())
SIZE = (56, 28)


def order(**changes: Any) -> child.Frames:
    fields: dict[str, Any] = {
        "manifest": PLAIN, "size": SIZE, "max_bytes": 1 << 20, "max_pixels": 1 << 20,
    }  # fmt: skip
    return child.Frames(id=5, **fields | changes)


def work(role: Any, asked: Any, *files: bytes) -> tuple[Any, list[Any]]:
    """Return the answer, and its memory files as arrays or bytes."""
    heard: list[Any] = []

    def send(message: Any, fds: Any = ()) -> None:
        views = getattr(message, "views", None)
        read = [memfd.read(fd) for fd in fds]
        if views is not None:
            read = [
                np.frombuffer(data, view.tensor.dtype).reshape(view.tensor.shape)
                for data, view in zip(read, views, strict=True)
            ]
        heard.append((message, read))

    before = len(os.listdir("/proc/self/fd"))
    fds = [memfd.create(data) for data in files]
    try:
        role.work(asked, fds, send)
    finally:
        for fd in fds:
            os.close(fd)
    assert len(os.listdir("/proc/self/fd")) <= before
    ((message, read),) = heard
    return message, read


def made(*greys: int, **changes: Any) -> tuple[child.PictureDone, Any]:
    files = [videos.jpeg(grey, (64, 48)) for grey in greys]
    message, (array,) = work(frames_order, order(**changes), *files)
    return message, array


def test_both_frames_are_in_each_patch() -> None:
    done, array = made(0, 255)
    (view,) = done.views
    assert (view.tokens, view.patches, view.grid) == (2, (1, 2, 4), (1, 1, 2))
    assert (done.layout, done.width, done.height) == ([0], *SIZE)
    assert array.shape == (8, 3 * 2 * 14 * 14)
    assert array.dtype == np.float32
    times = array.reshape(8, 3, 2, 14, 14)
    assert np.all(times[:, :, 0] == 0)
    assert np.all(times[:, :, 1] == 1)


def test_the_last_frame_stands_for_one_that_is_missing() -> None:
    _, twice = made(100, 100)
    one, alone = made(100)
    assert np.array_equal(alone, twice)
    assert one.sha256 != made(100, 100)[0].sha256


def test_the_hash_is_that_of_the_frames_in_their_order() -> None:
    assert made(10, 20)[0].sha256 == made(10, 20)[0].sha256
    assert len({made(*greys)[0].sha256 for greys in ((10, 20), (20, 10), (10, 10), (20,))}) == 4


def test_frames_of_other_sizes_have_the_videos() -> None:
    files = [videos.jpeg(0, (64, 48)), videos.jpeg(255, (20, 90))]
    _, (array,) = work(frames_order, order(), *files)
    assert array.shape == (8, 1176)


def test_what_is_no_frame_is_named() -> None:
    good = videos.jpeg(9)
    with pytest.raises(RkvlmdError, match="A frame of the video is a damaged"):
        work(frames_order, order(), good, good[:60])
    with pytest.raises(RkvlmdError, match="A frame of the video is no JPEG"):
        work(frames_order, order(), b"nothing")
    with pytest.raises(RkvlmdError, match="A frame of the video has 768 pixels"):
        work(frames_order, order(max_pixels=700), good)


def test_the_daemon_sent_something_else() -> None:
    good = videos.jpeg(9)
    for files in ((), (good,) * 3):
        with pytest.raises(memfd.MemoryFileError):
            work(frames_order, order(), *files)
    pictures = manifests.to_builtins(manifest(video=None))
    with pytest.raises(memfd.MemoryFileError):
        work(frames_order, order(manifest=pictures), good)


def sampled(data: bytes, encoding: Any = "raw", **changes: Any) -> tuple[child.VideoDone, int]:
    fields: dict[str, Any] = {
        "manifest": PLAIN, "max_frames": 8, "max_tokens": 400, "max_bytes": 1 << 20,
        "max_pixels": 1 << 20, "max_seconds": 60.0, "frame_pixels": 1 << 20, "seconds": 30.0,
    }  # fmt: skip
    asked = child.Video(id=5, encoding=encoding, **fields | changes)
    done, files = work(video_order, asked, data)
    return done, len(files)


def test_whole_patches_in_time_are_sampled() -> None:
    gif = videos.gif(20)
    assert sampled(gif)[1] == 8
    assert sampled(gif, max_frames=7)[1] == 6
    assert sampled(gif, max_frames=1)[1] == 1
    done, count = sampled(videos.gif(3))
    assert (count, done.width, done.height) == (3, 32, 24)
    listed = b",".join(base64.b64encode(videos.jpeg(i, (30, 50))) for i in range(20))
    done, count = sampled(listed, "frames", max_frames=5)
    assert (count, done.width, done.height) == (4, 30, 50)


def test_fewer_frames_where_even_the_smallest_do_not_fit() -> None:
    large = msgspec.structs.replace(
        manifest(), video=manifests.Video(content="<v>", min_pixels=784 * 50)
    )
    plain = manifests.to_builtins(large)
    assert sampled(videos.gif(20), manifest=plain, max_tokens=150)[1] == 4
    assert sampled(videos.gif(20), manifest=plain, max_tokens=1)[1] == 2


def test_a_first_frame_that_is_no_picture_is_named() -> None:
    listed = base64.b64encode(b"nothing") + b"," + base64.b64encode(videos.jpeg(1))
    with pytest.raises(RkvlmdError, match="The first frame of the video is no JPEG"):
        sampled(listed, "frames")
