"""What a job does before it waits for the lease: pictures, prompt, the order to generate."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import trio

from rkvlmd.actors import blobs
from rkvlmd.actors.crashes import content_key
from rkvlmd.actors.embeddings import Rows, row_key
from rkvlmd.actors.prep import PrepDiedError
from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import PicturePart, Sampling, TextPart
from rkvlmd.models import manifest as manifests
from rkvlmd.wire import child as wire

if TYPE_CHECKING:
    from rkvlmd.actors.job import Job
    from rkvlmd.actors.pipeline import Tools
    from rkvlmd.messages import PictureSource, Turn
    from rkvlmd.models.catalog import Entry
    from rkvlmd.settings import Settings


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that is ready for its encoder; ``key`` is that of its rows."""

    pixels: Rows
    key: str
    sha256: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens of the whole conversation and where the pictures' rows go; RKLLM: as text."""

    tokens: list[int]
    spans: list[tuple[int, int, int]]
    text: str = ""
    count: int = 0


async def pictures(job: Job, entry: Entry, tools: Tools, stack: ExitStack) -> list[Picture]:
    """Fetch and decode all pictures, in parallel; the first bad one ends the job."""
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
                picture = await _picture(job, source, entry, tools)
            except RkvlmdError as exc:
                errors[index] = exc
                nursery.cancel_scope.cancel(reason="a picture is bad")
                return
            stack.callback(picture.pixels.blob.close)
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


async def _picture(job: Job, source: PictureSource, entry: Entry, tools: Tools) -> Picture:
    media = tools.settings.media
    encoding: Any = "base64"
    try:
        if source.kind == "url":
            began = trio.current_time()
            job.phase = "fetching"
            data = await tools.fetcher.fetch(source.data, source.field)
            job.phase = "preparing"
            job.spent("fetch", began)
            blob = await blobs.from_bytes(data, "picture")
            encoding = "raw"
        else:
            blob = await blobs.from_text(source.data, "picture")
        encoder = entry.manifest.encoders[0]
        plain = manifests.to_builtins(encoder)

        def build(number: int) -> wire.Picture:
            return wire.Picture(
                id=number,
                encoding=encoding,
                encoder=plain,
                max_bytes=media.max_image_bytes,
                max_pixels=media.max_pixels,
                min_side=media.min_side,
                max_aspect=media.max_aspect,
                exact=media.exact,
            )

        began = trio.current_time()
        done, results = await tools.prep.do(build, [blob], expect=wire.PictureDone)
        job.spent("decode_image", began)
    except RkvlmdError as exc:
        exc.param = exc.param or source.field
        raise
    assert isinstance(done, wire.PictureDone)
    if len(results) != 1 or len(done.tensors) != 1 or done.tokens != encoder.tokens:
        for result in results:
            result.close()
        raise RkvlmdError("server_error", "A picture came back in an unknown shape.")
    key = row_key(done.sha256, manifests.preparation_key(encoder))
    return Picture(Rows(results[0], done.tensors[0]), key, done.sha256, done.tokens)


async def prompt(job: Job, entry: Entry, tools: Tools, pictures: list[Picture]) -> Prompt:
    """Render and count; the prompt must leave room for one token at least."""
    began = trio.current_time()
    plain = manifests.to_builtins(entry.manifest)

    def build(number: int) -> wire.Render:
        return wire.Render(
            id=number,
            folder=str(entry.folder),
            manifest=plain,
            turns=[_turn(turn) for turn in job.request.turns],
            pictures=[picture.tokens for picture in pictures],
        )

    done, _ = await tools.prep.do(build, [], expect=wire.RenderDone)
    assert isinstance(done, wire.RenderDone)
    job.prompt_tokens = len(done.tokens) or done.count
    job.estimated = not done.tokens
    job.image_tokens = sum(picture.tokens for picture in pictures)
    job.spent("prepare", began)
    return Prompt(done.tokens, done.spans, done.prompt, done.count)


def _turn(turn: Turn) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    for part in turn.parts:
        if isinstance(part, TextPart):
            parts.append({"text": part.text})
        elif isinstance(part, PicturePart):
            parts.append({"picture": part.index})
    return {"role": turn.role, "parts": parts}


def limit(job: Job, entry: Entry, settings: Settings) -> int:
    """Return how many tokens may be generated: what was asked for, within the context."""
    context = entry.manifest.decoder.context
    left = context - job.prompt_tokens
    if left < 1:
        raise RkvlmdError(
            "context_length_exceeded",
            f"The prompt has {job.prompt_tokens} tokens, but the model's context holds"
            f" {context} tokens, prompt and answer together.",
            param="messages",
        )
    default = entry.manifest.defaults.max_tokens or settings.models.max_tokens
    return min(left, job.request.max_tokens or default)


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
        spans=[
            wire.Span(start=start, count=count, key=pictures[index].key)
            for start, count, index in prompt.spans
        ],
        max_tokens=limit,
        stop=list(job.request.stop),
        seed=asked.seed,
        **sampling,
    )
