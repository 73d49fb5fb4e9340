"""One job from its pictures to its last token: functions, no state of their own."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import trio

from rkvlmd.actors import blobs, engine
from rkvlmd.actors.child import ChildDiedError
from rkvlmd.actors.crashes import content_key
from rkvlmd.actors.embeddings import Rows, row_key
from rkvlmd.actors.metrics import Metrics
from rkvlmd.actors.prep import PrepDiedError
from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import EndReason, PicturePart, Sampling, TextPart
from rkvlmd.models import manifest as manifests
from rkvlmd.models import rkllm
from rkvlmd.wire import child as wire

if TYPE_CHECKING:
    from rkvlmd.actors.crashes import CrashMemory
    from rkvlmd.actors.embeddings import EmbeddingCache
    from rkvlmd.actors.fetcher import Fetcher
    from rkvlmd.actors.job import Job
    from rkvlmd.actors.lease import Grip, Lease
    from rkvlmd.actors.loading import Loaded
    from rkvlmd.actors.prep import Prep
    from rkvlmd.actors.residency import Residency
    from rkvlmd.actors.slots import Slot
    from rkvlmd.messages import PictureSource, Turn
    from rkvlmd.models.catalog import Entry
    from rkvlmd.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tools:
    """What a job needs of the house."""

    settings: Settings
    fetcher: Fetcher
    prep: Prep
    lease: Lease
    residency: Residency
    cache: EmbeddingCache
    crashes: CrashMemory
    metrics: Metrics = field(default_factory=Metrics)


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


async def run(job: Job, slot: Slot, tools: Tools) -> EndReason:
    """Do the whole job; return why the model stopped.

    Raises:
      RkvlmdError: what went wrong, fit for the client.

    """
    entry = tools.residency.entry(job.model)
    if job.request.pictures and not entry.manifest.encoders:
        raise RkvlmdError(
            "invalid_request", f"The model '{job.model}' takes no pictures.",
            param=job.request.pictures[0].field,
        )  # fmt: skip
    with ExitStack() as stack:
        pictures = await _pictures(job, entry, tools, stack)
        slot.resize(job.text_bytes + sum(p.pixels.blob.size for p in pictures))
        crash_key = content_key(job.request.turns, (p.sha256 for p in pictures))
        tools.crashes.check(crash_key)
        prompt = await _prompt(job, entry, tools, pictures)
        limit = job.max_tokens = _limit(job, entry, tools.settings)
        order = _order(job, entry, prompt, pictures, limit)
        info = tools.residency.decoder_info(job.model)
        job.ignored += tuple(rkllm.without_effect(entry.manifest, order, order.seed, info))
        job.phase = "waiting"
        job.checked.set()
        queued = trio.current_time()
        async with tools.lease.hold(job.client, job.model, job.rank) as grip:
            job.spent("queue", queued)
            job.leased = trio.current_time()
            return await _with_lease(job, entry, tools, pictures, order, grip, crash_key)


# --- before the lease --------------------------------------------------------------


async def _pictures(job: Job, entry: Entry, tools: Tools, stack: ExitStack) -> list[Picture]:
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


async def _prompt(job: Job, entry: Entry, tools: Tools, pictures: list[Picture]) -> Prompt:
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


def _limit(job: Job, entry: Entry, settings: Settings) -> int:
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


def _order(
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


# --- with the lease ------------------------------------------------------------------


async def _with_lease(
    job: Job,
    entry: Entry,
    tools: Tools,
    pictures: list[Picture],
    order: wire.Generate,
    grip: Grip,
    crash_key: str,
) -> EndReason:
    """Load if need be, encode, generate; once more if a child died before the first token."""
    by_key = {picture.key: picture for picture in pictures}
    for last in (False, True):
        try:
            job.phase = "loading"
            began = trio.current_time()
            loaded = await tools.residency.ensure(job.model, grip)
            job.spent("load", began)
            with ExitStack() as stack:
                rows = []
                for span in order.spans:
                    rows.append(await _rows(job, by_key[span.key], loaded, tools))
                    stack.callback(rows[-1].blob.close)
                return await _generate(job, order, rows, loaded, tools)
        except ChildDiedError:
            tools.crashes.note(crash_key)
            if last or job.completion_tokens:
                raise
            tools.crashes.check(crash_key)
    raise AssertionError("unreachable")


async def _rows(job: Job, picture: Picture, loaded: Loaded, tools: Tools) -> Rows:
    """Return a picture's rows, which the caller owns; encode it unless that was done before."""
    began = trio.current_time()
    rows = tools.cache.get(picture.key)
    if rows is not None:
        tools.metrics.picture_encode.observe(trio.current_time() - began, "hit")
        return rows
    job.phase = "encoding"
    rows, _ = await engine.encode(loaded.child("encoder"), picture.pixels, tools.settings.engine)
    job.spent("encode", began)
    tools.metrics.picture_encode.observe(trio.current_time() - began, "miss")
    tools.cache.put(picture.key, rows)
    try:
        # The encode could not be interrupted: the client may have gone meanwhile.
        await trio.lowlevel.checkpoint_if_cancelled()
    except trio.Cancelled:
        rows.blob.close()
        raise
    return rows


