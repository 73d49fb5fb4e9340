"""A house of real actors over a simulated board: real children, simulated libraries."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from rkvlmd.actors.crashes import CrashMemory
from rkvlmd.actors.embeddings import EmbeddingCache
from rkvlmd.actors.fetcher import Fetcher
from rkvlmd.actors.house import House
from rkvlmd.actors.lease import Lease
from rkvlmd.actors.loading import Loader
from rkvlmd.actors.memory import Room
from rkvlmd.actors.pipeline import Tools
from rkvlmd.actors.prep import Prep
from rkvlmd.actors.residency import Residency
from rkvlmd.actors.scheduler import Scheduler
from rkvlmd.models import catalog
from tests.fakes.scripted import settings_for
from tests.npusim import compiler
from tests.npusim.fixture import PYTHON, Sim


def plug_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Sim:
    """Return a quick board without faults; children started from now on see it."""
    made = Sim(folder)
    for name in list(os.environ):
        if name.startswith("NPUSIM_"):
            monkeypatch.delenv(name)
    for name, value in made.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", f"{PYTHON}:{os.environ.get('PYTHONPATH', '')}")
    return made


@asynccontextmanager
async def open_house(
    sim: Sim, *, version: str = "1.3.0", **sections: dict[str, Any]
) -> AsyncIterator[House]:
    """Start prep, residency and scheduler over the models in ``sim.folder / "models"``."""
    npu = {"library": str(compiler.library(version)), "soc": "rk3588", **sections.pop("npu", {})}
    settings = settings_for(sim.folder, npu=npu, **sections)
    entries, problems = catalog.scan(sim.folder / "models", demo=False)
    assert not problems, problems
    state = Path(settings.state.dir)
    await trio.Path(state).mkdir(parents=True, exist_ok=True)
    loader, prep, lease = Loader(settings, state), Prep(settings), Lease()
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
