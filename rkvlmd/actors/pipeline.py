"""One job from its pictures to its last token: functions, no state of their own."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import trio

from rkvlmd.actors import checks, engine, prepare, ready, relay, videos
from rkvlmd.actors.child import ChildDiedError
from rkvlmd.actors.crashes import content_key
from rkvlmd.actors.embeddings import Rows
from rkvlmd.actors.metrics import Metrics
from rkvlmd.actors.overlap import Overlap
from rkvlmd.actors.seen import Seen
from rkvlmd.actors.warm import Warm
from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import EndReason
from rkvlmd.models import rkllm
from rkvlmd.wire import child as wire
from rkvlmd.wire import prefix
from rkvlmd.wire.thinking import Said, Splitter

if TYPE_CHECKING:
    from rkvlmd.actors.crashes import CrashMemory
    from rkvlmd.actors.embeddings import EmbeddingCache
    from rkvlmd.actors.fetcher import Fetcher
    from rkvlmd.actors.job import Job
    from rkvlmd.actors.lease import Grip, Lease
    from rkvlmd.actors.loading import Loaded
    from rkvlmd.actors.prep import Prep
    from rkvlmd.actors.prepare import Picture, View
    from rkvlmd.actors.residency import Residency
    from rkvlmd.actors.slots import Slot
    from rkvlmd.models.catalog import Entry
    from rkvlmd.settings import Settings

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Tools:
    """What a job needs of the house; ``settings`` change with a reload."""

    settings: Settings
    fetcher: Fetcher
    prep: Prep
    lease: Lease
    residency: Residency
    cache: EmbeddingCache
    crashes: CrashMemory
    metrics: Metrics = field(default_factory=Metrics)
    warm: Warm = field(default_factory=Warm)
    overlap: Overlap = field(default_factory=lambda: Overlap(on=False))
    seen: Seen = field(init=False)

    def __post_init__(self) -> None:
        self.seen = Seen(self.cache)


async def run(job: Job, slot: Slot, tools: Tools) -> EndReason:
    """Do the whole job; return why the model stopped.

    Raises:
      RkvlmdError: what went wrong, fit for the client.

    """
    entry = tools.residency.entry(job.model)
    checks.check_places(job, entry)
    with ExitStack() as stack:
        pictures = await videos.pictures(job, slot, entry, tools, stack)
        slot.resize(job.text_bytes)
        crash_key = content_key(job.request.turns, (p.sha256 for p in pictures))
        tools.crashes.check(crash_key)
        checks.check_rows(entry, pictures, tools.settings.queue.max_embedding_bytes)
        keys = dict.fromkeys(view.key for picture in pictures for view in picture.views)
        stack.enter_context(tools.cache.wanted(keys))
        # The lease may be had, and the first encode be under way, before there is a prompt.
        early = relay.early(job, entry, pictures, tools)
        try:
            reason = await _answer(job, entry, tools, pictures, early, crash_key)
        finally:
            if early is not None:
                await tools.lease.end(early)
        await _after_lease(job)
        return reason


async def _answer(
    job: Job,
    entry: Entry,
    tools: Tools,
    pictures: list[Picture],
    early: Grip | None,
    crash_key: str,
) -> EndReason:
    """Render the prompt, wait for the lease unless there is one, use it."""
    prompt = await prepare.prompt(job, entry, tools, pictures)
    limit = job.max_tokens = checks.limit(job, entry, tools.settings)
    order = prepare.order(job, entry, prompt, pictures, limit)
    info = tools.residency.decoder_info(job.model)
    job.ignored += tuple(rkllm.without_effect(entry.manifest, order, order.seed, info))
    job.phase = "waiting"
    job.checked.set()
    queued = trio.current_time()
    views = {view.key: view for picture in pictures for view in picture.views}.values()
    kept = [view for view in views if tools.cache.keeps(checks.row_bytes(entry, view))]
    ahead = partial(_ahead, job, kept, tools, set()) if kept else None
    needed = ready.needed(prompt, pictures)
    names, first = _names(order), relay.first(job, needed, tools)
    async with tools.lease.hold(
        job.client, job.model, job.rank, names, ahead, first, early
    ) as grip:
        job.spent("queue", queued)
        job.leased = trio.current_time()
        try:
            return await _with_lease(job, entry, tools, needed, order, grip, crash_key)
        finally:
            if not grip.released:
                tools.residency.used(job.model, job.request.keep_alive)


def _names(order: wire.Generate) -> prefix.Chain:
    """Return the names of the prompt's blocks, as its decoder will name what it holds."""
    if order.prompt:
        return prefix.of_text(order.prompt, order.spans, order.adapter)
    return prefix.of_tokens(order.tokens, order.spans, order.adapter)


