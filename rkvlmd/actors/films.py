"""A video for a model that takes videos as patches of several frames: one input a patch in time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import trio
from msgspec.structs import replace as replaced

from rkvlmd.actors import prepare
from rkvlmd.actors.embeddings import Rows, row_key
from rkvlmd.actors.ready import Picture, View
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import films
from rkvlmd.models import manifest as manifests
from rkvlmd.wire import child as wire

if TYPE_CHECKING:
    from rkvlmd.actors.blobs import Blob
    from rkvlmd.actors.job import Job
    from rkvlmd.actors.pipeline import Tools
    from rkvlmd.messages import VideoSource
    from rkvlmd.models.catalog import Entry

#: The share of the context that the frames of one video may fill.
CONTEXT = 0.75


def most_tokens(manifest: manifests.Manifest) -> int:
    """Return how many tokens one video may have."""
    return int(manifest.decoder.context * CONTEXT)


async def prepare_film(
    job: Job,
    source: VideoSource,
    film: films.Film,
    files: Sequence[Blob],
    times: Sequence[float],
    size: tuple[int, int],
    number: int,
    entry: Entry,
    tools: Tools,
    stack: ExitStack,
) -> Picture:
    """Return the video as a picture with a view for each patch in time.

    ``files`` are its frames, which are closed here, ``times`` theirs in seconds
    (empty where nobody knows them), ``size`` the width and height of the first;
    ``number`` is that of the video in the prompt.

    Raises:
      RkvlmdError: the first bad frame, with the video's field.

    """
    if min(size) < 1:
        raise RkvlmdError("server_error", "A video came back in an unknown shape.")
    width, height = films.size(film, len(files), *size, most_tokens(entry.manifest))
    several = film.patches.temporal
    pieces = [files[at : at + several] for at in range(0, len(files), several)]
    axis = films.axis(film, len(files), times)
    found: dict[int, tuple[View, str]] = {}
    errors: dict[int, RkvlmdError] = {}
    began = trio.current_time()

    async with trio.open_nursery() as nursery:

        async def one(index: int) -> None:
            order = wire.Frames(
                id=0,
                manifest=prepare.plain_of(entry),
                detail=source.detail,
                size=(width, height),
                max_bytes=sum(file.size for file in pieces[index]),
                max_pixels=tools.settings.media.max_video_pixels,
                exact=tools.settings.media.exact,
            )
            try:
                view, sha256 = await _view(order, pieces[index], axis[index], film, tools)
                assert view.pixels is not None
                stack.callback(view.pixels.blob.close)
                found[index] = view, sha256
                job.count_pixels(Picture((view,), (0,), sha256).pixels)
            except RkvlmdError as exc:
                errors[index] = exc
                nursery.cancel_scope.cancel(reason="a frame is bad")

        for index in range(len(pieces)):
            nursery.start_soon(one, index)
    job.spent("decode_image", began)
    if errors:
        raise errors[min(errors)]
    ordered = [found[index] for index in range(len(pieces))]
    return Picture(
        tuple(view for view, _ in ordered),
        tuple(films.layout(film, len(files), times)),
        " ".join(sha256 for _, sha256 in ordered),
        video=number,
    )


async def _view(
    order: wire.Frames, files: Sequence[Blob], time: int, film: films.Film, tools: Tools
) -> tuple[View, str]:
    """Have a prep child make one input; return it and the hash of its frames."""
    done, results = await tools.prep.do(
        lambda number: replaced(order, id=number), files, expect=wire.PictureDone
    )
    assert isinstance(done, wire.PictureDone)
    with ExitStack() as undo:
        for result in results:
            undo.callback(result.close)
        if len(done.views) != 1 or len(results) != 1:
            raise RkvlmdError("server_error", "A video came back in an unknown shape.")
        (view,) = done.views
        if view.encoder != film.encoder or not 0 < view.tokens <= film.entry.tokens:
            raise RkvlmdError("server_error", "A video came back in an unknown shape.")
        undo.pop_all()
    how = (manifests.preparation_key(film.entry), "frames", *order.size, time, int(order.exact))
    key = row_key(done.sha256, " ".join(map(str, how)))
    pixels = Rows(results[0], view.tensor)
    grids = view.patches, view.grid
    return View(pixels, key, view.encoder, view.tokens, *grids, time=time), done.sha256
