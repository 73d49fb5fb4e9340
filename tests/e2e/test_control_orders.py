"""Pins, drains and reloads over the control socket, and what ``rkvlmctl`` makes of them."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import ModelState
from tests.e2e.test_control_ctl import COMMAND, ctl, finish_when_asked, on_a_terminal, serving
from tests.e2e.test_control_socket import caller
from tests.fakes.ctl_house import FakeHouse, a_job


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "c.sock"


@asynccontextmanager
async def draining(house: FakeHouse, path: Path) -> AsyncIterator[Any]:
    """Serve, and have a peer call ``drain`` while two jobs are there."""
    house.scheduler.live = {"j1": a_job("j1"), "j2": a_job("j2")}
    async with serving(house, path), caller(path) as peer:
        await peer.send("drain")
        told = await peer.line()
        assert told["params"]["state"] == "draining"
        assert told["params"]["detail"] == "2 requests are left"
        assert told["params"]["progress"] == 0.0
        assert house.draining
        yield peer


async def the_end(peer: Any) -> Any:
    while "result" not in (line := await peer.line()):
        assert line["method"] == "progress"
    return line["result"]


async def test_a_drain_tells_what_is_left_and_ends_with_the_last_request(path: Path) -> None:
    house = FakeHouse()
    async with draining(house, path) as peer:
        house.scheduler.live.pop("j1")
        line = await peer.line()
        assert line["params"]["detail"] == "1 request is left"
        assert line["params"]["progress"] == 0.5
        house.scheduler.end_all()
        assert await the_end(peer) == {"draining": True, "jobs": 0}
        assert (await peer.call("resume"))["result"] == {"draining": False, "jobs": 0}
        assert not house.draining


async def test_a_resume_ends_the_wait_of_a_drain(path: Path) -> None:
    house = FakeHouse()
    async with draining(house, path) as peer, caller(path) as other:
        assert (await other.call("resume"))["result"] == {"draining": False, "jobs": 2}
        assert await the_end(peer) == {"draining": False, "jobs": 2}


async def test_a_drain_need_not_be_waited_for(path: Path) -> None:
    house = FakeHouse()
    house.scheduler.live["j1"] = a_job("j1")
    async with serving(house, path):
        done = await ctl(path, "drain", "--no-wait")
        assert done.stdout == (
            b"drained: new requests are refused until a resume; requests under way: 1\n"
        )
        assert house.draining
        done = await ctl(path, "--json", "resume")
        assert json.loads(done.stdout) == {"draining": False, "jobs": 1}


async def test_ctrl_c_stops_the_watching_and_not_the_drain(path: Path) -> None:
    house = FakeHouse()
    house.scheduler.live["j1"] = a_job("j1")
    async with serving(house, path), trio.open_nursery() as nursery:
        command = [*COMMAND, "--control", str(path), "drain"]
        process = await nursery.start(
            partial(trio.run_process, command, stderr=subprocess.PIPE, check=False)
        )
        while not house.draining:
            await trio.testing.wait_all_tasks_blocked(0.01)
        process.send_signal(signal.SIGINT)
        said = b""
        while chunk := await process.stderr.receive_some():
            said += chunk
        assert await process.wait() == 130
    assert b"the server stays drained until a resume" in said
    assert house.draining


async def test_pin_and_unpin(path: Path) -> None:
    house = FakeHouse()
    async with serving(house, path), trio.open_nursery() as nursery:
        nursery.start_soon(finish_when_asked, house.residency, "demo")
        done = await ctl(path, "pin", "demo")
        assert (done.returncode, done.stdout) == (0, b"demo ready, pinned\n")
        done = await ctl(path, "models")
        assert done.stdout.splitlines()[1].endswith(b"pinned")
        done = await ctl(path, "--json", "unpin", "demo")
        assert json.loads(done.stdout)["model"]["pinned"] is False
        assert (await ctl(path, "unpin", "nope")).returncode == 1
    assert house.residency.asked == ["pin demo", "unpin demo", "unpin nope"]


async def test_caller_of_a_pin_that_leaves_does_not_stop_it(path: Path) -> None:
    house = FakeHouse()
    async with serving(house, path):
        async with caller(path) as peer:
            await peer.send("pin", {"model": "demo"})
            while not house.residency.waiters:
                await house.residency.wait_change()
                await trio.testing.wait_all_tasks_blocked()
        await trio.testing.wait_all_tasks_blocked(0.01)
        house.residency.finish("demo")
        while not house.residency.model("demo").pinned:
            await house.residency.wait_change()


async def test_while_stopping_nothing_is_pinned_or_reloaded(path: Path) -> None:
    house = FakeHouse(stopping=True)
    async with serving(house, path), caller(path) as peer:
        for method, params in (("pin", {"model": "demo"}), ("reload", None)):
            answer = await peer.call(method, params)
            assert answer["error"]["data"]["code"] == "shutting_down"
    assert house.residency.asked == []


async def test_a_pinned_model_in_the_way_is_named(path: Path) -> None:
    house = FakeHouse()
    error = RkvlmdError("model_pinned", "The model 'demo' is pinned; unpin it first.")

    async def fail() -> None:
        while not house.residency.waiters:
            await house.residency.wait_change()
            await trio.testing.wait_all_tasks_blocked()
        house.residency.fail("other", error)

    async with serving(house, path), trio.open_nursery() as nursery:
        nursery.start_soon(fail)
        done = await ctl(path, "load", "other")
    assert done.returncode == 1
    assert done.stderr == b"rkvlmctl: The model 'demo' is pinned; unpin it first.\n"


async def test_reload_lists_what_was_applied_waits_and_was_rejected(path: Path) -> None:
    house = FakeHouse()
    async with serving(house, path):
        house.reloaded = {"applied": [], "needs_restart": [], "rejected": [], "models": {}}
        done = await ctl(path, "reload")
        assert (done.returncode, done.stdout) == (0, b"nothing has changed\n")
        house.reloaded = {
            "applied": ["queue.max_jobs"],
            "needs_restart": ["http.bind"],
            "rejected": [],
            "models": {"added": ["m"], "changed": [], "removed": [], "waiting": []},
        }
        done = await ctl(path, "reload")
        assert done.stdout.decode().splitlines() == [
            "applied: queue.max_jobs", "needs a restart: http.bind", "models added: m",
        ]  # fmt: skip
        house.reloaded["rejected"] = ["queue.max_job: no such setting"]
        done = await ctl(path, "--json", "reload")
        assert done.returncode == 1
        assert json.loads(done.stdout)["rejected"] == ["queue.max_job: no such setting"]


async def test_the_estimate_is_shown_while_a_load_goes_on(path: Path) -> None:
    house = FakeHouse()
    house.residency.change("demo", seconds_left=75.0)
    house.residency.change("other", state=ModelState.LOADING, seconds_left=12.0, progress=0.6)
    async with serving(house, path), trio.open_nursery() as nursery:
        nursery.start_soon(finish_when_asked, house.residency, "demo")
        shown = await on_a_terminal(path, "load", "demo")
        assert b"about 1 min 15 s left" in shown
        done = await ctl(path, "models")
    assert b"60%" in done.stdout
    assert b"about 12.0 s left" in done.stdout


async def test_jobs_show_their_class(path: Path) -> None:
    house = FakeHouse()
    house.scheduler.live["j1"] = a_job("j1", priority="batch")
    async with serving(house, path):
        done = await ctl(path, "jobs")
    head, line = done.stdout.decode().splitlines()
    assert head.index("PRIORITY") == line.index("batch")
