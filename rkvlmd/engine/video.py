"""Untrusted video bytes to a few frames, each a picture file: limits, sampling, decoding."""

from __future__ import annotations

import io
import math
import sys
import time
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import GifImagePlugin, Image

from rkvlmd.engine import pictures
from rkvlmd.errors import RkvlmdError
from rkvlmd.models.frames import evenly

#: What is accepted inside MP4 and WebM; every other decoder stays closed to clients.
CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mpeg4"})
#: FFmpeg's names of the containers. Named, so that it guesses no other: some of its other
#: formats are lists of further files.
_CONTAINERS = {"mp4": "mp4", "webm": "matroska"}
#: Most frames in a file: 15 minutes at 240 a second, and more than any camera makes.
MOST_FRAMES = 250_000
#: Not compressed: that would take longer than decoding the video, for files that live a second.
_PNG_LEVEL = 0
#: How far from its place a frame may lie that costs less to decode, as a share of the distance.
_SLACK = 0.1
#: With more frames than this to each that is taken, those that no other is built on are skipped;
#: the one that is wanted then comes a few frames later.
_SKIP = 16
#: Each thread takes memory for frames of its own; two let a long one of 1080 lines be done in time.
_THREADS = 2
_TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}

#: Width and height of the frames to how many of them may be taken.
Budget = Callable[[int, int], int]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a video may be: ``[media]`` of the settings.

    A frame with more than ``frame_pixels`` is made smaller; ``work`` is the
    time that all of it may take, seconds.
    """

    max_bytes: int
    max_pixels: int
    max_seconds: float
    frame_pixels: int
    work: float


@dataclass(frozen=True, slots=True)
class Sampled:
    """``frames`` are picture files, ``times`` seconds from the start; none where unknown."""

    frames: list[bytes]
    times: list[float]
    duration: float
    format: str


def sniff(data: bytes) -> str | None:
    """Return the format that the first bytes say: ``mp4``, ``webm`` (or Matroska) or ``gif``."""
    if data[4:8] == b"ftyp":
        return "mp4"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "webm"
    if data[:6] in {b"GIF87a", b"GIF89a"}:
        return "gif"
    return None


def sample(data: bytes, limits: Limits, budget: Budget) -> Sampled:
    """Return frames of a video file, evenly over its time.

    Raises:
      RkvlmdError: each way in which the file is no video within the limits.

    """
    _check_bytes(len(data), limits)
    kind = sniff(data)
    if kind is None:
        raise _bad("is no MP4, WebM or GIF file.")
    clock = _Clock(limits.work)
    try:
        if kind == "gif":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _gif(data, limits, budget, clock)
        return _film(data, kind, limits, budget, clock)
    except RkvlmdError:
        raise
    except MemoryError:
        raise _bad("needs more memory than one video may take.") from None
    except Exception as exc:  # noqa: BLE001 - hostile bytes make a decoder raise nearly anything
        print(f"video ({kind}): {type(exc).__name__}: {str(exc)[:200]!r}", file=sys.stderr)
        raise _bad(f"is a damaged or cut off {_NAMES[kind]} file.") from None


def listed(text: bytes, limits: Limits, budget: Callable[[], int]) -> Sampled:
    """Return frames of a list of pictures in base64, joined by commas; those not taken stay unread.

    Raises:
      RkvlmdError: a frame is empty, too large or no base64.

    """
    parts = text.split(b",")
    alone = pictures.Limits(limits.max_bytes, limits.max_pixels, 1, 1)
    frames = []
    for index in evenly(len(parts), budget()):
        try:
            frames.append(pictures.from_base64(parts[index], alone))
        except RkvlmdError as exc:
            said = exc.message.replace("The picture", f"Frame {index + 1} of the video", 1)
            raise RkvlmdError(exc.code, said) from None
    return Sampled(frames, [], 0.0, "frames")


def _check_bytes(size: int, limits: Limits) -> None:
    if size == 0:
        raise _bad("is empty.")
    if size > limits.max_bytes:
        raise _bad(
            f"has {size} bytes; the limit is {limits.max_bytes} bytes (media.max_video_bytes)."
        )


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width < 1 or height < 1:
        raise _bad("has frames without a size.")
    if width * height > limits.max_pixels:
        raise _bad(
            f"has frames of {width}x{height}, {width * height} pixels; the limit is"
            f" {limits.max_pixels} pixels (media.max_video_pixels)."
        )


def _check_length(seconds: float, limits: Limits) -> None:
    if not seconds <= limits.max_seconds:
        raise _bad(
            f"is {seconds:.0f} s long; the limit is {limits.max_seconds:g} s"
            " (media.max_video_seconds)."
        )


class _Clock:
    """Ends work that takes too long, before the whole process is ended for it."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until = time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self._until:
            raise _bad(
                f"takes longer than {self._seconds:g} s to decode; send a shorter or smaller one."
            )