# --- with the lease ------------------------------------------------------------------


async def _with_lease(
    job: Job,
    before: Entry,
    tools: Tools,
    views: list[View],
    order: wire.Generate,
    grip: Grip,
    crash_key: str,
) -> EndReason:
    """Load if need be, encode, generate; once more if a child died before the first token.

    ``views`` are those of the order's memfds; they were prepared for ``before``.
    """
    for last in (False, True):
        try:
            job.phase = "loading"
            began = trio.current_time()
            loaded = await tools.residency.ensure(job.model, grip)
            job.spent("load", began)
            # Only now it is sure which version of a library there is.
            entry = tools.residency.entry(job.model)
            checks.check_same(job, before, entry)
            videos.check(job, entry, tools.residency.decoder_info(job.model))
            decoder, rows = loaded.child("decoder"), list[Rows]()
            following = relay.Following(job, decoder, _numbered(order, decoder.next_id()), rows)
            with ExitStack() as stack:
                stack.callback(following.abandon)
                for number, view in enumerate(views, 1):
                    then = following if number == len(views) else None
                    rows.append(await encoded(job, view, loaded, tools, grip, then))
                    stack.callback(rows[-1].blob.close)
                return await _generate(job, following, rows, loaded, tools, grip)
        except ChildDiedError as exc:
            tools.crashes.note(crash_key, int(exc.at_work))
            if last or job.completion_tokens:
                raise
            tools.crashes.check(crash_key)
    raise AssertionError("unreachable")


async def encoded(
    job: Job,
    view: View,
    loaded: Loaded,
    tools: Tools,
    grip: Grip,
    then: relay.Following | None = None,
) -> Rows:
    """Return a view's rows, which the caller owns; encode it unless that was done before.

    ``then`` goes out as soon as they are encoded.
    """
    began = trio.current_time()

    async def make() -> Rows:
        job.phase = "encoding"
        return await _encode(job, view, loaded, tools, grip, then)

    rows, there = await tools.cache.get_or_make(view.key, make)
    if there:
        tools.metrics.picture_encode.observe(trio.current_time() - began, "hit")
        return rows
    try:
        # The encode could not be interrupted: the client may have gone meanwhile.
        if then is None or not then.sent:
            await trio.lowlevel.checkpoint_if_cancelled()
    except trio.Cancelled:
        rows.blob.close()
        raise
    return rows


async def _encode(
    job: Job,
    view: View,
    loaded: Loaded,
    tools: Tools,
    grip: Grip | None = None,
    then: relay.Following | None = None,
) -> Rows:
    began = trio.current_time()
    child = loaded.child("encoder", view.encoder)
    # A view without pixels has its rows in the cache until its job has ended.
    assert view.pixels is not None
    number = 0
    if grip is not None and grip.begun is not None:
        number = grip.begun.take(child, view)
        began = grip.begun.since if number else began
        await grip.begun.settle()
    rows, _ = await engine.encode(
        child, view.pixels, tools.settings.engine, view.patches, number=number, then=then
    )
    job.spent("encode", began)
    tools.metrics.picture_encode.observe(trio.current_time() - began, "miss")
    return rows


async def _ahead(
    job: Job, views: list[View], tools: Tools, tried: set[str], loaded: Loaded
) -> bool:
    """Encode one view of a job that waits, beside another job's decode; false: all are there."""
    view = next((v for v in views if v.key not in tools.cache and v.key not in tried), None)
    if view is None:
        return False
    tried.add(view.key)
    assert view.pixels is not None  # else its rows were there
    # The job may go while its pixels are being read.
    with view.pixels.blob.duplicate() as blob:
        mine = replace(view, pixels=Rows(blob, view.pixels.tensor))
        rows, _ = await tools.cache.get_or_make(view.key, lambda: _encode(job, mine, loaded, tools))
        rows.blob.close()
    return True