async def _generate(
    job: Job, order: wire.Generate, rows: list[Rows], loaded: Loaded, tools: Tools
) -> EndReason:
    child = loaded.child("decoder")
    began = trio.current_time()
    job.phase = "prefill"

    def on_prefilled(message: wire.Prefilled) -> None:
        job.cached_tokens = message.cached
        job.phase = "generating"
        job.seconds["prefill"] = message.seconds

    said = False

    def on_text(text: str, tokens: int) -> None:
        nonlocal said
        if not job.completion_tokens and tokens:
            job.seconds["first_token"] = trio.current_time() - job.submitted
        tools.metrics.generated(job, tokens, trio.current_time())
        job.completion_tokens += tokens
        if text and not said:
            # The space between "Assistant:" and the answer is the template's, not the answer's.
            said, text = True, text.removeprefix(" ")
        job.outbox.put(text)

    generation = engine.Generation(
        on_prefilled, on_text, somebody_waits=lambda: tools.lease.waiting > 0
    )
    pace = tools.residency.pace(job.model)
    done = await engine.generate(
        child, _numbered(order, child.next_id()), rows, tools.settings.engine, pace, generation
    )
    _account(job, done)
    if done.recycle:
        child.kill("its library leaks, so it is replaced")
    job.seconds["generate"] = trio.current_time() - began
    if done.reason == "aborted":
        raise RkvlmdError("engine_error", "The engine stopped although nobody asked it to.")
    tools.residency.completed(job.model)
    return done.reason


def _account(job: Job, done: wire.GenerateDone) -> None:
    """Take over the counts of the end, which knows better than the beginning."""
    job.completion_tokens = done.completion
    if done.prompt is not None:
        job.prompt_tokens = done.prompt
    if done.cached is not None:
        job.cached_tokens = done.cached
    job.ignored += tuple(name for name in done.ignored if name not in job.ignored)
    if done.perf is not None:
        perf = done.perf
        job.seconds["prefill"] = perf.prefill_ms / 1000
        log.info(
            "job %s: the NPU computed %d tokens of the prompt in %.0f ms, %d of the answer in"
            " %.0f ms; the child's peak is %.0f MB",
            job.id, perf.prefill_tokens, perf.prefill_ms, perf.generate_tokens,
            perf.generate_ms, perf.memory_mb,
        )  # fmt: skip


def _numbered(order: wire.Generate, number: int) -> wire.Generate:
    fields = {name: getattr(order, name) for name in order.__struct_fields__}
    return wire.Generate(**{**fields, "id": number})