# --- MP4 and WebM --------------------------------------------------------------------


def _film(data: bytes, kind: str, limits: Limits, budget: Budget, clock: _Clock) -> Sampled:
    av = _library()
    with _opened(av, data, kind) as container:
        stream = _stream(container, limits)
        _check_length((container.duration or 0) / av.time_base, limits)
        stamps, keys = _stamps(container, stream, limits, clock)
        unit = float(stream.time_base)
        size = stream.codec_context.width, stream.codec_context.height
    duration = (stamps[-1] - stamps[0]) * unit
    wanted = _spread(stamps, keys, budget(*size))
    # Opened again: what reading to the end has left behind in the demuxer is not relied upon.
    with _opened(av, data, kind) as container:
        stream = _stream(container, limits)
        if len(stamps) > _SKIP * len(wanted):
            stream.codec_context.skip_frame = "NONREF"
        frames, times = [], []
        for frame in _decoded(av, container, stream, wanted, keys, clock):
            _check_size(frame.width, frame.height, limits)
            frames.append(_png(_upright(frame, limits.frame_pixels)))
            times.append(max(0.0, (frame.pts - stamps[0]) * unit))
    if not frames:
        raise _bad("holds no frame that can be decoded.")
    return Sampled(frames, times, duration, kind)


def _library() -> Any:
    try:
        import av
        import av.logging
    except ImportError:
        raise RkvlmdError(
            "unsupported_parameter",
            "MP4 and WebM videos need the optional package PyAV on the server"
            " (pip install 'rkvlmd[video]'); GIF and data:video/jpeg work without it.",
        ) from None
    av.logging.set_level(av.logging.PANIC)  # what it says of hostile files is of no use
    return av


def _opened(av: Any, data: bytes, kind: str) -> Any:
    return av.open(io.BytesIO(data), format=_CONTAINERS[kind], metadata_errors="ignore")


def _stream(container: Any, limits: Limits) -> Any:
    if not container.streams.video:
        raise _bad("file holds no video.")
    stream = container.streams.video[0]
    context = stream.codec_context
    name = context.codec.canonical_name if context is not None else "unknown"
    if name not in CODECS:
        known = ", ".join(sorted(CODECS))
        raise _bad(f"is coded as {name[:32]}; known are {known}.")
    context.thread_count = _THREADS
    if context.width and context.height:
        _check_size(context.width, context.height, limits)
    return stream


def _stamps(
    container: Any, stream: Any, limits: Limits, clock: _Clock
) -> tuple[list[int], list[int]]:
    """Return the times of all frames and of those that stand alone, sorted, in the stream's unit.

    Reads the packets without decoding them: what headers say of length and
    count is often missing or wrong.
    """
    unit = float(stream.time_base)
    stamps: list[int] = []
    keys: list[int] = []
    for packet in container.demux(stream):
        if packet.pts is None:
            continue
        stamps.append(packet.pts)
        if packet.is_keyframe:
            keys.append(packet.pts)
        if len(stamps) > MOST_FRAMES:
            raise _bad(f"has more than {MOST_FRAMES} frames.")
        if len(stamps) % 1024 == 0:
            clock.check()
    if not stamps:
        raise _bad("holds no frames.")
    stamps.sort()
    _check_length((stamps[-1] - stamps[0]) * unit, limits)
    return stamps, sorted(keys)


