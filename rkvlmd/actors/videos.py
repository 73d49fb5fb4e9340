"""The videos of a job become frames: pictures at their place, with a line that tells the times."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import trio

from rkvlmd.actors import films, prepare
from rkvlmd.actors.crashes import content_key
from rkvlmd.actors.prep import PrepDiedError
from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import (
    EmbeddingsRequest,
    PicturePart,
    PictureSource,
    TextPart,
    Turn,
    VideoPart,
)
from rkvlmd.models import abilities, frames
from rkvlmd.models import films as rules
from rkvlmd.wire import child as wire

if TYPE_CHECKING:
    from rkvlmd.actors.blobs import Blob
    from rkvlmd.actors.job import Job
    from rkvlmd.actors.pipeline import Tools
    from rkvlmd.actors.prepare import Picture
    from rkvlmd.actors.slots import Slot
    from rkvlmd.messages import VideoSource
    from rkvlmd.models.catalog import Entry

#: The share of a prep child's time for one order after which it gives up by itself, with an error
#: that a client understands.
_SHARE = 0.75


@dataclass(frozen=True, slots=True)
class Sampled:
    """The frames of one video: picture files, and seconds from its start where known.

    ``size`` is the width and height of the first, where the model takes videos.
    """

    files: list[Blob]
    times: list[float]
    size: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Frames:
    """What the videos of a request have become.

    ``files`` are the frames, by the number of the picture that each is now.
    ``groups`` counts the frames of each video where the model takes videos:
    they are the last pictures, and each video is one place in the turns.
    ``films`` are videos that are ready, one place each after the pictures.
    """

    files: dict[int, Blob] = dataclasses.field(default_factory=dict)
    groups: tuple[int, ...] = ()
    films: tuple[Picture, ...] = ()


def check(job: Job, entry: Entry, info: dict[str, Any]) -> None:
    """Check that the model can take as many pictures and videos as the request holds.

    ``info`` is what its decoder said when it was loaded, or empty.

    Raises:
      RkvlmdError: with the field at fault.

    """
    request, manifest = job.request, entry.manifest
    embeds = isinstance(request, EmbeddingsRequest)
    if manifest.decoder.engine == "tower" and not embeds:
        raise RkvlmdError(
            "invalid_request", f"The model '{job.model}' makes embeddings alone.", param="model"
        )
    sources: list[PictureSource | VideoSource] = [*request.pictures, *request.videos]
    if sources and not manifest.encoders:
        what = "pictures" if request.pictures else "videos"
        raise RkvlmdError(
            "invalid_request", f"The model '{job.model}' takes no {what}.", param=sources[0].field
        )
    why = abilities.several_pictures(manifest, info)
    if why and request.videos and not abilities.native_video(manifest, info):
        field = request.videos[0].field
        raise RkvlmdError(
            "invalid_request",
            f"{field}: the model '{job.model}' {why}, so it cannot take the frames of a video.",
            param=field,
        )
    films = {source.field for source in request.videos}
    # Each input of embeddings is a prompt of its own.
    for turns in [(turn,) for turn in request.turns] if embeds else [request.turns]:
        places = [
            request.pictures[part.index].field
            for turn in turns
            for part in turn.parts
            # A video that is ready has a number after those of the pictures.
            if isinstance(part, PicturePart) and part.index < len(request.pictures)
        ]
        places = [place for place in places if place not in films]
        if why and len(places) > 1:
            field = places[1]
            raise RkvlmdError(
                "too_many_images",
                f"{field}: the model '{job.model}' {why}, but this prompt holds {len(places)}.",
                param=field,
            )


async def pictures(
    job: Job, slot: Slot, entry: Entry, tools: Tools, stack: ExitStack
) -> list[Picture]:
    """Prepare the pictures of a job, its videos' frames among them.

    Pixels and bytes count against ``slot`` from here on.

    Raises:
      RkvlmdError: the first bad one, with its field; or what the model cannot take.

    """
    check(job, entry, tools.residency.decoder_info(job.model))
    job.count_pixels, job.count_bytes = slot.add_pixels, slot.add_bytes
    found = await expand(job, slot, entry, tools, stack)
    prepared = [*await prepare.pictures(job, entry, tools, stack, found.files), *found.films]
    return grouped(job, prepared, found, entry)


async def expand(job: Job, slot: Slot, entry: Entry, tools: Tools, stack: ExitStack) -> Frames:
    """Sample all videos and put their frames into the request.

    Raises:
      RkvlmdError: the first bad video, with its field.

    """
    sources = job.request.videos
    if not sources:
        return Frames()
    began = trio.current_time()
    job.phase = "preparing"
    raw = None
    if len(tools.crashes):
        raw = await _raw(job)
        tools.crashes.check(raw)
    sampled: list[Sampled] = []
    ready: list[Picture] = []
    held = job.text_bytes + sum(len(source.data) for source in job.request.pictures)
    for source in sources:
        try:
            found = await _sample(job, source, entry, tools)
            for file in found.files:
                stack.callback(file.close)
                held += file.size
            slot.resize(held)
            sampled.append(found)
            if (film := rules.of(entry.manifest, source.detail)) is not None:
                whole = await _ready(job, len(ready), found, film, entry, tools, stack)
                ready.append(whole)
        except PrepDiedError as exc:
            tools.crashes.note(raw or await _raw(job), exc.deaths)
            raise
    job.spent("prepare", began)
    if ready:
        return _placed(job, ready)
    info = tools.residency.decoder_info(job.model)
    return _put(job, sampled, native=abilities.native_video(entry.manifest, info))


async def _raw(job: Job) -> str:
    """Return the key of what the client sent; hashing it takes a while."""
    request = job.request
    data = [s.data for s in request.pictures] + [s.data for s in request.videos]
    return await trio.to_thread.run_sync(content_key, request.turns, data)


async def _sample(job: Job, source: VideoSource, entry: Entry, tools: Tools) -> Sampled:
    media = tools.settings.media
    encoding: Any = source.kind
    held = 0
    try:
        blob, encoding, held = await prepare.source_file(
            job, source, tools, "video", media.max_video_bytes
        )
        manifest = entry.manifest
        plain = prepare.plain_of(entry)

        def build(number: int) -> wire.Video:
            return wire.Video(
                id=number,
                encoding=encoding,
                manifest=plain,
                detail=source.detail,
                max_frames=min(media.max_frames, manifest.video_frames),
                max_tokens=films.most_tokens(manifest),
                max_bytes=media.max_video_bytes,
                max_pixels=media.max_video_pixels,
                max_seconds=media.max_video_seconds,
                frame_pixels=media.frame_pixels,
                seconds=tools.settings.prep.job_seconds * _SHARE,
            )

        done, files = await tools.prep.do(build, [blob], expect=wire.VideoDone)
    except PrepDiedError:
        raise
    except RkvlmdError as exc:
        if exc.param is None:
            exc.param, exc.message = source.field, f"{source.field}: {exc.message}"
        raise
    finally:
        job.count_bytes(-held)
    assert isinstance(done, wire.VideoDone)
    if not 0 < len(files) == done.frames or len(done.times) not in {0, done.frames}:
        for file in files:
            file.close()
        raise RkvlmdError("server_error", "A video came back in an unknown shape.")
    return Sampled(files, done.times, (done.width, done.height))


async def _ready(
    job: Job, number: int, found: Sampled, film: rules.Film, entry: Entry, tools: Tools,
    stack: ExitStack,
) -> Picture:  # fmt: skip
    source = job.request.videos[number]
    try:
        return await films.prepare_film(
            job, source, film, found.files, found.times, found.size, number, entry, tools, stack
        )
    except RkvlmdError as exc:
        exc.param = exc.param or source.field
        raise


def _placed(job: Job, ready: list[Picture]) -> Frames:
    """Give each video, which is ready, one place in the turns."""
    first = len(job.request.pictures)
    _replace(job, [(PicturePart(first + number),) for number in range(len(ready))], [])
    return Frames(films=tuple(ready))


def _put(job: Job, sampled: list[Sampled], *, native: bool) -> Frames:
    """Replace each video in the turns by its frames, or by one place for all of them."""
    request = job.request
    first = len(request.pictures)
    pictures = list(request.pictures)
    files: dict[int, Blob] = {}
    if native:
        # The library takes the same number of frames of every video.
        sampled = _equal(sampled)
    places: list[tuple[TextPart | PicturePart, ...]] = []
    for number, (source, found) in enumerate(zip(request.videos, sampled, strict=True)):
        own = range(len(pictures), len(pictures) + len(found.files))
        files |= zip(own, found.files, strict=True)
        pictures += [PictureSource("base64", "", source.field, source.detail) for _ in own]
        if native:
            places.append((PicturePart(first + number),))
        else:
            before = TextPart(frames.line(len(own), found.times))
            places.append((before, *(PicturePart(index) for index in own), TextPart("\n")))
    _replace(job, places, pictures[first:])
    return Frames(files, tuple(len(found.files) for found in sampled) if native else ())


def _replace(
    job: Job,
    places: Sequence[tuple[TextPart | PicturePart, ...]],
    pictures: Sequence[PictureSource],
) -> None:
    """Put what stands for each video into the request, and further ``pictures``."""
    request = job.request
    # The base64 text is not needed any more.
    job.request = replace(
        request,
        turns=tuple(_replaced(turn, places) for turn in request.turns),
        pictures=(*request.pictures, *pictures),
        videos=tuple(replace(source, data="") for source in request.videos),
    )


def _replaced(turn: Turn, places: Sequence[tuple[TextPart | PicturePart, ...]]) -> Turn:
    parts: list[TextPart | PicturePart] = []
    for part in turn.parts:
        parts += places[part.index] if isinstance(part, VideoPart) else (part,)
    return Turn(turn.role, tuple(parts))


def _equal(sampled: list[Sampled]) -> list[Sampled]:
    least = min(len(found.files) for found in sampled)
    return [
        Sampled([found.files[i] for i in chosen], [found.times[i] for i in chosen if found.times])
        for found in sampled
        for chosen in [frames.evenly(len(found.files), least)]
    ]


def grouped(job: Job, pictures: list[Picture], found: Frames, entry: Entry) -> list[Picture]:
    """Return the pictures, the frames of each video as one where the model takes videos.

    Raises:
      RkvlmdError: the library cannot take pictures of different sizes together.

    """
    whole = _grouped(pictures, found, entry) if found.groups else pictures
    if entry.manifest.decoder.engine == "rkllm" and not isinstance(job.request, EmbeddingsRequest):
        sizes = {tokens for p in whole if p.video is None for tokens in p.places}
        if len(sizes) > 1:
            listed = " and ".join(str(size) for size in sorted(sizes))
            raise RkvlmdError(
                "invalid_request",
                "The RKLLM runtime takes pictures of one size in a prompt, but these have"
                f" {listed} tokens; ask for the same detail for all pictures and videos.",
                param="messages",
            )
    return whole


def _grouped(pictures: list[Picture], found: Frames, entry: Entry) -> list[Picture]:
    tags = entry.manifest.video
    assert tags is not None
    at = len(pictures) - sum(found.groups)
    whole = pictures[:at]
    for number, count in enumerate(found.groups):
        own = pictures[at : at + count]
        at += count
        views = tuple(view for picture in own for view in picture.views)
        layout = (tags.start, *range(len(views)), tags.end)
        key = " ".join(picture.sha256 for picture in own)
        whole.append(prepare.Picture(views, layout, key, video=number))
    return whole
