"""One job of ``/v1/embeddings``: its inputs to vectors, one after the other."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec
import trio

from rkvlmd.actors import checks, engine, pipeline, prepare, ready, videos
from rkvlmd.actors.child import ChildDiedError
from rkvlmd.actors.crashes import content_key
from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import EmbeddingsRequest, PicturePart, TextPart, Turn, VideoPart
from rkvlmd.wire import child as wire

if TYPE_CHECKING:
    from rkvlmd.actors.job import Job
    from rkvlmd.actors.lease import Grip
    from rkvlmd.actors.loading import Loaded
    from rkvlmd.actors.pipeline import Tools
    from rkvlmd.actors.prepare import Picture, View
    from rkvlmd.actors.slots import Slot
    from rkvlmd.messages import EndReason
    from rkvlmd.models.catalog import Entry
    from rkvlmd.models.manifest import Embeddings

#: How long one hold of the lease goes on with further inputs, seconds; then others get a turn.
TURN_SECONDS = 2.0
#: Bytes for one float32 of the answer: base64 on its way, and what is made of it.
_PER_FLOAT = {"base64": 12, "float": 28}


@dataclass(frozen=True, slots=True)
class Input:
    """One input, ready for the engine; ``views`` are those of its spans, in order."""

    order: wire.Embed
    views: tuple[View, ...]


async def run(job: Job, slot: Slot, tools: Tools) -> EndReason:
    """Do the whole job. Each vector goes to the outbox as base64 and a line feed, in order.

    Raises:
      RkvlmdError: what went wrong, fit for the client.

    """
    entry = tools.residency.entry(job.model)
    how = check(job, entry)
    with ExitStack() as stack:
        pictures = await videos.pictures(job, slot, entry, tools, stack)
        turns = job.request.turns
        # What the answer will hold is paid for before there is any of it.
        assert isinstance(job.request, EmbeddingsRequest)
        size = entry.manifest.decoder.embedding * _PER_FLOAT[job.request.encoding]
        slot.resize(job.text_bytes + len(turns) * size)
        crash_key = content_key(turns, (p.sha256 for p in pictures))
        tools.crashes.check(crash_key)
        inputs = await _inputs(job, entry, how, tools, pictures)
        checks.check_rows(entry, pictures, tools.settings.queue.max_embedding_bytes)
        job.phase = "waiting"
        job.checked.set()
        await _all(job, entry, inputs, tools, crash_key)
    return "stop"


def check(job: Job, entry: Entry) -> Embeddings:
    """Return how this model makes embeddings.

    Raises:
      RkvlmdError: it makes none, or none of such inputs.

    """
    request, how = job.request, entry.manifest.embeddings
    assert isinstance(request, EmbeddingsRequest)
    if how is None:
        raise RkvlmdError(
            "invalid_request", f"The model '{job.model}' makes no embeddings.", param="model"
        )
    size = entry.manifest.decoder.embedding
    asked = request.dimensions
    if asked is not None and asked != size and not (how.shorter and asked < size):
        fewer = " or fewer" if how.shorter else ""
        raise RkvlmdError(
            "unsupported_parameter",
            f"The embeddings of the model '{job.model}' have {size}{fewer} dimensions.",
            param="dimensions",
        )
    for number, turn in enumerate(request.turns):
        where = f"input[{number}]"
        texts = sum(isinstance(part, TextPart) for part in turn.parts)
        others = len(turn.parts) - texts
        if texts and "text" not in how.inputs:
            raise _refused(job, "of pictures alone", where)
        if others and "image" not in how.inputs:
            raise _refused(job, "of texts alone", where)
        if how.pictures != "rows" or not others:
            continue
        if texts or len(turn.parts) > 1 or not isinstance(turn.parts[0], PicturePart):
            raise _refused(job, "of one text or one picture", where)
    return how


def _refused(job: Job, what: str, where: str) -> RkvlmdError:
    return RkvlmdError(
        "invalid_request",
        f"{where}: the model '{job.model}' makes embeddings {what}.",
        param=where,
    )


async def _inputs(
    job: Job, entry: Entry, how: Embeddings, tools: Tools, pictures: list[Picture]
) -> list[Input]:
    """Render and count every input."""
    began = trio.current_time()
    if how.template is not None:
        manifest = msgspec.structs.replace(entry.manifest, template=how.template)
        entry = replace(entry, manifest=manifest, digest=f"{entry.digest} embeddings")
    inputs = []
    for number, turn in enumerate(job.request.turns):
        chosen, own = _own(turn, pictures)
        if chosen and how.pictures == "rows":
            found = _unread(chosen[0])
        else:
            found = await prepare.rendered(entry, tools, [own], chosen)
        count = len(found.tokens) or found.count
        context = entry.manifest.decoder.context
        if count > context:
            raise RkvlmdError(
                "context_length_exceeded",
                f"input[{number}]: has {count} tokens, but the model's context holds {context}.",
                param=f"input[{number}]",
            )
        job.prompt_tokens += count
        job.image_tokens += sum(picture.tokens for picture in chosen)
        job.estimated = job.estimated or not found.tokens
        inputs.append(_input(job, found, chosen))
    job.spent("prepare", began)
    return inputs


def _own(turn: Turn, pictures: list[Picture]) -> tuple[list[Picture], Turn]:
    """Return the pictures of one input, and the input with indices into them."""
    chosen: list[Picture] = []
    parts: list[TextPart | PicturePart | VideoPart] = []
    for part in turn.parts:
        if isinstance(part, PicturePart):
            chosen.append(pictures[part.index])
            parts.append(PicturePart(len(chosen) - 1))
        else:
            parts.append(part)
    return chosen, Turn(turn.role, tuple(parts))


def _unread(picture: Picture) -> prepare.Prompt:
    """Return the prompt of a picture that no decoder reads."""
    spans, at = [], 0
    for number, view in enumerate(picture.views):
        spans.append((at, view.tokens, 0, number))
        at += view.tokens
    return prepare.Prompt([0] * at, spans)


def _input(job: Job, prompt: prepare.Prompt, pictures: list[Picture]) -> Input:
    request = job.request
    assert isinstance(request, EmbeddingsRequest)
    views = ready.needed(prompt, pictures)
    order = wire.Embed(
        id=0,
        tokens=prompt.tokens,
        prompt=prompt.text,
        count=prompt.count,
        adapter=job.adapter,
        spans=prepare.spans(prompt, pictures),
        size=request.dimensions or 0,
    )
    return Input(order, tuple(views))


# --- with the lease ------------------------------------------------------------------


async def _all(job: Job, entry: Entry, inputs: list[Input], tools: Tools, crash_key: str) -> None:
    """Make the vectors; an input whose child died is tried once more."""
    done = deaths = 0
    counted = 0
    while done < len(inputs):
        queued = trio.current_time()
        async with tools.lease.hold(job.client, job.model, job.rank) as grip:
            job.spent("queue", queued)
            job.leased = job.leased or trio.current_time()
            try:
                job.phase = "loading"
                began = trio.current_time()
                loaded = await tools.residency.ensure(job.model, grip)
                job.spent("load", began)
                checks.check_same(job, entry, tools.residency.entry(job.model))
                videos.check(job, entry, tools.residency.decoder_info(job.model))
                until = trio.current_time() + TURN_SECONDS
                while done < len(inputs) and (
                    trio.current_time() < until or not tools.lease.waiting
                ):
                    found = await _one(job, entry, inputs[done], loaded, tools, grip)
                    counted += found.tokens
                    done += 1
                    # The engine could not be interrupted: the client may have gone meanwhile.
                    await trio.lowlevel.checkpoint_if_cancelled()
            except ChildDiedError as exc:
                tools.crashes.note(crash_key, int(exc.at_work))
                deaths += 1
                if deaths > 1:
                    raise
                tools.crashes.check(crash_key)
            finally:
                tools.residency.used(job.model, job.request.keep_alive)
        job.phase = "waiting"
    if job.estimated:
        job.prompt_tokens = counted


async def _one(
    job: Job, entry: Entry, given: Input, loaded: Loaded, tools: Tools, grip: Grip
) -> wire.EmbedDone:
    with ExitStack() as stack:
        rows = []
        for view in given.views:
            rows.append(await pipeline.encoded(job, view, loaded, tools, grip))
            stack.callback(rows[-1].blob.close)
        child = loaded.child("decoder")
        began = trio.current_time()
        job.phase = "prefill"
        order = msgspec.structs.replace(given.order, id=child.next_id())
        pace = tools.residency.pace(job.model)
        try:
            found = await engine.embed(child, order, rows, tools.settings.engine, pace)
        finally:
            if entry.manifest.decoder.engine == "rkllm":
                # The library's cache now holds the input, or nobody knows what.
                tools.warm.learn(child, None)
        if found.recycle:
            child.kill("its library leaks, so it is replaced")
        job.spent("prefill", began)
    tools.residency.completed(job.model)
    job.outbox.put(found.vector + "\n")
    return found
