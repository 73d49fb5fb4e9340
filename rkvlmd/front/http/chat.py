"""``POST /v1/chat/completions``: reserve, read, parse, submit, and tell the client how it goes."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from typing import TYPE_CHECKING

import trio

from rkvlmd.errors import RkvlmdError
from rkvlmd.wire import sse, urgency
from rkvlmd.wire.openai import Answer, error_body, parse_chat
from rkvlmd.wire.outcome import Outcome, Sent, outcome

if TYPE_CHECKING:
    from rkvlmd.actors.house import House
    from rkvlmd.actors.job import Job
    from rkvlmd.front.http.exchange import Exchange
    from rkvlmd.messages import ChatRequest, Priority

log = logging.getLogger(__name__)

#: A name that means the default model, where no model is called so.
DEFAULT_ALIAS = "default"

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_JSON = (b"content-type", b"application/json")


class UnknownFields:
    """Counts fields that nobody knows, by name; each new name is logged once."""

    MOST = 256

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.total = 0

    def add(self, names: tuple[str, ...]) -> None:
        """Count the names of one request; those beyond ``MOST`` count in ``total`` alone."""
        self.total += len(names)
        for name in names:
            if name in self.counts:
                self.counts[name] += 1
            elif len(self.counts) < self.MOST:
                self.counts[name] = 1
                log.info("a request has the unknown field %r", name)


async def chat(exchange: Exchange, house: House, unknown: UnknownFields) -> None:
    """Answer one chat request.

    Raises:
      RkvlmdError: before anything was sent.
      ClientGoneError: the client left while it sent the body.

    """
    _check_media_type(exchange)
    asked = urgency.priority_header(exchange.headers.get(urgency.PRIORITY_HEADER.encode()))
    seconds = urgency.deadline_header(exchange.headers.get(urgency.DEADLINE_HEADER.encode()))
    deadline = math.inf if seconds is None else exchange.arrived + seconds
    most = house.settings.http.max_body_bytes
    # Before the body: what is refused here costs no memory.
    size = most if exchange.content_length is None else min(exchange.content_length, most)
    slot = house.scheduler.reserve(exchange.client, size)
    try:
        body = await _body(exchange, deadline)
        slot.resize(len(body))
        request = _resolve_default(parse_chat(body, house.settings), house)
        del body
        request = _hurry(request, asked, deadline - trio.current_time())
        unknown.add(request.unknown)
        exchange.listen()
        job = house.scheduler.submit(slot, request, request_id=exchange.request_id)
    finally:
        slot.release()
    # No await between the submission and this block: whatever happens, the job is not left alone.
    try:
        if request.stream:
            await _stream(exchange, house, job)
        else:
            await _whole(exchange, house, job)
    finally:
        job.abandon("client_gone")


async def _body(exchange: Exchange, deadline: float) -> bytes:
    with trio.CancelScope(deadline=deadline):
        return await exchange.read_body()
    raise _late()


def _late() -> RkvlmdError:
    return RkvlmdError(
        "deadline_exceeded",
        "The request had not arrived before its deadline.",
        param=urgency.DEADLINE_HEADER,
        should_retry=False,
    )


def _hurry(request: ChatRequest, asked: Priority | None, left: float) -> ChatRequest:
    """Return the request with what its headers say of its class and its deadline."""
    if left <= 0:
        raise _late()
    if left < (math.inf if request.timeout is None else request.timeout):
        request = dataclasses.replace(request, timeout=left)
    return request if asked is None else dataclasses.replace(request, priority=asked)


def _check_media_type(exchange: Exchange) -> None:
    coding = exchange.headers.get(b"content-encoding", b"identity").strip().lower()
    if coding not in (b"identity", b""):
        raise RkvlmdError("unsupported_media_type", "A compressed request body is not supported.")
    media = exchange.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if media == b"application/json" or media.endswith(b"+json"):
        return
    # Everything that parses is fine, except what a page of another site may send unasked: with
    # JSON the browser would ask first, and be refused.
    if media.startswith(b"multipart/") or b"origin" in exchange.headers:
        raise RkvlmdError("unsupported_media_type", "The content type must be application/json.")


def _resolve_default(request: ChatRequest, house: House) -> ChatRequest:
    if request.model != DEFAULT_ALIAS:
        return request
    if any(view.name == DEFAULT_ALIAS for view in house.residency.models()):
        return request
    return dataclasses.replace(request, model=None)


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
    end = None
    while end is None:
        text, end = await job.outbox.take()
        parts.append(text)
    result = outcome(end, "nothing")
    if result.finish_reason is None:
        await _refuse(exchange, result, job)
        return
    body = answer.whole("".join(parts), result.finish_reason, end.usage, end.timings)
    await exchange.respond(200, body, [_JSON, *_ignored(job)])


async def _refuse(exchange: Exchange, result: Outcome, job: Job) -> None:
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
            await _refuse(exchange, result, job)
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
        if text:
            sent = "text"
            pause = float("inf")  # pings stop at the first token: text shows that we live
            data = answer.text(text)
            if end is None:
                await exchange.write(data)
        else:
            data = b""
        if end is not None:
            break
    result = outcome(end, sent)
    if result.finish_reason is not None:
        data += answer.finish(result.finish_reason, end.usage, end.timings)
    elif result.error is not None:
        data += sse.event(error_body(result.error))
    await exchange.finish(data)
