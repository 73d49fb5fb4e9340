"""Everything that holds the lease, cancelled and abandoned at every step of the loop."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.abc

from rkvlmd.actors.blobs import Blob
from rkvlmd.actors.crashes import CrashMemory
from rkvlmd.actors.embeddings import EmbeddingCache
from rkvlmd.actors.fetcher import Fetcher
from rkvlmd.actors.house import House
from rkvlmd.actors.job import Job
from rkvlmd.actors.lease import Lease
from rkvlmd.actors.memory import Room
from rkvlmd.actors.pipeline import Tools
from rkvlmd.actors.prep import Prep
from rkvlmd.actors.residency import Residency
from rkvlmd.actors.scheduler import Scheduler
from rkvlmd.models import catalog
from tests.fakes.children import FakeChild, FakeLoader
from tests.fakes.scripted import chat, collect, make_model, settings_for, submit
from tests.fakes.torture import cancel_everywhere


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("lease")
    for name in ("a", "b"):
        make_model(tmp / "models", name)
    return tmp


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@asynccontextmanager
async def open_house(tmp: Path) -> AsyncIterator[House]:
    settings = settings_for(tmp)
    entries, problems = catalog.scan(tmp / "models", demo=False)
    assert not problems
    make: Any = FakeChild
    loader = FakeLoader(settings, tmp, make_child=make)
    prep = Prep(settings, lambda name: make(name, "prep"))
    lease = Lease()
    with EmbeddingCache(1000) as cache:
        residency = Residency(settings, entries, lease, loader, room=lambda: Room(8 << 30, None))
        tools = Tools(
            settings, Fetcher(settings.media), prep, lease, residency, cache, CrashMemory(600.0)
        )
        house = House(settings, tools, Scheduler(tools))
        async with trio.open_nursery() as nursery:
            await nursery.start(prep.run)
            await nursery.start(residency.run)
            await nursery.start(house.scheduler.run)
            yield house
            nursery.cancel_scope.cancel()


def test_the_whole_house_cancelled_at_every_step(folder: Path) -> None:
    houses: list[House] = []

    async def scenario() -> None:
        async with open_house(folder) as house:
            houses.append(house)
            jobs = [submit(house, chat("x", pictures=2, model=name)) for name in ("a", "b", "a")]
            for job in jobs:
                text, end = await collect(job)
                assert (text, end.reason) == ("w0 w1 w2 ", "stop"), end
            await house.residency.unload("a")

    before = descriptors()

    def check() -> None:
        if houses:
            assert not houses[-1].tools.lease.held
            assert houses[-1].scheduler.gate.jobs == 0
        assert Blob.live == 0
        assert descriptors() <= before

    assert cancel_everywhere(scenario, check) > 100


class _AbandonAtStep(trio.abc.Instrument):
    """Abandons the job at the k-th step after it was submitted."""

    def __init__(self, k: int) -> None:
        self._k = k
        self._steps = 0
        self.job: Job | None = None
        self.too_late = False

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.job is None:
            return
        self._steps += 1
        if self._steps == self._k:
            self.too_late = self.job.outbox.end is not None
            self.job.abandon("client_gone")


@pytest.mark.parametrize("loaded", [True, False])
def test_a_job_abandoned_at_every_step(folder: Path, loaded: bool) -> None:
    async def scenario(instrument: _AbandonAtStep) -> None:
        async with open_house(folder) as house:
            if loaded:
                await house.residency.load("a")
            with trio.fail_after(20):
                instrument.job = submit(house, chat("first", pictures=1, model="a"))
                _, end = await collect(instrument.job)
                assert end.reason in ("client_gone", "stop")
                text, good = await collect(submit(house, chat("second", pictures=1, model="a")))
                assert (text, good.reason) == ("w0 w1 w2 ", "stop")
                await house.scheduler.wait_empty()
            assert not house.tools.lease.held
            assert house.scheduler.gate.jobs == house.scheduler.gate.bytes == 0
        assert Blob.live == 0

    for k in range(1, 1000):
        instrument = _AbandonAtStep(k)
        trio.run(scenario, instrument, instruments=[instrument])
        if instrument.too_late:
            break
    assert 20 < k < 999
