"""What a job does before it waits for the lease: pictures, prompt, the order to generate."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import trio
from msgspec.structs import replace as replaced

from rkvlmd.actors import blobs, checks
from rkvlmd.actors.crashes import content_key
from rkvlmd.actors.embeddings import Rows, row_key
from rkvlmd.actors.prep import PrepDiedError
from rkvlmd.actors.ready import Picture as Picture
from rkvlmd.actors.ready import Prompt as Prompt
from rkvlmd.actors.ready import View as View
from rkvlmd.actors.ready import spans as spans
from rkvlmd.actors.seen import Source
from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import PicturePart, Sampling, TextPart
from rkvlmd.models import assembly, views
from rkvlmd.models import manifest as manifests
from rkvlmd.wire import child as wire
from rkvlmd.wire.thinking import Thinking

if TYPE_CHECKING:
    from rkvlmd.actors.blobs import Blob
    from rkvlmd.actors.job import Job
    from rkvlmd.actors.pipeline import Tools
    from rkvlmd.messages import PictureSource, Turn, VideoSource
    from rkvlmd.models.catalog import Entry

#: Manifests that are kept ready for frames.
_MOST_KEPT = 8
#: What decides, besides the model, what becomes of a picture and whether it may.
_DECIDING = ("detail", "max_pixels", "min_side", "max_aspect", "exact")


async def pictures(
    job: Job, entry: Entry, tools: Tools, stack: ExitStack, files: Mapping[int, Blob] = {}
) -> list[Picture]:
    """Fetch and decode all pictures, in parallel; the first bad one ends the job.

    ``files`` are those that are here already, by picture.
    """
    sources = job.request.pictures
    if not sources:
        return []
    if len(tools.crashes):
        raw = await trio.to_thread.run_sync(
            content_key, job.request.turns, [s.data for s in sources]
        )
        tools.crashes.check(raw)
    found: dict[int, Picture] = {}
    errors: dict[int, RkvlmdError] = {}
    began = trio.current_time()

    async with trio.open_nursery() as nursery:

        async def one(index: int, source: PictureSource) -> None:
            try:
                picture = await _picture(job, source, entry, tools, files.get(index))
                stack.callback(picture.close)
                job.count_pixels(picture.pixels)
            except RkvlmdError as exc:
                errors[index] = exc
                nursery.cancel_scope.cancel(reason="a picture is bad")
                return
            found[index] = picture

        job.phase = "preparing"
        for index, source in enumerate(sources):
            nursery.start_soon(one, index, source)
    job.spent("prepare", began)
    if errors:
        error = errors[min(errors)]
        if isinstance(error, PrepDiedError):
            raw = await trio.to_thread.run_sync(
                content_key, job.request.turns, [s.data for s in sources]
            )
            tools.crashes.note(raw, error.deaths)
        raise error
    # The base64 text is not needed any more.
    job.request = replace(
        job.request, pictures=tuple(replace(source, data="") for source in sources)
    )
    return [found[index] for index in range(len(sources))]


async def source_file(
    job: Job,
    source: PictureSource | VideoSource,
    tools: Tools,
    what: Literal["picture", "video"],
    most: int | None = None,
) -> tuple[Blob, Any, int]:
    """Return what the client sent or named as a memory file, its encoding, and bytes to give back.

    A download counts against the job's slot until its prep child is done: the
    caller calls ``job.count_bytes`` with the last number, negative. ``most``
    bytes are fetched, by default as of a picture.
    """
    if source.kind != "url":
        return await blobs.from_text(source.data, what), source.kind, 0
    began = trio.current_time()
    job.phase = "fetching"
    data = await tools.fetcher.fetch(source.data, source.field, what=what, most=most)
    job.phase = "preparing"
    job.spent("fetch", began)
    job.count_bytes(len(data))
    return await blobs.from_bytes(data, what), "raw", len(data)


async def _picture(
    job: Job, source: PictureSource, entry: Entry, tools: Tools, file: Blob | None
) -> Picture:
    media = tools.settings.media
    encoding: Any = "base64"
    held = 0
    try:
        if file is not None:
            blob, encoding = file, "raw"
        else:
            blob, encoding, held = await source_file(job, source, tools, "picture")
        order = wire.Picture(
            id=0,
            encoding=encoding,
            manifest=plain_of(entry),
            detail=source.detail,
            # A frame was measured when it was taken, by other limits.
            max_bytes=media.max_image_bytes if file is None else blob.size,
            max_pixels=media.max_pixels,
            min_side=media.min_side,
            max_aspect=media.max_aspect,
            exact=media.exact,
        )
        how = (entry.digest, *(getattr(order, name) for name in _DECIDING))
        origin = Source(how, encoding, blob.size)
        with blob:
            hashes = tools.seen.hashes(origin)
            done, results = await _decoded(job, replaced(order, known=hashes), blob, tools)
            if hashes and not (done.views or results):
                # Its rows were here when it was sent; from now on they stay, or are missing.
                if (known := tools.seen.claim(origin, done.sha256)) is not None:
                    return known
                done, results = await _decoded(job, order, blob, tools)
    except RkvlmdError as exc:
        exc.param = exc.param or source.field
        raise
    finally:
        job.count_bytes(-held)
    if not _expected(done, len(results), entry):
        for result in results:
            result.close()
        raise RkvlmdError("server_error", "A picture came back in an unknown shape.")
    block = 0 if done.tiles is None else assembly.count(entry.manifest, done.tiles)
    picture = Picture(
        tuple(_views(done, results, entry, source.detail, exact=media.exact)),
        tuple(done.layout),
        done.sha256,
        tiles=done.tiles,
        block=block,
    )
    return tools.seen.learn(origin, picture)


async def _decoded(
    job: Job, order: wire.Picture, blob: Blob, tools: Tools
) -> tuple[wire.PictureDone, list[Blob]]:
    """Have a prep child look at a picture."""
    began = trio.current_time()
    done, results = await tools.prep.do(
        lambda number: replaced(order, id=number), [blob.duplicate()], expect=wire.PictureDone
    )
    job.spent("decode_image", began)
    assert isinstance(done, wire.PictureDone)
    return done, results


def plain_of(entry: Entry) -> dict[str, Any]:
    """Return the manifest for a frame; turning it over costs more than all else of an order."""
    return _turned(entry.digest, entry.manifest)


_kept: OrderedDict[str, dict[str, Any]] = OrderedDict()


def _turned(digest: str, manifest: manifests.Manifest) -> dict[str, Any]:
    if digest not in _kept:
        _kept[digest] = manifests.to_builtins(manifest)
        while len(_kept) > _MOST_KEPT:
            _kept.popitem(last=False)
    return _kept[digest]


def _expected(done: wire.PictureDone, descriptors: int, entry: Entry) -> bool:
    """Whether each view has its pixels and its place, and no more rows than its encoder gives."""
    encoders = entry.manifest.encoders
    places = [item for item in done.layout if isinstance(item, int)]
    wanted = len(done.views)
    if entry.manifest.assembly is not None:
        if done.tiles is None or assembly.views(done.tiles) != wanted:
            return False
        wanted = 1
    return (
        descriptors == len(done.views) > 0
        and sorted(places) == list(range(wanted))
        and all(
            view.encoder < len(encoders) and 0 < view.tokens <= encoders[view.encoder].tokens
            for view in done.views
        )
    )


def _views(
    done: wire.PictureDone,
    results: list[Blob],
    entry: Entry,
    detail: views.Detail,
    *,
    exact: bool,
) -> Iterator[View]:
    """Yield each view with the key of its rows: the file, the rule that cut it, which cut it is."""
    manifest = entry.manifest
    rule = manifests.preparation_key(manifest.encoders[views.choose(manifest, detail)])
    for number, (view, blob) in enumerate(zip(done.views, results, strict=True)):
        own = manifests.preparation_key(manifest.encoders[view.encoder])
        key = row_key(done.sha256, f"{rule} {own} {number} of {len(results)} {exact:d}")
        pixels = Rows(blob, view.tensor)
        yield View(pixels, key, view.encoder, view.tokens, view.patches, view.grid)


async def prompt(job: Job, entry: Entry, tools: Tools, pictures: list[Picture]) -> Prompt:
    """Render and count; pictures that alone fill the context are refused before."""
    began = trio.current_time()
    image_tokens, context = sum(p.tokens for p in pictures), entry.manifest.decoder.context
    if image_tokens >= context:
        raise checks.too_long(image_tokens, context, image_tokens, len(pictures))
    wish, tags = job.request.thinking, entry.manifest.thinking
    wish = entry.manifest.defaults.enable_thinking if wish is None else wish
    found = await rendered(entry, tools, job.request.turns, pictures, wish)
    if not found.switched:
        job.ignored += job.request.thinking_asked
    if tags is not None:
        job.thinking = Thinking(start=tags.start, end=tags.end, opened=found.thinks)
    job.prompt_tokens = len(found.tokens) or found.count
    job.estimated = not found.tokens
    job.image_tokens = image_tokens
    job.spent("prepare", began)
    return found


async def rendered(
    entry: Entry,
    tools: Tools,
    turns: Sequence[Turn],
    pictures: Sequence[Picture],
    thinking: bool | None = None,
) -> Prompt:
    """Return the prompt of a conversation; its parts point into ``pictures``."""
    checks.check_text(entry, turns)
    plain = plain_of(entry)

    def build(number: int) -> wire.Render:
        return wire.Render(
            id=number,
            folder=str(entry.folder),
            manifest=plain,
            turns=[_turn(turn) for turn in turns],
            pictures=[
                wire.Laid(
                    layout=list(picture.layout),
                    tokens=list(picture.places),
                    video=picture.video is not None,
                )
                for picture in pictures
            ],
            thinking=thinking,
        )

    done, _ = await tools.prep.do(build, [], expect=wire.RenderDone)
    assert isinstance(done, wire.RenderDone)
    return Prompt(done.tokens, done.spans, done.prompt, done.count, done.thinks, done.switched)


def _turn(turn: Turn) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    for part in turn.parts:
        if isinstance(part, TextPart):
            parts.append({"text": part.text})
        elif isinstance(part, PicturePart):
            parts.append({"picture": part.index})
    return {"role": turn.role, "parts": parts, "thought": turn.thought}


def order(
    job: Job, entry: Entry, prompt: Prompt, pictures: list[Picture], limit: int
) -> wire.Generate:
    """Return the generation, every sampling field filled in; its id comes later."""
    asked, defaults = job.request.sampling, entry.manifest.defaults
    sampling = {
        name: getattr(defaults, name) if value is None else value
        for name in Sampling.__dataclass_fields__
        if name != "seed"
        for value in [getattr(asked, name)]
    }
    return wire.Generate(
        id=0,
        tokens=prompt.tokens,
        prompt=prompt.text,
        count=prompt.count,
        adapter=job.adapter,
        spans=spans(prompt, pictures),
        max_tokens=limit,
        stop=list(job.request.stop),
        seed=asked.seed,
        thinking=job.thinking,
        **sampling,
    )
