"""``POST /v1/embeddings``: take the request in, and answer with its vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from rkvlmd.front.http.chat import refuse
from rkvlmd.front.http.intake import take
from rkvlmd.messages import EmbeddingsRequest
from rkvlmd.wire.openai_embeddings import answer, item, parse_embeddings
from rkvlmd.wire.outcome import outcome

if TYPE_CHECKING:
    from rkvlmd.actors.house import House
    from rkvlmd.actors.job import Job
    from rkvlmd.front.http.exchange import Exchange
    from rkvlmd.front.http.intake import UnknownFields

_JSON = (b"content-type", b"application/json")


async def embeddings(exchange: Exchange, house: House, unknown: UnknownFields) -> None:
    """Answer one request for embeddings.

    Raises:
      RkvlmdError: before anything was sent.
      ClientGoneError: the client left while it sent the body.

    """
    job = await take(exchange, house, unknown, parse_embeddings)
    # No await between the job's start and this block: whatever happens, it is not left alone.
    try:
        await _whole(exchange, job)
    finally:
        job.abandon("client_gone")


async def _whole(exchange: Exchange, job: Job) -> None:
    request = job.request
    assert isinstance(request, EmbeddingsRequest)
    items: list[bytes] = []
    rest = ""
    end = None
    while end is None:
        text, end = await job.outbox.take()
        *vectors, rest = (rest + text).split("\n")
        for vector in vectors:
            items.append(item(vector, len(items), request.encoding))
            # Thousands of numbers become text here; others are served in between.
            await trio.lowlevel.checkpoint()
    result = outcome(end, "nothing")
    if result.finish_reason is None:
        await refuse(exchange, result, job)
        return
    model = f"{job.model}:{job.adapter}" if job.adapter else job.model
    await exchange.respond(200, answer(items, model, end.usage), [_JSON])
