"""Videos to frames: which ones, of what size, and what is refused."""

from __future__ import annotations

import base64
import builtins
import io
import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rkvlmd.engine import video
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import frames
from tests.fakes import videos

LIMITS = video.Limits(
    max_bytes=1 << 20, max_pixels=1 << 20, max_seconds=60.0, frame_pixels=1 << 20, work=30.0
)


def sample(data: bytes, most: int = 5, **changes: Any) -> video.Sampled:
    return video.sample(data, replace(LIMITS, **changes), lambda _w, _h: most)


def refused(data: bytes, most: int = 5, **changes: Any) -> str:
    with pytest.raises(RkvlmdError) as error:
        sample(data, most, **changes)
    assert error.value.code == "invalid_request"
    return error.value.message


def greys(found: video.Sampled) -> list[int]:
    shown = [Image.open(io.BytesIO(frame)).convert("RGB") for frame in found.frames]
    return [image.getpixel((image.width // 2, image.height // 2))[0] for image in shown]  # type: ignore[index]


@pytest.mark.parametrize(
    ("container", "codec"),
    [("mp4", "mpeg4"), ("mp4", "libx264"), ("webm", "libvpx"), ("webm", "libvpx-vp9")],
)
def test_frames_are_spread_over_the_time(container: str, codec: str) -> None:
    found = sample(videos.film(container, codec, count=41))
    assert found.format == container
    assert [round(t, 2) for t in found.times] == [0, 1, 2, 3, 4]
    assert found.duration == pytest.approx(4.0)
    for grey, i in zip(greys(found), (0, 10, 20, 30, 40), strict=True):
        assert abs(grey - videos.level(i, 41)) <= 6


def test_a_short_video_gives_all_its_frames() -> None:
    found = sample(videos.film(count=3), most=16)
    assert len(found.frames) == 3
    assert [round(t, 2) for t in found.times] == [0, 0.1, 0.2]


def test_of_one_frame_alone_it_is_the_middle() -> None:
    found = sample(videos.film(count=41), most=1)
    assert found.times == [pytest.approx(2.0)]


def test_frames_lie_evenly_in_time_where_the_rate_changes() -> None:
    # Thirty frames in the first three seconds, then one a second.
    times = [*range(30), 40, 50, 60, 70, 80, 90]
    found = sample(videos.film(count=len(times), times=times), most=4)
    assert [round(t, 1) for t in found.times] == [0, 3, 6, 9] or [
        round(t, 1) for t in found.times
    ] == [0, 2.9, 6, 9]


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_a_long_video_may_be_a_little_off(codec: str) -> None:
    found = sample(videos.film(codec=codec, count=601, size=(32, 32)), most=4, max_seconds=70)
    for time, wanted, grey in zip(found.times, (0, 20, 40, 60), greys(found), strict=True):
        assert abs(time - wanted) <= 2
        assert abs(grey - videos.level(round(time * 10), 601)) <= 8


def test_the_budget_hears_the_size_of_the_frames() -> None:
    heard: list[tuple[int, int]] = []

    def budget(width: int, height: int) -> int:
        heard.append((width, height))
        return 2

    assert len(video.sample(videos.film(), LIMITS, budget).frames) == 2
    assert len(video.sample(videos.gif(), LIMITS, budget).frames) == 2
    assert heard == [(64, 48), (32, 24)]


def test_large_frames_become_smaller() -> None:
    found = sample(videos.film(count=3), most=1, frame_pixels=32 * 24)
    assert Image.open(io.BytesIO(found.frames[0])).size == (32, 24)
    found = sample(videos.gif(), most=1, frame_pixels=16 * 12)
    assert Image.open(io.BytesIO(found.frames[0])).size == (16, 12)


def test_a_gif_is_a_video_too() -> None:
    found = sample(videos.gif(9), most=3)
    assert found.format == "gif"
    assert found.times == [0, 2, 4]
    assert found.duration == pytest.approx(4.5)
    for grey, i in zip(greys(found), (0, 4, 8), strict=True):
        assert abs(grey - videos.level(i, 9)) <= 4


def test_what_is_transparent_in_a_gif_is_white() -> None:
    frames = [Image.new("RGBA", (8, 8), (0, 0, 0, 0)) for _ in range(2)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=100)
    assert greys(sample(file.getvalue()))[0] == 255


@given(count=st.integers(1, 500), most=st.integers(1, 70))
@settings(max_examples=60, deadline=None)
def test_evenly(count: int, most: int) -> None:
    found = frames.evenly(count, most)
    assert len(found) == min(count, most)
    assert found == sorted(set(found))
    if most > 1:
        assert (found[0], found[-1]) == (0, count - 1)
    steps = {b - a for a, b in itertools.pairwise(found)}
    assert not steps or max(steps) - min(steps) <= 1


@pytest.mark.parametrize(
    ("count", "times", "said"),
    [
        (1, [2.04], "A frame of a video, at 2.0 seconds:\n"),
        (3, [0.0, 1.25, 12.0], "3 frames of a video, at 0.0, 1.2 and 12.0 seconds:\n"),
        (2, [], "2 frames of a video, in order:\n"),
    ],
)
def test_the_line_tells_the_times(count: int, times: list[float], said: str) -> None:
    assert frames.line(count, times) == said


# --- lists of frames -----------------------------------------------------------------


def listed(frames: list[bytes], most: int) -> video.Sampled:
    text = b",".join(base64.b64encode(frame) for frame in frames)
    return video.listed(text, LIMITS, lambda: most)


def test_a_list_of_frames_is_sampled_without_reading_the_others() -> None:
    good = [videos.jpeg(videos.level(i, 9)) for i in range(9)]
    text = [base64.b64encode(frame) for frame in good]
    text[1] = text[3] = b"!!!"  # never looked at
    found = video.listed(b",".join(text), LIMITS, lambda: 3)
    assert found.frames == [good[0], good[4], good[8]]
    assert (found.times, found.format) == ([], "frames")


@pytest.mark.parametrize(
    ("frame", "code", "said"),
    [(b"", "empty_image_file", "Frame 2 of the video is empty"),
     (b"?" * 5, "invalid_base64_image", "Frame 2 of the video is not valid base64")],
)  # fmt: skip
def test_a_frame_that_is_none(frame: bytes, code: str, said: str) -> None:
    good = base64.b64encode(videos.jpeg(9))
    with pytest.raises(RkvlmdError, match=said) as error:
        video.listed(b",".join([good, frame, good]), LIMITS, lambda: 9)
    assert error.value.code == code


# --- bad videos ----------------------------------------------------------------------


def test_a_video_of_ten_hours() -> None:
    times = [0, 10, 36_000]
    long = videos.film(count=3, rate=1, times=times)
    assert "is 36001 s long; the limit is 60 s (media.max_video_seconds)" in refused(long)
    # A header that says nothing of it.
    live = videos.film("webm", "libvpx", count=3, rate=1, times=times, options={"live": "1"})
    assert "is 36000 s long; the limit is 60 s (media.max_video_seconds)" in refused(live)
    slow = videos.gif(3, seconds=40)
    assert "media.max_video_seconds" in refused(slow)


def test_a_file_of_sound() -> None:
    assert "holds no video" in refused(videos.sound())


def test_a_video_without_frames() -> None:
    # The header of a film, whose frames never came.
    webm = videos.film("webm", "libvpx", options={"live": "1"})
    cut = webm[: webm.index(b"\x1f\x43\xb6\x75")]  # the first cluster
    assert "holds no frames" in refused(cut) or "cut off" in refused(cut)


def test_an_mp4_whose_index_is_missing() -> None:
    whole = videos.film()
    assert "damaged or cut off MP4 file" in refused(whole[: len(whole) // 2])


def test_an_mp4_whose_index_leads_nowhere() -> None:
    whole = videos.film()
    at = whole.index(b"stco") + 12
    broken = whole[:at] + b"\x7f\xff\xff\xff" + whole[at + 4 :]
    assert refused(broken)


def test_a_webm_that_was_cut_gives_what_is_there() -> None:
    whole = videos.film("webm", "libvpx", count=40)
    assert 1 <= len(sample(whole[: 3 * len(whole) // 4]).frames) <= 5


@pytest.mark.parametrize(
    "data",
    [b"#EXTM3U\nhttp://127.0.0.1/a.ts\n", b"ffconcat version 1.0\nfile /etc/passwd\n",
     b"RIFF\0\0\0\0AVI LIST", videos.jpeg(9), b"\x00", b"<svg/>"],
)  # fmt: skip
def test_other_files(data: bytes) -> None:
    assert "is no MP4, WebM or GIF file" in refused(data)


def test_an_empty_file() -> None:
    assert "is empty" in refused(b"")


def test_a_codec_that_is_not_on_the_list() -> None:
    data = videos.film("matroska", "mpeg2video", count=2, rate=25)
    assert "coded as mpeg2video; known are av1, h264" in refused(data)


def test_limits_name_both_numbers_and_the_setting() -> None:
    data = videos.film(count=3)
    assert f"has {len(data)} bytes; the limit is 9 bytes (media.max_video_bytes)" in refused(
        data, max_bytes=9
    )
    for film in (data, videos.gif(size=(64, 48))):
        assert "3072 pixels; the limit is 100 pixels (media.max_video_pixels)" in refused(
            film, max_pixels=100
        )


def test_work_has_an_end() -> None:
    assert "takes longer than 0 s to decode" in refused(videos.film(), work=0.0)
    assert "takes longer than 0 s to decode" in refused(videos.gif(), work=0.0)


def test_without_the_extra_its_name_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_av(name: str, *args: Any, **more: Any) -> Any:
        if name.split(".")[0] == "av":
            raise ImportError(name)
        return real(name, *args, **more)

    data = videos.film(count=2)
    monkeypatch.setattr(builtins, "__import__", no_av)
    with pytest.raises(RkvlmdError, match=r"rkvlmd\[video\]") as error:
        sample(data)
    assert (error.value.code, error.value.status) == ("unsupported_parameter", 400)
    # What needs no package still works.
    assert sample(videos.gif()).frames


@given(st.binary(max_size=200), st.sampled_from(["mp4", "webm", "gif"]), st.integers(0, 3000))
@settings(max_examples=60, deadline=None)
def test_any_bytes_end_in_frames_or_an_error(junk: bytes, kind: str, at: int) -> None:
    base = _BASES[kind]
    data = base[: at % len(base)] + junk + base[at % len(base) + len(junk) :]
    try:
        ended_well = bool(sample(data).frames)
    except RkvlmdError as error:
        ended_well = error.status == 400
    assert ended_well


_BASES = {
    "mp4": videos.film(count=5),
    "webm": videos.film("webm", "libvpx", count=5),
    "gif": videos.gif(3),
}
