"""Encoding beside a decode: only when it is asked for, only for the next one, never twice."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from rkvlmd.actors.blobs import Blob
from rkvlmd.actors.house import House
from rkvlmd.actors.job import Job
from rkvlmd.actors.lease import Lease
from rkvlmd.actors.loading import Loaded
from rkvlmd.actors.overlap import Overlap
from tests.fakes.quick_house import quick_house
from tests.fakes.scripted import chat, collect, submit, until_phase, waits
from tests.fakes.stage import Stage

ON = {"overlap": True}


async def waiting(house: House, client: str, pictures: int = 1, model: str = "a") -> Job:
    job = submit(house, chat(f"from {client}", pictures=pictures, model=model), client)
    await until_phase(house, job, "waiting")
    return job


async def good(job: Job) -> Any:
    text, end = await collect(job)
    assert (text, end.reason) == ("w0 w1 w2 ", "stop"), end
    return end


async def running(house: House, stage: Stage) -> Job:
    """Return a job of text alone that decodes until the gate opens."""
    stage.answer_gate = trio.Event()
    job = submit(house, chat("first", model="a"), "10.0.0.1")
    with trio.fail_after(60):
        await stage.answering.wait()
    return job


async def beside(house: House, stage: Stage) -> tuple[Job, Job]:
    """Return a job that decodes, and one whose picture is encoded meanwhile."""
    first = await running(house, stage)
    second = await waiting(house, "10.0.0.2")
    await stage.encoding.wait()
    return first, second


def go_on(stage: Stage) -> None:
    """Let the answer under way end, and all that follow."""
    assert stage.answer_gate is not None
    stage.answer_gate.set()


async def encodes_beside_a_decode(house: House, stage: Stage, model: str = "a") -> int:
    """Return how many encodes began for a waiting job before the decode ended; end both jobs."""
    with trio.fail_after(60):
        first = await running(house, stage)
        second = await waiting(house, "10.0.0.2", model=model)
        await trio.testing.wait_all_tasks_blocked()
        encodes = stage.encodes
        go_on(stage)
        await good(first)
        await good(second)
    return encodes


async def test_the_next_ones_picture_is_encoded_beside_the_decode(tmp_path: Path) -> None:
    stage = Stage()
    async with quick_house(tmp_path, "a", child=stage.child, npu=ON) as house:
        with trio.fail_after(60):
            first = await running(house, stage)
            second = await waiting(house, "10.0.0.2", pictures=2)
            await trio.testing.wait_all_tasks_blocked()
            assert second.phase == "waiting"
            assert stage.events == ["answer begins", *["encode begins", "encode ends"] * 2]
            go_on(stage)
            await good(first)
            end = await good(second)
            await house.scheduler.wait_empty()
        assert stage.encodes == 2
        assert end.timings.encode > 0  # it is told where the time went
        assert house.scheduler.statistics()["overlap"] == "on"
    assert Blob.live == 0


async def test_nothing_is_encoded_ahead_that_would_not_be_kept(tmp_path: Path) -> None:
    stage = Stage()
    cache = {"embeddings_bytes": 127}  # one byte less than a picture's rows
    async with quick_house(tmp_path, "a", child=stage.child, npu=ON, cache=cache) as house:
        assert await encodes_beside_a_decode(house, stage) == 0
        assert stage.encodes == 1


async def test_off_unless_it_is_asked_for(tmp_path: Path) -> None:
    stage = Stage()
    async with quick_house(tmp_path, "a", child=stage.child) as house:
        assert await encodes_beside_a_decode(house, stage) == 0
        assert stage.events[1:3] == ["answer ends", "encode begins"]
        assert house.scheduler.statistics()["overlap"] == "off"


async def test_an_answer_ends_before_the_encode_beside_it_and_nothing_else_begins(
    tmp_path: Path,
) -> None:
    stage = Stage(encode_gate=trio.Event())
    async with quick_house(tmp_path, "a", child=stage.child, npu=ON) as house:
        with trio.fail_after(60):
            first, second = await beside(house, stage)
            unloaded = trio.Event()

            async def unload() -> None:
                await house.residency.unload("a")
                unloaded.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(unload)
                go_on(stage)
                await good(first)
                await trio.testing.wait_all_tasks_blocked()
                # The reader has its end; the encode goes on, and the unload waits for it.
                assert stage.events[-1] == "answer ends"
                assert not unloaded.is_set()
                assert house.tools.lease.held
                assert stage.encode_gate is not None
                stage.encode_gate.set()
                await unloaded.wait()
            _, end = await collect(second)
            assert end.reason == "model_unloaded"
    assert Blob.live == 0


@pytest.mark.parametrize("how", ["error", "die", "hang"])
async def test_a_failed_encode_beside_a_decode_is_the_last_one(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage(fail="encoder", how=how)
    engine = {"encode_seconds": 0.1} if how == "hang" else {}
    async with quick_house(tmp_path, "a", child=stage.child, npu=ON) as house:
        with trio.fail_after(60), caplog.at_level(logging.ERROR):
            first = await running(house, stage)
            with waits(house, engine=engine):
                second = await waiting(house, "10.0.0.2")
                await house.tools.overlap.gave_up.wait()
            third = await waiting(house, "10.0.0.3")
            await trio.testing.wait_all_tasks_blocked()
            assert stage.encodes == 1
            go_on(stage)
            # Nobody's request pays for it: the picture is encoded again, in its turn.
            for job in (first, second, third):
                await good(job)
        assert stage.encodes == 3
        # From then on an encode begins when no answer is under way.
        rest = stage.events[stage.events.index("answer ends") :]
        assert "answer begins encode begins" not in " ".join(rest)
        status = house.scheduler.statistics()["overlap"]
        assert str(status).startswith("given up: an encode failed beside a decode")
        assert "npu.overlap: given up until the next start" in caplog.text
    assert Blob.live == 0


@pytest.mark.parametrize("how", ["error", "die"])
async def test_a_decode_that_fails_beside_an_encode_ends_it_too(tmp_path: Path, how: str) -> None:
    stage = Stage(how=how)
    async with quick_house(tmp_path, "a", child=stage.child, npu=ON) as house:
        with trio.fail_after(60):
            first = await running(house, stage)
            second = await waiting(house, "10.0.0.2")
            await trio.testing.wait_all_tasks_blocked()
            assert len(house.tools.cache) == 1
            stage.fail = "decoder"
            go_on(stage)
            _, end = await collect(first)
            assert end.reason == ("error" if how == "error" else "stop")
            await good(second)
        assert "a decode failed beside an encode" in house.tools.overlap.broken


async def test_a_decode_that_fails_alone_is_no_reason(tmp_path: Path) -> None:
    stage = Stage(fail="decoder")
    async with quick_house(tmp_path, "a", child=stage.child, npu=ON) as house:
        with trio.fail_after(60):
            _, end = await collect(submit(house, chat("x", pictures=1, model="a")))
            assert end.reason == "error"
        assert house.tools.overlap.on


async def test_a_client_that_leaves_while_its_picture_is_encoded_ahead(tmp_path: Path) -> None:
    stage = Stage(same=True, encode_gate=trio.Event())
    async with quick_house(tmp_path, "a", child=stage.child, npu=ON) as house:
        with trio.fail_after(60):
            first, second = await beside(house, stage)
            second.abandon("client_gone")
            third = await waiting(house, "10.0.0.3")
            assert stage.encode_gate is not None
            assert stage.answer_gate is not None
            stage.encode_gate.set()
            stage.answer_gate.set()
            await good(first)
            await good(third)
        assert stage.encodes == 1
    assert Blob.live == 0


async def test_a_client_that_leaves_while_anothers_picture_is_encoded(tmp_path: Path) -> None:
    stage = Stage(encode_gate=trio.Event())
    async with quick_house(tmp_path, "a", child=stage.child, npu=ON) as house:
        with trio.fail_after(60):
            first, second = await beside(house, stage)
            first.abandon("client_gone")
            _, end = await collect(first)
            assert end.reason == "client_gone"
            assert stage.encode_gate is not None
            stage.encode_gate.set()
            go_on(stage)
            await good(second)
        assert stage.encodes == 1
        assert house.tools.overlap.on
    assert Blob.live == 0


async def test_another_models_picture_is_not_encoded_ahead(tmp_path: Path) -> None:
    stage = Stage()
    async with quick_house(tmp_path, "a", "b", child=stage.child, npu=ON) as house:
        assert await encodes_beside_a_decode(house, stage, model="b") == 0


async def test_a_bug_beside_a_decode_is_not_the_end_of_the_house() -> None:
    async def ahead(_loaded: Any) -> bool:
        raise RuntimeError("nobody thought of it")

    lease, overlap = Lease(), Overlap(on=True)
    lease.loaded = lambda: "m"
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery, lease.hold("a", "m"):
            overlap.nursery = nursery

            async def wait() -> None:
                async with lease.hold("b", "m", ahead=ahead):
                    pass

            nursery.start_soon(wait)
            async with overlap.beside(lease, Loaded([])) as decoding:
                decoding.set()
                await overlap.gave_up.wait()
    assert not overlap.on
    assert "error of the server" in overlap.status()
