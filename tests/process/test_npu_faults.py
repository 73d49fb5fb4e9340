"""Faults of the NPU's libraries, each in a real child: then the next request is served."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from rkvlmd.actors.blobs import Blob
from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import Ended, ModelState
from tests.fakes.scripted import SHORT, chat, collect, submit, until_phase, waits
from tests.npusim import compiler, folders, models
from tests.npusim.fixture import Sim
from tests.npusim.house import open_house, plug_in, traced

pytestmark = pytest.mark.process

#: Requests that meet faults at random, one in ten.
REQUESTS = 1000


@pytest.fixture
def sim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sim]:
    yield plug_in(tmp_path, monkeypatch)
    assert Blob.live == 0


def vlm(sim: Sim, **more: Any) -> None:
    folders.write(sim.folder / "models" / "vlm", outputs=4, **more)


async def ask(house: Any, text: str = "hello", pictures: int = 1, **more: Any) -> tuple[str, Ended]:
    with trio.fail_after(60):
        return await collect(submit(house, chat(text, pictures, **({"max_tokens": 400} | more))))


async def good(house: Any) -> None:
    """The next request is served, truly, and nothing is left of those before."""
    text, end = await ask(house, "is all well?")
    assert end.reason == "stop", end
    assert models.answer(text)["pictures"] == "1"
    with trio.fail_after(30):
        await house.scheduler.wait_empty()
    assert not house.tools.lease.held


FAULTS = [
    # fault, how the request ends: a child that dies before the first token costs nothing
    ("segv@prefill", "stop"),
    ("segv@decode", "stop"),
    ("segv@decode:after=3", "engine_died"),
    ("segv@encode", "stop"),
    ("hang@prefill", "engine_wedged"),
    ("hang@decode:after=3", "engine_wedged"),
    ("hang@encode", "engine_wedged"),
    ("error@prefill", "error"),
    ("fail@prefill", "error"),
    ("error@decode:after=3", "error"),
    ("fail@decode:after=3", "error"),
    ("none@encode", "error"),
    ("nan@encode", "error"),
    ("shape@encode", "error"),
    ("outputs@encode", "error"),
]


@pytest.mark.parametrize(("fault", "reason"), FAULTS)
async def test_fault_in_a_request(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str
) -> None:
    vlm(sim)
    async with open_house(sim, engine={"prefill_rate": 10_000.0}) as house:
        with trio.fail_after(60):
            await house.residency.load("vlm")
        # Children see the environment that they were started in; the fault must come later.
        await with_fault(house, monkeypatch, fault)
        with waits(house, **SHORT if fault.startswith("hang") else {}):
            _, end = await ask(house)
        assert end.reason == reason, end
        if end.error is not None:
            assert "/" not in end.error.message
        await good(house)
    assert sim.trace("fault")
    assert not sim.trace("misuse")


async def with_fault(house: Any, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Restart the model with a fault that does not strike while it loads.

    A load encodes once, to look at the shapes, and generates twice, to see
    whether pictures are told apart; the result of that is remembered.
    """
    with trio.fail_after(60):
        await house.residency.unload("vlm")
        if fault.endswith("@encode"):
            fault += ":skip=1"
        monkeypatch.setenv("NPUSIM_FAULT", fault)
        await house.residency.load("vlm")


LOAD_FAULTS = ["segv@init", "ill@init", "bus@init", "segv@load", "hang@init", "hang@load", "fail@init", "fail@load",
               "oom@init", "platform@init"]  # fmt: skip


