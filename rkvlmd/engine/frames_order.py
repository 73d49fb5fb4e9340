"""A ``frames`` order of a prep child: frames of a video become one input of an encoder of patches."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

from rkvlmd.engine import memfd, pictures, resample
from rkvlmd.engine.loop import Send
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import films, views
from rkvlmd.models import manifest as manifests
from rkvlmd.wire import child


def work(order: child.Frames, fds: Sequence[int], send: Send) -> None:
    """Do the order and send its end.

    One frame is decoded at a time; what is kept of it has the encoder's size.

    Raises:
      RkvlmdError: a frame is at fault.
      memfd.MemoryFileError: the daemon sent something else than it said.

    """
    film = films.of(manifests.from_builtins(order.manifest), order.detail)
    if film is None or not 0 < len(fds) <= film.patches.temporal:
        raise memfd.MemoryFileError(f"frames with {len(fds)} descriptors")
    limits = pictures.Limits(order.max_bytes, order.max_pixels, 1, order.max_pixels)

    def planner(width: int, height: int) -> views.Plan:
        return views.Plan((films.view(film, width, height, order.size),), (0,))

    digest = hashlib.sha256()
    found: list[tuple[resample.Pixels, views.View]] = []
    for fd in fds:
        try:
            data = memfd.read(fd)
        except MemoryError:
            raise RkvlmdError(
                "image_file_too_large", "The frame needs more memory than one may take."
            ) from None
        digest.update(hashlib.sha256(data).digest())
        try:
            found.append(
                pictures.frame_pixels(data, planner, film.entry, limits, exact=order.exact)
            )
        except RkvlmdError as exc:
            said = exc.message.replace("The picture", "A frame of the video", 1)
            raise RkvlmdError(exc.code, said) from None
    view = found[0][1]
    sheets = [pixels for pixels, _ in found]
    array = resample.frames_to_patches(sheets, film.entry, film.patches, exact=order.exact)
    made, shown = memfd.from_view(view, array)
    try:
        send(
            child.PictureDone(
                id=order.id,
                sha256=digest.hexdigest(),
                width=order.size[0],
                height=order.size[1],
                format="frames",
                views=[shown],
                layout=[0],
            ),
            [made],
        )
    finally:
        os.close(made)
