"""The actors of a house put together as the daemon does it, over children of the caller's choice."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from rkvlmd.actors.crashes import CrashMemory
from rkvlmd.actors.embeddings import EmbeddingCache
from rkvlmd.actors.fetcher import Fetcher
from rkvlmd.actors.house import House
from rkvlmd.actors.lease import Lease
from rkvlmd.actors.loading import Loader
from rkvlmd.actors.memory import Room
from rkvlmd.actors.overlap import Overlap
from rkvlmd.actors.pipeline import Tools
from rkvlmd.actors.policy import Rules
from rkvlmd.actors.prep import Prep
from rkvlmd.actors.residency import Residency
from rkvlmd.actors.scheduler import Scheduler
from rkvlmd.models import catalog
from rkvlmd.settings import Settings

#: What a test's machine has, bytes.
ROOM = 8 << 30


@asynccontextmanager
async def house_of(
    settings: Settings,
    loader: Loader,
    prep: Prep,
    *,
    room: Callable[[], int] = lambda: ROOM,
    **residency_parts: Any,
) -> AsyncIterator[House]:
    """Start prep, residency and scheduler over the models in ``models.dir``; no fronts."""
    entries, problems = catalog.scan(Path(settings.models.dir), demo=False)
    assert not problems, problems
    lease = Lease(Rules(settings.queue.age_seconds, settings.queue.max_jumps))
    with EmbeddingCache(settings.cache.embeddings_bytes) as cache:
        residency = Residency(
            settings, entries, lease, loader, room=lambda: Room(room(), None), **residency_parts
        )
        crashes = CrashMemory(settings.queue.crash_refusal_seconds)
        tools = Tools(
            settings, Fetcher(settings.media), prep, lease, residency, cache, crashes,
            overlap=Overlap(on=settings.npu.overlap),
        )  # fmt: skip
        house = House(settings, tools, Scheduler(tools))
        async with trio.open_nursery() as nursery:
            await nursery.start(prep.run)
            await nursery.start(residency.run)
            await nursery.start(house.scheduler.run)
            yield house
            nursery.cancel_scope.cancel(reason="the test is over")
