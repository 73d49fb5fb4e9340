"""Encode beside decode on the simulated NPU: right answers, less waiting, and one failure ends it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from rkvlmd.actors.house import House
from rkvlmd.actors.job import Job
from rkvlmd.messages import Ended
from tests.fakes.scripted import chat, collect, submit, until_phase
from tests.npusim import folders, models
from tests.npusim.fixture import Sim
from tests.npusim.house import open_house, plug_in, traced

pytestmark = pytest.mark.process


@pytest.fixture
def sim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sim:
    made = plug_in(tmp_path, monkeypatch)
    folders.write(tmp_path / "models" / "m")
    return made


async def loaded(house: House, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Load with a fault that does not strike while the load looks at the library."""
    with trio.fail_after(120):
        await house.residency.load("m")
        await house.residency.unload("m")
        monkeypatch.setenv("NPUSIM_FAULT", fault)
        await house.residency.load("m")


async def two(
    house: House, meanwhile: Callable[[], Awaitable[None]]
) -> tuple[tuple[str, Ended], tuple[str, Ended]]:
    """A text whose answer is under way until ``meanwhile`` ends, and a picture that waits for it."""
    async with house.tools.lease.hold("test", "m"):
        second = submit(house, chat("what is it?", pictures=1, model="m"), "10.0.0.2")
        await until_phase(house, second, "waiting")
        first = submit(house, chat("hello", model="m", priority="interactive"), "10.0.0.1")
        await until_phase(house, first, "waiting")
    ends: list[Any] = [None, None]

    async def read(at: int, job: Job) -> None:
        ends[at] = await collect(job)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, 0, first)
        nursery.start_soon(read, 1, second)
        await meanwhile()
    return ends[0], ends[1]


@pytest.mark.parametrize("overlap", [True, False])
async def test_the_picture_is_encoded_during_the_answer_before(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    async with open_house(sim, npu={"overlap": overlap}) as house:
        await loaded(house, monkeypatch, "wait@decode:after=3")
        before = len(sim.trace("encode"))

        async def meanwhile() -> None:
            await traced(sim, "fault")
            if overlap:
                await traced(sim, "encode", before + 1)
            else:
                await trio.testing.wait_all_tasks_blocked(0.1)
            sim.go()

        with trio.fail_after(120):
            (_, one), (text, other) = await two(house, meanwhile)
        assert (one.reason, other.reason) == ("stop", "stop")
        assert models.answer(text)["pictures"] == "1"
        encode = sim.one("encode")  # the first one was at the load
        ends = [e["t"] for e in sim.trace("end")]
        assert (encode["t"] < ends[-2]) is overlap
        assert house.tools.overlap.status() == ("on" if overlap else "off")
    assert not sim.trace("misuse")


async def test_one_failed_submit_and_they_take_turns(
    sim: Sim, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_house(sim, npu={"overlap": True}) as house:
        await loaded(house, monkeypatch, "none@encode:skip=1;wait@decode:after=3")

        async def meanwhile() -> None:
            await house.tools.overlap.gave_up.wait()
            sim.go()

        with trio.fail_after(120):
            (_, one), (text, other) = await two(house, meanwhile)
            assert (one.reason, other.reason) == ("stop", "stop"), other
            assert models.answer(text)["pictures"] == "1"
            assert house.tools.overlap.status().startswith("given up")
            before = len(sim.trace("end"))
            assert not house.tools.overlap.on
            third = submit(house, chat("hello again", model="m"), "10.0.0.1")
            assert (await collect(third))[1].reason == "stop"
            assert len(sim.trace("end")) == before + 1
    assert not sim.trace("misuse")
