"""Jobs through the real actors and real children, with every fault in every phase."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from rkvlmd.actors.blobs import Blob
from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import ModelState
from tests.fakes.scripted import (
    PNG,
    SHORT,
    Scripts,
    chat,
    collect,
    open_house,
    submit,
    until_phase,
    waits,
)

pytestmark = pytest.mark.process


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def restarts(house: Any) -> dict[str, int]:
    """Return how often each child of the models has been started again."""
    return {line["name"]: line["restarts"] for line in house.residency.children()}


def children(house: Any) -> dict[str, int]:
    """Return the pid of each child, by name."""
    prep = {name: child.pid for name, child in house.tools.prep.children.items()}
    return prep | {line["name"]: line["pid"] for line in house.residency.children()}


async def good(house: Any, *, tokens: int = 16) -> None:
    """The next good request succeeds, and nothing is left of those before."""
    with trio.fail_after(30):
        text, end = await collect(submit(house, chat(pictures=1)))
    assert (text, end.reason) == (" ".join(f"t{i}" for i in range(tokens)), "stop")
    with trio.fail_after(30):
        await house.scheduler.wait_empty()
    assert house.scheduler.jobs() == []
    assert house.scheduler.gate.jobs == house.scheduler.gate.bytes == 0
    assert not house.tools.lease.held


async def test_answer_with_two_pictures(tmp_path: Path) -> None:
    async with open_house(tmp_path, scripts=Scripts({}, {"mode": "echo"}, {})) as house:
        with trio.fail_after(30):
            text, end = await collect(submit(house, chat("x", pictures=2)))
        assert text.startswith("pictures=2 prompt="), end
        assert end.reason == "stop"
        assert end.usage.image_tokens == 8
        assert end.usage.prompt_tokens == len("[user]") + 8 + len("x") + 1
        assert house.tools.cache.misses == 1  # the same picture twice is encoded once
        assert house.tools.cache.hits == 1
    assert Blob.live == 0


async def test_the_space_before_an_answer_is_not_part_of_it(tmp_path: Path) -> None:
    script = {"mode": "text", "text": " a  b"}
    async with open_house(tmp_path, scripts=Scripts({}, script, {})) as house:
        with trio.fail_after(30):
            text, _ = await collect(submit(house, chat()))
        assert text == "a  b"


async def test_max_tokens_and_context(tmp_path: Path) -> None:
    async with open_house(tmp_path) as house:
        with trio.fail_after(30):
            text, end = await collect(submit(house, chat(max_tokens=3)))
            assert (text, end.reason) == ("t0 t1 t2", "length")
            _, end = await collect(submit(house, chat("y" * 600)))
        assert end.reason == "error"
        assert end.error is not None
        assert end.error.code == "context_length_exceeded"
        assert "607" in end.error.message
        assert "512" in end.error.message


async def test_second_turn_reuses_the_prefix(tmp_path: Path) -> None:
    async with open_house(tmp_path) as house:
        with trio.fail_after(30):
            await collect(submit(house, chat("one", pictures=1)))
            _, end = await collect(submit(house, chat("one more", pictures=1)))
        assert end.usage.cached_tokens == len("[user]") + 4 + len("one")


FAULTS = [
    # role, phase, kind, what the client sees
    ("decoder", "prefill", "kill", "stop"),  # runs again once
    ("decoder", "prefill", "segv", "stop"),
    ("decoder", "prefill", "hang", "engine_wedged"),
    ("decoder", "prefill", "error", "error"),
    ("decoder", "generate", "kill", "engine_died"),
    ("decoder", "generate", "exit", "engine_died"),
    ("decoder", "generate", "hang", "engine_wedged"),
    ("encoder", "encode", "kill", "stop"),
    ("encoder", "encode", "hang", "engine_wedged"),
    ("encoder", "encode", "error", "error"),
    ("prep", "picture", "kill", "stop"),
    ("prep", "picture", "hang", "engine_died"),
    ("prep", "render", "kill", "stop"),
    ("prep", "render", "hang", "engine_died"),
]


@pytest.mark.parametrize(("role", "at", "kind", "reason"), FAULTS)
async def test_fault(tmp_path: Path, role: str, at: str, kind: str, reason: str) -> None:
    fault = {
        "at": at, "kind": kind, "times": 1, "file": str(tmp_path / "count"),
        "after_tokens": 3 if at == "generate" else 0,
    }  # fmt: skip
    scripts = Scripts({}, {}, {})
    getattr(scripts, role)["fault"] = fault
    async with open_house(tmp_path, scripts=scripts) as house:
        with trio.fail_after(60), waits(house, **SHORT if kind == "hang" else {}):
            text, end = await collect(submit(house, chat(pictures=1)))
        assert end.reason == reason, end
        if reason == "stop":
            assert text.endswith("t15")
        else:
            assert end.error is not None
            assert "/" not in end.error.message
        if reason in ("engine_died", "engine_wedged") and at == "generate":
            assert text == "t0 t1 t2"
        await good(house)
    assert Blob.live == 0


async def test_picture_that_kills_two_children_is_refused(tmp_path: Path) -> None:
    fault = {"at": "picture", "kind": "segv", "times": 2, "file": str(tmp_path / "count")}
    async with open_house(tmp_path, scripts=Scripts({}, {}, {"fault": fault})) as house:
        with trio.fail_after(60):
            _, end = await collect(submit(house, chat("poison", pictures=1)))
            assert end.reason == "engine_died"
            assert end.error is not None
            assert end.error.code == "engine_died"
            _, end = await collect(submit(house, chat("poison", pictures=1)))
        assert end.error is not None
        assert end.error.code == "engine_crash"
        await good(house)


async def test_queued_jobs_survive_a_death(tmp_path: Path) -> None:
    fault = {"at": "generate", "kind": "kill", "times": 1, "file": str(tmp_path / "n"),
             "after_tokens": 2}  # fmt: skip
    async with open_house(tmp_path, scripts=Scripts({}, {"fault": fault}, {})) as house:
        jobs = [submit(house, chat(f"job {i}")) for i in range(4)]
        with trio.fail_after(60):
            ends = [(await collect(job))[1].reason for job in jobs]
        assert sorted(ends) == ["engine_died", "stop", "stop", "stop"]


@pytest.mark.parametrize(
    "phase", ["preparing", "waiting", "loading", "encoding", "prefill", "generating"]
)
@pytest.mark.parametrize("why", ["client_gone", "deadline", "cancelled"])
async def test_abandon_in_each_phase(tmp_path: Path, phase: str, why: Any) -> None:
    decoder: dict[str, Any] = {"tokens": 16}
    encoder: dict[str, Any] = {}
    if phase == "generating":
        decoder["rate"] = 10.0
    if phase == "encoding":
        encoder["encode_seconds"] = 1.0
    if phase == "prefill":
        decoder["prefill_seconds"] = 20.0
    if phase == "loading":
        decoder["load_seconds"] = 1.0
    async with open_house(tmp_path, scripts=Scripts(encoder, decoder, {})) as house:
        if phase != "loading":
            await house.residency.load("scripted")
        blocker = trio.Event()

        async def block(task_status: Any) -> None:
            async with house.tools.lease.hold("", ""):
                task_status.started()
                await blocker.wait()

        async with trio.open_nursery() as nursery:
            if phase == "waiting":
                await nursery.start(block)
            job = submit(house, chat(pictures=1))
            await until_phase(house, job, phase)
            job.abandon(why)
            assert job.outbox.end is not None  # the reader knows at once
            assert job.outbox.end.reason == why
            if phase == "prefill":
                decoder["prefill_seconds"] = 0.0
            blocker.set()
        if phase == "prefill":
            # The script in the running child still waits; a fresh one does not.
            await house.residency.unload("scripted")
            await house.residency.load("scripted")
        await good(house)
    assert Blob.live == 0


async def test_hang_that_ignores_abort_is_killed(tmp_path: Path) -> None:
    fault = {"at": "abort", "kind": "hang", "times": 1, "file": str(tmp_path / "n")}
    decoder = {"rate": 10.0, "fault": fault}
    async with open_house(
        tmp_path, scripts=Scripts({}, decoder, {}), engine={"abort_seconds": 1.0}
    ) as house:
        job = submit(house, chat())
        await until_phase(house, job, "generating")
        job.abandon("cancelled")
        await good(house)
        assert restarts(house) == {"encoder:scripted": 0, "decoder:scripted": 1}


async def test_failed_first_load_says_the_last_words(tmp_path: Path) -> None:
    fault = {"at": "load", "kind": "exit", "times": 2, "file": str(tmp_path / "n")}
    async with open_house(tmp_path, scripts=Scripts({}, {"fault": fault}, {})) as house:
        with trio.fail_after(30), pytest.raises(RkvlmdError) as info:
            await house.residency.load("scripted")
        assert "scripted fault: exit at load" in info.value.message
        assert house.residency.model("scripted").state is ModelState.FAILED
        with pytest.raises(RkvlmdError) as refused:
            submit(house, chat())
        assert refused.value.code == "model_failed"
        assert 1 <= (refused.value.retry_after or 0) <= 120
        # The owner may try at once.
        assert (await house.residency.load("scripted")).state is ModelState.READY


@pytest.mark.parametrize("role", ["encoder", "decoder"])
@pytest.mark.parametrize("kind", ["kill", "segv"])
async def test_death_in_a_load_costs_time_only(tmp_path: Path, role: str, kind: str) -> None:
    scripts = Scripts({}, {}, {})
    getattr(scripts, role)["fault"] = {
        "at": "load", "kind": kind, "times": 1, "file": str(tmp_path / "n"),
    }  # fmt: skip
    async with open_house(tmp_path, scripts=scripts) as house:
        await good(house)
        assert (tmp_path / "n").read_text()  # it did die


@pytest.mark.parametrize(
    ("kind", "words"), [("hang", "took too long"), ("stop", "stopped beating")]
)
async def test_hang_in_a_load(tmp_path: Path, kind: str, words: str) -> None:
    fault = {"at": "load", "kind": kind, "times": 1, "file": str(tmp_path / "n")}
    async with open_house(tmp_path, scripts=Scripts({}, {"fault": fault}, {})) as house:
        engine = {"load_seconds": 4.0} if kind == "hang" else {"beat_seconds": 4.0}
        with trio.fail_after(60), waits(house, engine=engine):
            with pytest.raises(RkvlmdError, match=words):
                await house.residency.load("scripted")
        await house.residency.load("scripted")
        await good(house)


async def test_failed_model_heals_itself(tmp_path: Path) -> None:
    fault = {"at": "load", "kind": "kill", "times": 2, "file": str(tmp_path / "n")}
    async with open_house(
        tmp_path, scripts=Scripts({}, {"fault": fault}, {}), engine={"heal_seconds": 0.2}
    ) as house:
        with pytest.raises(RkvlmdError):
            await house.residency.load("scripted")
        with trio.fail_after(30):
            while house.residency.model("scripted").state is not ModelState.READY:
                await house.residency.wait_change()
        await good(house)


async def test_restart_budget_ends_at_the_model(tmp_path: Path) -> None:
    scripts = Scripts({}, {"fault": {"at": "prefill", "kind": "kill", "times": 99}}, {})
    async with open_house(tmp_path, scripts=scripts, engine={"restarts": 2}) as house:
        with trio.fail_after(60):
            for i in range(2):
                _, end = await collect(submit(house, chat(f"text {i}")))
                assert end.reason in ("engine_died", "error")
            while house.residency.model("scripted").state is not ModelState.FAILED:
                await house.residency.wait_change()
        with pytest.raises(RkvlmdError, match="kept"):
            submit(house, chat())
        scripts.decoder.clear()
        with trio.fail_after(30):
            await house.residency.load("scripted")
        await good(house)


async def test_content_that_kills_twice_is_refused(tmp_path: Path) -> None:
    fault = {"at": "prefill", "kind": "kill", "times": 2, "file": str(tmp_path / "n")}
    async with open_house(tmp_path, scripts=Scripts({}, {"fault": fault}, {})) as house:
        with trio.fail_after(60):
            _, end = await collect(submit(house, chat("poison", pictures=1)))
            assert end.reason == "engine_died"
            _, end = await collect(submit(house, chat("poison", pictures=1)))
        assert end.error is not None
        assert end.error.code == "engine_crash"
        assert end.error.should_retry is False
        await good(house)


@pytest.mark.parametrize(
    ("role", "phase"), [("decoder", "prefill"), ("encoder", "encoding"), ("prep", "preparing")]
)
async def test_a_child_that_dies_between_two_orders_says_nothing_of_the_next(
    tmp_path: Path, role: str, phase: Any
) -> None:
    engine = {"restarts": 1000}
    cache = {"embeddings_bytes": 0}  # so that every request needs every child
    async with open_house(tmp_path, engine=engine, cache=cache) as house:
        with trio.fail_after(60):
            for _ in range(4):
                _, end = await collect(submit(house, chat("the same", pictures=1)))
                assert end.reason == "stop", end
                await house.scheduler.wait_empty()
                pids = [
                    pid for name, pid in children(house).items() if name.partition(":")[0] == role
                ]
                assert pids
                for pid in pids:
                    # It cannot read what comes, as if it had been dead before that came.
                    os.kill(pid, signal.SIGSTOP)
                job = submit(house, chat("the same", pictures=1))
                await until_phase(house, job, phase)
                await trio.testing.wait_all_tasks_blocked()
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                _, end = await collect(job)
                assert end.reason == "stop", end
        assert len(house.tools.crashes) == 0
        await good(house)
    assert Blob.live == 0


async def test_swap_on_demand_and_hold(tmp_path: Path) -> None:
    async with open_house(tmp_path, names=("a", "b")) as house:
        with trio.fail_after(60):
            await collect(submit(house, chat(model="a")))
            assert house.residency.model("a").state is ModelState.READY
            await collect(submit(house, chat(model="b")))
            assert house.residency.model("a").state is ModelState.ABSENT
            assert house.residency.model("b").state is ModelState.READY
            await house.residency.unload("b")
        with pytest.raises(RkvlmdError) as info:
            submit(house, chat(model="b"))
        assert info.value.code == "model_unloaded"


async def test_load_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    room = 8 << 30
    async with open_house(tmp_path, names=("a", "b"), room=lambda: room) as house:
        await house.residency.load("a")
        room = 1
        with pytest.raises(RkvlmdError) as info:
            await house.residency.load("b")
        assert info.value.code == "insufficient_memory"
        assert house.residency.model("a").state is ModelState.READY


async def test_unload_ends_queued_jobs_and_lets_the_running_one_end(tmp_path: Path) -> None:
    async with open_house(tmp_path, scripts=Scripts({}, {"rate": 10.0}, {})) as house:
        running = submit(house, chat("running"))
        await until_phase(house, running, "generating")
        decoder = children(house)["decoder:scripted"]
        os.kill(decoder, signal.SIGSTOP)  # nobody knows how long the queued one takes to get there
        queued = submit(house, chat("queued"))
        await until_phase(house, queued, "waiting")
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(house.residency.unload, "scripted")
                assert (await collect(queued))[1].reason == "model_unloaded"
                os.kill(decoder, signal.SIGCONT)
            text, end = await collect(running)
        assert end.reason == "stop"
        assert text.endswith("t15")


async def test_unload_survives_its_waiter(tmp_path: Path) -> None:
    async with open_house(tmp_path) as house:
        await house.residency.load("scripted")
        with trio.move_on_after(0):
            await house.residency.unload("scripted")
        with trio.fail_after(30):
            while house.residency.model("scripted").state is not ModelState.ABSENT:
                await house.residency.wait_change()


async def test_load_joins_a_load_and_survives_its_waiter(tmp_path: Path) -> None:
    async with open_house(tmp_path, scripts=Scripts({}, {"load_seconds": 0.3}, {})) as house:
        with trio.move_on_after(0.1):
            await house.residency.load("scripted")
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(house.residency.load, "scripted")
                nursery.start_soon(house.residency.load, "scripted")
        assert list(restarts(house).values()) == [0, 0]


async def test_full_queue_refuses_at_once(tmp_path: Path) -> None:
    async with open_house(
        tmp_path, scripts=Scripts({}, {"rate": 100.0}, {}), queue={"max_jobs": 2}
    ) as house:
        jobs = [submit(house, chat(str(i))) for i in range(2)]
        with pytest.raises(RkvlmdError) as info:
            submit(house, chat())
        assert info.value.code == "server_is_overloaded"
        assert 1 <= (info.value.retry_after or 0) <= 120
        for job in jobs:
            assert (await collect(job))[1].reason == "stop"
        await good(house)


async def test_drain_refuses_waits_and_then_ends(tmp_path: Path) -> None:
    async with open_house(tmp_path, scripts=Scripts({}, {"rate": 5.0, "tokens": 999}, {})) as house:
        job = submit(house, chat())
        await until_phase(house, job, "generating")
        with trio.fail_after(60):
            await house.scheduler.drain(0.2)
        assert job.outbox.end is not None
        assert job.outbox.end.reason == "shutdown"
        with pytest.raises(RkvlmdError) as info:
            submit(house, chat())
        assert info.value.code == "shutting_down"


async def test_two_hundred_clients_that_leave(tmp_path: Path) -> None:
    async with open_house(
        tmp_path,
        scripts=Scripts({}, {"rate": 400.0}, {}),
        queue={"max_jobs": 250, "max_jobs_per_client": 0},
    ) as house:
        for job in [submit(house, chat(f"w{i}", pictures=1)) for i in range(8)]:
            await collect(job)  # both prep children are up now
        await good(house)
        before = descriptors()
        jobs = [submit(house, chat(f"n{i}", pictures=i % 2)) for i in range(200)]
        await trio.testing.wait_all_tasks_blocked()
        for job in jobs:
            job.abandon("client_gone")
        with trio.fail_after(60):
            await good(house)
        await house.tools.prep.wait_idle()
        assert descriptors() <= before + 1
    assert Blob.live == 0


def test_picture_is_a_picture() -> None:
    assert PNG.startswith("iVBOR")
