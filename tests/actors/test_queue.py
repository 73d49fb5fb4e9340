"""The queue in the house: classes, turns, swaps, maintenance and requests that come too late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from rkvlmd.actors.house import House
from rkvlmd.actors.job import Job
from rkvlmd.errors import RkvlmdError
from tests.fakes.quick_house import quick_house
from tests.fakes.scripted import chat, collect, in_order, submit, until_phase


async def waiting(house: House, client: str, model: str = "a", **more: Any) -> Job:
    """Submit one job and wait until it waits for the lease."""
    job = submit(house, chat(model=model, **more), client)
    await until_phase(house, job, "waiting")
    return job


async def test_classes_and_turns(tmp_path: Path) -> None:
    async with quick_house(tmp_path, "a", queue={"batch_clients": ("10.9.9.9",)}) as house:
        with trio.fail_after(60):
            async with house.tools.lease.hold("test", "a"):
                jobs = {
                    "owner's batch": await waiting(house, "10.9.9.9", priority="interactive"),
                    "greedy 1": await waiting(house, "10.0.0.1"),
                    "greedy 2": await waiting(house, "10.0.0.1"),
                    "other": await waiting(house, "10.0.0.2"),
                    "asked": await waiting(house, "10.0.0.3", priority="interactive"),
                }
                views = [view.priority for view in house.scheduler.jobs()]
                assert views == ["batch", "normal", "normal", "normal", "interactive"]
            names = await in_order(jobs)
    assert names == ["asked", "greedy 1", "other", "greedy 2", "owner's batch"]


@pytest.mark.parametrize(("jumps", "wanted"), [(0, "a1 b1 a2 b2 a3"), (2, "a1 a2 a3 b1 b2")])
async def test_swaps_are_saved_within_the_jumps(tmp_path: Path, jumps: int, wanted: str) -> None:
    async with quick_house(tmp_path, "a", "b", queue={"max_jumps": jumps}) as house:
        with trio.fail_after(60):
            await house.residency.load("a")
            jobs = {}
            async with house.tools.lease.hold("test", "a"):
                for name in ("a1", "b1", "a2", "b2", "a3"):
                    jobs[name] = await waiting(house, f"10.0.0.{name}", name[0])
            assert " ".join(await in_order(jobs)) == wanted


async def test_a_load_by_the_owner_takes_its_turn(tmp_path: Path) -> None:
    """It waits for its turn among the clients, not for all who come."""
    async with quick_house(tmp_path, "a", "b") as house:
        with trio.fail_after(60):
            await house.residency.load("a")
            async with house.tools.lease.hold("test", "a"):
                first = await waiting(house, "10.0.0.1")
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(house.residency.load, "b")
                    while house.tools.lease.waiting < 2:
                        await trio.lowlevel.checkpoint()
                    jobs = {"first": first}
                    jobs |= {f"later {i}": await waiting(house, "10.0.0.1") for i in range(9)}
                    nursery.cancel_scope.cancel()  # a load goes on without its waiter
            states = []

            async def watch() -> None:
                while True:
                    await house.residency.wait_change()
                    states.append(house.residency.loaded_name())

            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch)
                await in_order(jobs)
                nursery.cancel_scope.cancel()
            # b came while some still waited for a, who got it back.
            assert states.index("b") < len(states) - 1
            assert states[-1] == "a"


async def test_a_request_that_would_start_after_its_deadline(tmp_path: Path) -> None:
    async with quick_house(tmp_path, "a") as house:
        for _ in range(50):
            house.scheduler.gate.served(10.0)
        with trio.fail_after(60):
            async with house.tools.lease.hold("test", "a"):
                jobs = {"one": await waiting(house, "10.0.0.1", timeout=100.0)}
                with pytest.raises(RkvlmdError, match="work ahead") as info:
                    submit(house, chat(timeout=15.0, model="a"), "10.0.0.2")
                assert info.value.code == "server_is_overloaded"
                assert house.scheduler.gate.jobs == 1  # the slot was given back
                # The better class stands before the one that waits, and is in time.
                jobs["two"] = submit(
                    house, chat(timeout=15.0, model="a", priority="interactive"), "10.0.0.2"
                )
                await until_phase(house, jobs["two"], "waiting")
            assert await in_order(jobs) == ["two", "one"]
        assert house.scheduler.gate.refusals == {"late": 1}


async def test_the_owner_may_want_late_requests_all_the_same(tmp_path: Path) -> None:
    async with quick_house(tmp_path, "a", queue={"refuse_late": False}) as house:
        for _ in range(50):
            house.scheduler.gate.served(10.0)
        with trio.fail_after(60):
            async with house.tools.lease.hold("test", "a"):
                jobs = {"one": await waiting(house, "10.0.0.1", timeout=100.0)}
                jobs["late"] = submit(house, chat(timeout=15.0, model="a"), "10.0.0.2")
                await until_phase(house, jobs["late"], "waiting")
            assert await in_order(jobs) == ["one", "late"]
        assert house.scheduler.gate.refusals == {}


async def test_the_text_of_a_request_counts_as_long_as_it_is_held(tmp_path: Path) -> None:
    async with quick_house(tmp_path, "a") as house:
        with trio.fail_after(60):
            async with house.tools.lease.hold("test", "a"):
                slot = house.scheduler.reserve("10.0.0.1", 5000)
                request = chat(pictures=1, model="a")
                job = house.scheduler.submit(slot, request, request_id="r")
                await until_phase(house, job, "waiting")
                # The base64 text has become pixels (eight values), the rest is kept.
                assert house.scheduler.gate.bytes == 5000 - len(request.pictures[0].data)
                assert house.scheduler.gate.pixels == 3
            await collect(job)
            await house.scheduler.wait_empty()
        assert house.scheduler.gate.bytes == house.scheduler.gate.pixels == 0


async def test_the_service_time_is_learnt(tmp_path: Path) -> None:
    async with quick_house(tmp_path, "a") as house:
        assert not house.scheduler.gate.measured
        assumed = house.scheduler.gate.service_seconds
        with trio.fail_after(60):
            assert (await collect(submit(house, chat(model="a"))))[1].reason == "stop"
            await house.scheduler.wait_empty()
        assert house.scheduler.gate.measured
        assert house.scheduler.gate.service_seconds != assumed
        assert house.tools.lease.busy_seconds > 0
