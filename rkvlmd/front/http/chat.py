"""``POST /v1/chat/completions``: take the request in, and tell the client how it goes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import trio

from rkvlmd.errors import RkvlmdError
from rkvlmd.front.http.intake import take
from rkvlmd.wire import sse
from rkvlmd.wire.openai import Answer, error_body, parse_chat
from rkvlmd.wire.outcome import Outcome, Sent, outcome

if TYPE_CHECKING:
    from rkvlmd.actors.house import House
    from rkvlmd.actors.job import Job
    from rkvlmd.front.http.exchange import Exchange
    from rkvlmd.front.http.intake import UnknownFields

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_JSON = (b"content-type", b"application/json")


async def chat(exchange: Exchange, house: House, unknown: UnknownFields) -> None:
    """Answer one chat request.

    Raises:
      RkvlmdError: before anything was sent.
      ClientGoneError: the client left while it sent the body.

    """
    job = await take(exchange, house, unknown, parse_chat)
    # No await between the job's start and this block: whatever happens, it is not left alone.
    try:
        if job.request.stream:
            await _stream(exchange, house, job)
        else:
            await _whole(exchange, house, job)
    finally:
        job.abandon("client_gone")


def _answer(house: House, job: Job) -> Answer:
    try:
        digest = house.residency.model(job.model).digest
    except RkvlmdError:  # its folder went away since
        digest = ""
    return Answer(
        job=job.id,
        model=f"{job.model}:{job.adapter}" if job.adapter else job.model,
        digest=digest,
        created=int(time.time()),
        include_usage=job.request.include_usage,
    )


def _ignored(job: Job) -> list[tuple[bytes, bytes]]:
    names = dict.fromkeys(job.request.ignored + job.ignored)
    return [(b"x-rkvlmd-ignored", ", ".join(names).encode("ascii", "replace"))] if names else []


async def _whole(exchange: Exchange, house: House, job: Job) -> None:
    answer = _answer(house, job)
    parts: list[str] = []
    thoughts: list[str] = []
    end = None
    while end is None:
        text, end = await job.outbox.take()
        parts.append(text)
        thoughts.append(job.outbox.thoughts())
    result = outcome(end, "nothing")
    if result.finish_reason is None:
        await refuse(exchange, result, job)
        return
    body = answer.whole(
        "".join(parts), result.finish_reason, end.usage, end.timings, "".join(thoughts)
    )
    await exchange.respond(200, body, [_JSON, *_ignored(job)])


async def refuse(exchange: Exchange, result: Outcome, job: Job) -> None:
    """Tell how a job ended that has no answer, before anything was sent."""
    if result.error is not None:
        await exchange.respond_error(result.error, _ignored(job))
    else:
        await exchange.respond(result.status or 499, b"", [])


async def _stream(exchange: Exchange, house: House, job: Job) -> None:
    with trio.move_on_after(house.settings.http.headers_seconds):
        await job.checked.wait()
    if (end := job.outbox.end) is not None:
        result = outcome(end, "nothing")
        if result.finish_reason is None:
            await refuse(exchange, result, job)
            return
    answer = _answer(house, job)
    await exchange.start(200, [*_STREAM_HEADERS, *_ignored(job)])
    await exchange.write(answer.role())
    sent: Sent = "headers"
    pause = house.settings.http.ping_seconds
    while True:
        text, end = "", None
        with trio.move_on_after(pause) as quiet:
            text, end = await job.outbox.take()
        if quiet.cancelled_caught:
            await exchange.write(sse.PING)
            continue
        data = answer.thought(thought) if (thought := job.outbox.thoughts()) else b""
        data += answer.text(text) if text else b""
        if data:
            sent = "text"
            pause = float("inf")  # pings stop at the first token: text shows that we live
        if end is not None:
            break
        await exchange.write(data)
    result = outcome(end, sent)
    if result.finish_reason is not None:
        data += answer.finish(result.finish_reason, end.usage, end.timings)
    elif result.error is not None:
        data += sse.event(error_body(result.error))
    await exchange.finish(data)
