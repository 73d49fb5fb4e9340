"""Everything that holds the lease, cancelled and abandoned at every step of the loop."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from rkvlmd.actors.blobs import Blob
from rkvlmd.actors.house import House
from rkvlmd.actors.prep import Prep
from tests.fakes.children import FakeChild, FakeLoader
from tests.fakes.parts import house_of
from tests.fakes.scripted import chat, collect, make_model, settings_for, submit
from tests.fakes.stage import Stage
from tests.fakes.torture import AbandonAtStep, abandon_everywhere, cancel_everywhere


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("lease")
    for name in ("a", "b"):
        make_model(tmp / "models", name)
    return tmp


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@asynccontextmanager
async def open_house(tmp: Path, *, overlap: bool = False) -> AsyncIterator[House]:
    settings = settings_for(tmp, cache={"embeddings_bytes": 1000}, npu={"overlap": overlap})
    make: Any = _other_pictures() if overlap else FakeChild
    loader = FakeLoader(settings, tmp, make_child=make)
    async with house_of(settings, loader, Prep(settings, lambda n: make(n, "prep"))) as house:
        yield house


def _other_pictures() -> Any:
    """Children for whom each picture is another one, so that there is always one to encode."""
    stage = Stage()
    return lambda name, role: stage.child(name, role, words=3)


@pytest.mark.parametrize("overlap", [False, True])
def test_the_whole_house_cancelled_at_every_step(folder: Path, overlap: bool) -> None:
    houses: list[House] = []

    async def scenario() -> None:
        async with open_house(folder, overlap=overlap) as house:
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


@pytest.mark.parametrize("loaded", [True, False])
def test_a_job_abandoned_at_every_step(folder: Path, loaded: bool) -> None:
    async def scenario(instrument: AbandonAtStep) -> None:
        async with open_house(folder) as house:
            if loaded:
                await house.residency.load("a")
            with trio.fail_after(60):
                instrument.job = submit(house, chat("first", pictures=1, model="a"))
                _, end = await collect(instrument.job)
                assert end.reason in ("client_gone", "stop")
                text, good = await collect(submit(house, chat("second", pictures=1, model="a")))
                assert (text, good.reason) == ("w0 w1 w2 ", "stop")
                await house.scheduler.wait_empty()
            assert not house.tools.lease.held
            assert house.scheduler.gate.jobs == house.scheduler.gate.bytes == 0
        assert Blob.live == 0

    assert 20 < abandon_everywhere(scenario) < 999
