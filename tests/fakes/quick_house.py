"""A house of real actors whose children live inside the test's loop: no process, no clock."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from rkvlmd.actors.crashes import CrashMemory
from rkvlmd.actors.embeddings import EmbeddingCache
from rkvlmd.actors.fetcher import Fetcher
from rkvlmd.actors.house import House
from rkvlmd.actors.lease import Lease
from rkvlmd.actors.memory import Room
from rkvlmd.actors.pipeline import Tools
from rkvlmd.actors.policy import Rules
from rkvlmd.actors.prep import Prep
from rkvlmd.actors.residency import Residency
from rkvlmd.actors.scheduler import Scheduler
from rkvlmd.models import catalog
from tests.fakes.children import FakeChild, FakeLoader
from tests.fakes.scripted import make_model, settings_for


@asynccontextmanager
async def quick_house(
    tmp: Path, *names: str, words: int = 3, **sections: dict[str, Any]
) -> AsyncIterator[House]:
    """Start prep, residency and scheduler; answers have ``words`` words."""
    settings = settings_for(tmp, **sections)
    for name in names:
        if not (tmp / "models" / name).exists():
            make_model(tmp / "models", name)
    entries, problems = catalog.scan(tmp / "models", demo=False)
    assert not problems

    def make(name: str, role: str) -> Any:
        return FakeChild(name, role, words=words)

    loader = FakeLoader(settings, tmp, make_child=make)
    prep = Prep(settings, lambda name: make(name, "prep"))
    lease = Lease(Rules(settings.queue.age_seconds, settings.queue.max_jumps))
    with EmbeddingCache(settings.cache.embeddings_bytes) as cache:
        residency = Residency(settings, entries, lease, loader, room=lambda: Room(8 << 30, None))
        crashes = CrashMemory(settings.queue.crash_refusal_seconds)
        tools = Tools(settings, Fetcher(settings.media), prep, lease, residency, cache, crashes)
        house = House(settings, tools, Scheduler(tools))
        async with trio.open_nursery() as nursery:
            await nursery.start(prep.run)
            await nursery.start(residency.run)
            await nursery.start(house.scheduler.run)
            yield house
            nursery.cancel_scope.cancel(reason="the test is over")