def _spread(stamps: Sequence[int], keys: Sequence[int], most: int) -> list[int]:
    """Return at most ``most`` of the sorted times, as evenly as they lie.

    ``keys`` are those of frames that stand alone, which cost least: one that
    is close enough is taken.
    """
    if most >= len(stamps):
        return list(dict.fromkeys(stamps))
    if most == 1:
        return [stamps[len(stamps) // 2]]
    first, length = stamps[0], stamps[-1] - stamps[0]
    slack = _SLACK * length / (most - 1)
    found = []
    for i in range(most):
        target = first + round(length * i / (most - 1))
        key = _nearest(keys, target)
        if key is None or abs(key - target) > slack:
            key = _nearest(stamps, target)
        assert key is not None
        found.append(key)
    return list(dict.fromkeys(found))


def _nearest(stamps: Sequence[int], target: int) -> int | None:
    at = bisect_left(stamps, target)
    near = [stamps[j] for j in (at - 1, at) if 0 <= j < len(stamps)]
    return min(near, key=lambda stamp: abs(stamp - target), default=None)


def _decoded(
    av: Any, container: Any, stream: Any, wanted: Sequence[int], keys: Sequence[int], clock: _Clock
) -> Iterator[Any]:
    """Yield a frame for each wanted time: the one at it, else the next one, else the last.

    Jumps to the last frame before it that stands alone, where that saves
    decoding; a file that cannot jump is decoded from where it stands.
    """
    frames = container.decode(stream)
    at = -math.inf
    for target in wanted:
        key = keys[bisect_right(keys, target) - 1] if keys and keys[0] <= target else None
        if key is not None and key > max(at, stream.start_time or 0):
            try:
                container.seek(key, stream=stream)
                frames = container.decode(stream)
            except av.FFmpegError:
                pass
        if at >= target:
            continue
        latest = None
        for frame in frames:
            clock.check()
            if frame.pts is None:
                continue
            latest = frame
            if frame.pts >= target:
                break
        if latest is not None and latest.pts > at:
            at = latest.pts
            yield latest


def _upright(frame: Any, most: int) -> Image.Image:
    """Return a frame of at most ``most`` pixels, turned as its camera said."""
    scale = min(1.0, math.sqrt(most / (frame.width * frame.height)))
    size = (max(1, int(frame.width * scale)), max(1, int(frame.height * scale)))
    image: Image.Image = frame.to_image(width=size[0], height=size[1])
    turn = _TURNS.get(round(getattr(frame, "rotation", 0) or 0) % 360)
    return image if turn is None else image.transpose(turn)


# --- GIF -----------------------------------------------------------------------------


def _gif(data: bytes, limits: Limits, budget: Budget, clock: _Clock) -> Sampled:
    with Image.open(io.BytesIO(data), formats=("GIF",)) as image:
        assert isinstance(image, GifImagePlugin.GifImageFile)
        _check_size(*image.size, limits)
        count = image.n_frames
        if count > MOST_FRAMES:
            raise _bad(f"has more than {MOST_FRAMES} frames.")
        wanted = set(evenly(count, budget(*image.size)))
        frames, times, now = [], [], 0.0
        for index in range(count):
            clock.check()
            image.seek(index)
            if index in wanted:
                _check_size(*image.size, limits)
                frames.append(_png(_smaller(image, limits.frame_pixels)))
                times.append(now)
            now += float(image.info.get("duration", 0)) / 1000
            _check_length(now, limits)
    return Sampled(frames, times, now, "gif")


def _smaller(image: Image.Image, most: int) -> Image.Image:
    sheet = Image.new("RGB", image.size, (255, 255, 255))
    colour = image.convert("RGBA")
    sheet.paste(colour, mask=colour.getchannel("A"))
    scale = min(1.0, math.sqrt(most / (image.width * image.height)))
    size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    return sheet if size == image.size else sheet.resize(size, Image.Resampling.BILINEAR)


# --- both ----------------------------------------------------------------------------


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=_PNG_LEVEL)
    return file.getvalue()


_NAMES = {"mp4": "MP4", "webm": "WebM", "gif": "GIF"}


def _bad(what: str) -> RkvlmdError:
    return RkvlmdError("invalid_request", f"The video {what}")