async def _generate(
    job: Job,
    following: relay.Following,
    rows: list[Rows],
    loaded: Loaded,
    tools: Tools,
    grip: Grip,
) -> EndReason:
    child = loaded.child("decoder")
    began = trio.current_time()
    job.phase = "prefill"

    def on_prefilled(message: wire.Prefilled) -> None:
        decoding.set()
        job.cached_tokens = message.cached
        job.phase = "generating"
        job.seconds["prefill"] = message.seconds

    said = False
    splitter = None if job.thinking is None else Splitter(job.thinking)

    def put(found: Said) -> None:
        job.outbox.put(found.text, found.thought if job.request.thoughts else "")
        if splitter is not None:
            job.reasoning_tokens = splitter.tokens

    def on_text(text: str, tokens: int) -> None:
        nonlocal said
        if not job.completion_tokens and tokens:
            job.seconds["first_token"] = trio.current_time() - job.submitted
        elif job.completion_tokens == 1:
            tools.cache.sweep()  # the NPU is at work, and the client has its first token
        tools.metrics.generated(job, tokens, trio.current_time())
        job.completion_tokens += tokens
        if text and not said:
            # The space between "Assistant:" and the answer is the template's, not the answer's.
            said, text = True, text.removeprefix(" ")
        put(Said("", text) if splitter is None else splitter.feed(text, tokens))

    told = False

    def learn(done: wire.GenerateDone | None) -> None:
        nonlocal told
        if not told:
            told = True
            tools.warm.learn(child, done)

    def on_done(done: wire.GenerateDone) -> None:
        """Give the lease back in the turn in which the end is read; the rest of it can wait."""
        if tools.overlap.on or done.recycle or done.reason == "aborted":
            return
        learn(done)
        tools.residency.completed(job.model)
        tools.residency.used(job.model, job.request.keep_alive)
        grip.release()

    generation = engine.Generation(
        on_prefilled,
        on_text,
        on_done,
        somebody_waits=lambda: tools.lease.waiting > 0,
    )
    pace = tools.residency.pace(job.model)
    async with tools.overlap.beside(tools.lease, loaded) as decoding:
        try:
            done = await engine.generate(
                child,
                following.order,
                rows,
                tools.settings.engine,
                pace,
                generation,
                sent=following.taken(),
            )
        finally:
            learn(generation.done)
            if splitter is not None:
                put(splitter.finish())
        _account(job, done)
        if done.recycle:
            child.kill("its library leaks, so it is replaced")
        job.seconds["generate"] = trio.current_time() - began
        if done.reason == "aborted":
            raise RkvlmdError("engine_error", "The engine stopped although nobody asked it to.")
        if not grip.released:
            tools.residency.completed(job.model)
        if tools.overlap.on:
            # The reader need not wait for what is encoded for somebody else.
            job.finish(done.reason)
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
        job.perf = done.perf
        job.seconds["prefill"] = done.perf.prefill_ms / 1000


async def _after_lease(job: Job) -> None:
    """Let whoever has the lease now send its first order, then go on with the end of this job."""
    # One turn for its task to wake up; the tasks of a turn run in any order, so one more.
    for _ in range(2):
        await trio.lowlevel.cancel_shielded_checkpoint()
    if (perf := job.perf) is not None:
        log.info(
            "job %s: the NPU computed %d tokens of the prompt in %.0f ms, %d of the answer in"
            " %.0f ms; the child's peak is %.0f MB",
            job.id, perf.prefill_tokens, perf.prefill_ms, perf.generate_tokens,
            perf.generate_ms, perf.memory_mb,
        )  # fmt: skip


def _numbered(order: wire.Generate, number: int) -> wire.Generate:
    fields = {name: getattr(order, name) for name in order.__struct_fields__}
    return wire.Generate(**{**fields, "id": number})
