"""The way of a request into the house: reserve, read, parse, submit; the same for every endpoint."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from rkvlmd.errors import RkvlmdError
from rkvlmd.wire import urgency

if TYPE_CHECKING:
    from rkvlmd.actors.house import House
    from rkvlmd.actors.job import Job
    from rkvlmd.front.http.exchange import Exchange
    from rkvlmd.messages import ChatRequest, Priority
    from rkvlmd.settings import Settings

log = logging.getLogger(__name__)

#: Bodies above so many bytes, which take about a millisecond and a half a megabyte, are parsed one
#: in each turn of the loop.
_LARGE = 256 << 10
_parsing = trio.Lock()
#: A name that means the default model, where no model is called so.
DEFAULT_ALIAS = "default"


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


async def take(
    exchange: Exchange,
    house: House,
    unknown: UnknownFields,
    parse: Callable[[bytes, Settings], ChatRequest],
) -> Job:
    """Take one request in and start its job.

    The caller abandons the job when the request ends, however it ends; between
    the return and that there must be no await.

    Raises:
      RkvlmdError: it was refused; nothing was sent yet.
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
        pieces = await _body(exchange, deadline)
        size = sum(map(len, pieces))
        slot.resize(size)
        if size > _LARGE:
            async with _parsing:
                # Those who held the lock before have done their work in other turns of the loop;
                # to put a body together takes as long as to parse it where memory is slow to come.
                await trio.lowlevel.checkpoint()
                pieces = [b"".join(pieces)]
                await trio.lowlevel.checkpoint()
                request = parse(pieces.pop(), house.settings)
        else:
            request = parse(b"".join(pieces), house.settings)
        del pieces
        request = _resolve_default(request, house)
        request = _hurry(request, asked, deadline - trio.current_time())
        unknown.add(request.unknown)
        exchange.listen()
        return house.scheduler.submit(slot, request, request_id=exchange.request_id)
    finally:
        slot.release()


async def _body(exchange: Exchange, deadline: float) -> list[bytes]:
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