@pytest.mark.parametrize("fault", LOAD_FAULTS)
async def test_fault_in_a_load(sim: Sim, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    vlm(sim)
    monkeypatch.setenv("NPUSIM_FAULT", f"{fault}:times=9")
    async with open_house(sim) as house:
        engine = {"load_seconds": 4.0} if fault.startswith("hang") else {}
        with trio.fail_after(60), waits(house, engine=engine):
            with pytest.raises(RkvlmdError) as caught:
                await house.residency.load("vlm")
        if fault == "oom@init":
            assert caught.value.code == "insufficient_memory"
        else:
            assert caught.value.code in {"model_failed", "invalid_model"}
        monkeypatch.delenv("NPUSIM_FAULT")
        with trio.fail_after(60):
            await house.residency.load("vlm")
        await good(house)


MACHINES = [
    # what is wrong with the machine, what the owner is told
    ({"DRIVER": "0.9.2"}, "model_failed", "The NPU driver is version 0.9.2"),
    ({"NPU_MEGABYTES": "3000"}, "insufficient_memory", "not enough memory"),
    ({"NPU_MEGABYTES": "3000", "OOM": "zero"}, "insufficient_memory", "not enough memory"),
    ({"NPU_MEGABYTES": "3000", "OOM": "segv"}, "model_failed", "ended while it loaded"),
    ({"TOOLKIT": "sigbus"}, "model_failed", "ended while it loaded"),
]  # fmt: skip


@pytest.mark.parametrize(("machine", "code", "says"), MACHINES)
async def test_a_machine_that_does_not_fit(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, machine: dict[str, str], code: str, says: str
) -> None:
    vlm(sim, model={"megabytes": 4000})
    for name, value in machine.items():
        monkeypatch.setenv(f"NPUSIM_{name}", value)
    async with open_house(sim) as house:
        with trio.fail_after(60), pytest.raises(RkvlmdError) as caught:
            await house.residency.load("vlm")
        assert caught.value.code == code
        assert says in house.residency.model("vlm").detail
        for name in machine:
            monkeypatch.delenv(f"NPUSIM_{name}")
        with trio.fail_after(60):
            await house.residency.load("vlm")
        await good(house)


MODELS: list[tuple[dict[str, Any], str]] = [
    ({"model": {"platform": "RK3576"}}, "another SoC"),
    ({"vision_file": {"platform": "rk3576"}}, "is converted for rk3576, but this is rk3588"),
    ({"vision_file": {"version": 7}}, "the NPU does not take"),
    ({"model": {"limit": 512}}, "for at most 512"),
    ({"vision_file": {"tokens": 9}}, "encoders[0].tokens"),
    ({"decoder": {"npu_cores": 2}}, "decoder.npu_cores"),
    ({"model": {"header": b"RKLM" + bytes(252)}}, "made before version 1.1"),
    ({"model": {"cut": 6}}, "language.rkllm is cut short"),
    ({"vision_file": {"cut": 20}}, "vision.rknn is cut short"),
]


@pytest.mark.parametrize(("wrong", "says"), MODELS)
async def test_a_model_that_does_not_fit(sim: Sim, wrong: dict[str, Any], says: str) -> None:
    folders.write(sim.folder / "models" / "wrong", outputs=4, **wrong)
    vlm(sim)
    async with open_house(sim) as house:
        _, end = await ask(house, model="wrong")
        assert end.error is not None
        assert end.error.code == "invalid_model"
        assert house.residency.model("wrong").state is ModelState.FAILED
        # For the owner, with what the library printed.
        assert says in house.residency.model("wrong").detail
        _, end = await ask(house, model="vlm")
        assert end.reason == "stop"


def library_file(folder: Path, name: str) -> Path:
    """Return the path of a library of the kind that ``name`` says."""
    path, head = folder / name, b"\x7fELF\x02\x01\x01" + bytes(11)
    if name == "empty.so":
        path.touch()
    elif name == "arm.so":
        path.write_bytes(head + b"\x28\x00" + bytes(100))
    elif name == "other.so":
        path.write_bytes(head + Path("/proc/self/exe").read_bytes()[18:20] + bytes(100))
    elif name.startswith("1.2.3"):
        return compiler.library("1.2.3", says="1.3.0")
    elif name == "1.3.0":
        return compiler.library("1.3.0")
    return path


@pytest.mark.parametrize(
    ("library", "layout", "says", "mended"),
    [
        ("missing.so", "", "does not exist", "1.3.0"),
        ("empty.so", "", "no ELF library", "1.3.0"),
        ("arm.so", "", "is built for", "1.3.0"),
        ("other.so", "", "does not say which version", "1.3.0"),
        ("1.2.3 that says 1.3.0", "", "laid out like those of 1.2.1", "1.3.0"),
        ("1.3.0", "1.2.3", "laid out like those of 1.3.0", "1.2.3"),
        ("1.3.0", "9.9", "npu.layout", ""),  # a setting, which is read at the start
    ],
)
async def test_a_library_that_does_not_fit(
    sim: Sim, library: str, layout: str, says: str, mended: str
) -> None:
    vlm(sim)
    wrong, path = library_file(sim.folder, library), sim.folder / "librkllmrt.so"
    if wrong.exists():
        shutil.copy(wrong, path)
    async with open_house(sim, npu={"library": str(path), "layout": layout}) as house:
        with trio.fail_after(60), pytest.raises(RkvlmdError) as caught:
            await house.residency.load("vlm")
        assert says in caught.value.message
        with pytest.raises(RkvlmdError) as caught:
            await ask(house)
        assert caught.value.status == 503
        assert "/" not in caught.value.message
        if mended:  # the owner puts the right one there
            shutil.copy(compiler.library(mended), path)
            with trio.fail_after(60):
                await house.residency.load("vlm")
            await good(house)


async def test_a_child_killed_while_it_holds_the_lease(
    sim: Sim, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm(sim)
    monkeypatch.setenv("NPUSIM_DECODE_MS", "50")
    async with open_house(sim) as house:
        for name in ("decoder:vlm", "decoder:vlm"):
            job = submit(house, chat("x", 1, max_tokens=400))
            with trio.fail_after(60):
                # From its first text on a job is not run again.
                assert (await job.outbox.take())[0]
            pid = next(c["pid"] for c in house.residency.children() if c["name"] == name)
            os.kill(pid, signal.SIGKILL)
            with trio.fail_after(60):
                _, end = await collect(job)
            assert end.reason == "engine_died"
        _, end = await ask(house, max_tokens=3)
        assert end.reason == "length"
    # The dead child's job on the NPU blocks nobody: the kernel has dropped its lock.
    assert not sim.trace("switch_timeout")


async def test_clients_that_leave_during_a_prefill(
    sim: Sim, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm(sim)
    monkeypatch.setenv("NPUSIM_PREFILL_MS", "10")
    async with open_house(sim) as house:
        with trio.fail_after(60):
            await house.residency.load("vlm")
        starts = {c["pid"] for c in house.residency.children()}
        for _ in range(3):
            job = submit(house, chat("a longer text, so that it takes its time", 1))
            await until_phase(house, job, "prefill")
            job.abandon("client_gone")
            with trio.fail_after(30):
                await house.scheduler.wait_empty()
        await good(house)
        # A prefill cannot be interrupted, and nobody was killed for it.
        assert {c["pid"] for c in house.residency.children()} == starts


async def test_a_client_that_leaves_a_hang_which_hears_no_abort(
    sim: Sim, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm(sim)
    async with open_house(sim, engine={"abort_seconds": 1.0}) as house:
        with trio.fail_after(60):
            await house.residency.load("vlm")
        await with_fault(house, monkeypatch, "hang@decode:after=3")
        pids = {c["name"]: c["pid"] for c in house.residency.children()}
        job = submit(house, chat("hello", 1, max_tokens=400))
        await traced(sim, "fault")
        job.abandon("client_gone")
        # The abort is not heard, so its own deadline ends the child, long before the token's.
        with trio.fail_after(30):
            await house.scheduler.wait_empty()
        await good(house)
        after = {c["name"]: c["pid"] for c in house.residency.children()}
        assert after["encoder:vlm"] == pids["encoder:vlm"]
        assert after["decoder:vlm"] != pids["decoder:vlm"]


async def test_two_hundred_clients_that_leave(sim: Sim, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm(sim)
    for name, value in (("PREFILL_MS", "0.33"), ("DECODE_MS", "6.7"), ("ENCODE_MS", "208")):
        monkeypatch.setenv(f"NPUSIM_{name}", value)
    queue = {"max_jobs": 256, "max_jobs_per_client": 256}
    async with open_house(sim, queue=queue) as house:
        with trio.fail_after(60):
            await house.residency.load("vlm")
        children = {c["pid"] for c in house.residency.children()}
        jobs = [
            submit(house, chat(f"number {i}", i % 2, max_tokens=400), f"10.0.0.{i}")
            for i in range(200)
        ]
        with trio.fail_after(60):
            assert (await jobs[0].outbox.take())[0]
        for job in jobs:
            job.abandon("client_gone")
        # Whatever runs can be ended between two tokens, so the next one need not wait long.
        runs, encodes = len(sim.trace("run")), len(sim.trace("encode"))
        text, end = await ask(house, "who is next?", 1, max_tokens=16)
        assert end.reason == "length"
        assert len(sim.trace("run")) <= runs + 2
        assert len(sim.trace("encode")) <= encodes + 2
        assert text.startswith("pictures=1")
        for job in jobs:
            with trio.fail_after(30):
                await collect(job)
        with trio.fail_after(30):
            await house.scheduler.wait_empty()
        assert {c["pid"] for c in house.residency.children()} == children


def resident() -> int:
    """Return the resident bytes of this process, which the actors run in."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


async def test_many_requests_with_random_faults(sim: Sim, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm(sim)
    monkeypatch.setenv("NPUSIM_REPLY", "count")
    monkeypatch.setenv("NPUSIM_REPLY_WORDS", "2")
    async with open_house(
        sim,
        engine={"restarts": 1000, "heal_seconds": 1.0, "heal_max_seconds": 2.0},
        queue={"crash_refusal_seconds": 0.0},
        cache={"embeddings_bytes": 0},  # so that each picture is encoded
    ) as house:
        with trio.fail_after(60):
            await house.residency.load("vlm")
            await house.residency.unload("vlm")
        monkeypatch.setenv(
            "NPUSIM_FAULT",
            "segv@prefill:every=41;error@prefill:every=37;segv@decode:after=2:every=43;"
            "fail@decode:after=1:every=31;segv@encode:every=53;none@encode:every=59",
        )
        with trio.fail_after(60):
            await house.residency.load("vlm")
        descriptors, memory = len(os.listdir("/proc/self/fd")), resident()
        ends: dict[str, int] = {}
        for number in range(REQUESTS):
            _, end = await ask(house, f"request {number}", number % 2)
            ends[end.reason] = ends.get(end.reason, 0) + 1
        assert sum(ends.values()) == REQUESTS
        assert ends["stop"] >= 0.9 * REQUESTS, ends
        assert ends["error"] > 0
        assert ends["engine_died"] > 0
        monkeypatch.delenv("NPUSIM_FAULT")
        monkeypatch.delenv("NPUSIM_REPLY")
        with trio.fail_after(60):
            await house.residency.unload("vlm")
            await house.residency.load("vlm")
        await good(house)
        assert len(house.residency.children()) == 2
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 4
        assert resident() <= memory + (32 << 20)
    faults = sim.trace("fault")
    assert len(faults) >= 0.08 * REQUESTS
    assert {(fault["kind"], fault["place"]) for fault in faults} >= {
        ("segv", "encode"), ("none", "encode"), ("segv", "prefill"), ("segv", "decode")
    }  # fmt: skip
