"""A ``video`` order of a prep child: from bytes in a memory file to picture files in others."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rkvlmd.engine import memfd, pictures, video
from rkvlmd.engine.loop import Send
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import films, views
from rkvlmd.models import manifest as manifests
from rkvlmd.wire import child, frames


def work(order: child.Video, fds: Sequence[int], send: Send) -> None:
    """Do the order and send its end.

    Raises:
      RkvlmdError: the video is at fault.
      memfd.MemoryFileError: the daemon sent something else than it said.

    """
    if len(fds) != 1:
        raise memfd.MemoryFileError(f"video with {len(fds)} descriptors")
    model = manifests.from_builtins(order.manifest)
    film = films.of(model, order.detail)
    found = _sampled(order, fds[0], model, film)
    size = (0, 0) if film is None else _size(found.frames[0], order)
    made: list[int] = []
    try:
        made.extend(memfd.create(data, "rkvlmd-frame") for data in found.frames)
        send(
            child.VideoDone(
                id=order.id,
                format=found.format,
                frames=len(made),
                times=found.times,
                duration=found.duration,
                width=size[0],
                height=size[1],
            ),
            made,
        )
    finally:
        for fd in made:
            os.close(fd)


def _size(frame: bytes, order: child.Video) -> tuple[int, int]:
    limits = pictures.Limits(len(frame), order.max_pixels, 1, order.max_pixels)
    try:
        return pictures.upright_size(frame, limits)
    except RkvlmdError as exc:
        said = exc.message.replace("The picture", "The first frame of the video", 1)
        raise RkvlmdError(exc.code, said) from None


def _sampled(
    order: child.Video, fd: int, model: manifests.Manifest, film: films.Film | None
) -> video.Sampled:
    limits = video.Limits(
        max_bytes=order.max_bytes,
        max_pixels=order.max_pixels,
        max_seconds=order.max_seconds,
        frame_pixels=order.frame_pixels,
        work=order.seconds,
    )

    def budget(width: int, height: int) -> int:
        if film is not None:
            most = min(order.max_frames, frames.MAX_FDS)
            return films.count(film, most, width, height, order.max_tokens)
        tokens = views.plan(model, width, height, order.detail).tokens
        most = min(order.max_frames, frames.MAX_FDS, order.max_tokens // max(1, tokens))
        return max(1, most)

    try:
        whole = pictures.Limits(order.max_bytes, order.max_pixels, 1, 1)
        if order.encoding == "frames":
            encoder = model.encoders[0]
            text = memfd.read(fd)
            return video.listed(text, limits, lambda: budget(encoder.width, encoder.height))
        if order.encoding == "base64":
            try:
                data = pictures.from_base64(memfd.read(fd), whole)
            except RkvlmdError as exc:
                raise RkvlmdError(exc.code, exc.message.replace("picture", "video")) from None
        else:
            data = memfd.read(fd)
        return video.sample(data, limits, budget)
    except MemoryError:
        raise RkvlmdError(
            "invalid_request", "The video needs more memory than one video may take."
        ) from None
