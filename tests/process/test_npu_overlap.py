"""Encode beside decode on the simulated NPU: right answers, less waiting, and one failure ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from rkvlmd.actors.house import House
from rkvlmd.actors.job import Job
from rkvlmd.messages import Ended
from tests.fakes.scripted import chat, collect, submit, until_phase
from tests.npusim import folders, models
from tests.npusim.fixture import Sim
from tests.npusim.house import open_house, plug_in

pytestmark = pytest.mark.process


@pytest.fixture
def sim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sim:
    made = plug_in(tmp_path, monkeypatch)
    monkeypatch.setenv("NPUSIM_DECODE_MS", "20")
    monkeypatch.setenv("NPUSIM_ENCODE_MS", "30")
    folders.write(tmp_path / "models" / "m")
    return made


async def two(house: House) -> tuple[tuple[str, Ended], tuple[str, Ended]]:
    """A text that is answered for a while, and a picture whose turn comes after it."""
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
    return ends[0], ends[1]


@pytest.mark.parametrize("overlap", [True, False])
async def test_the_picture_is_encoded_during_the_answer_before(sim: Sim, overlap: bool) -> None:
    async with open_house(sim, npu={"overlap": overlap}) as house:
        with trio.fail_after(120):
            await house.residency.load("m")
            (_, one), (text, other) = await two(house)
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
    monkeypatch.setenv("NPUSIM_FAULT", "none@encode:skip=1:times=1")
    async with open_house(sim, npu={"overlap": True}) as house:
        with trio.fail_after(120):
            await house.residency.load("m")
            (_, one), (text, other) = await two(house)
            assert (one.reason, other.reason) == ("stop", "stop"), other
            assert models.answer(text)["pictures"] == "1"
            assert house.tools.overlap.status().startswith("given up")
            before = len(sim.trace("end"))
            third = submit(house, chat("hello again", model="m"), "10.0.0.1")
            await until_phase(house, third, "generating")
            assert not house.tools.overlap.on
            assert (await collect(third))[1].reason == "stop"
            assert len(sim.trace("end")) == before + 1
    assert not sim.trace("misuse")
