"""What stays loaded, what leaves, in which order, and what a load may not do."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from rkvlmd.actors import memory
from rkvlmd.actors.house import House
from rkvlmd.actors.loading import parts_of
from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import ModelState
from rkvlmd.models import catalog
from tests.fakes.machine import MB, Machine
from tests.fakes.machine import machine as machine  # a fixture
from tests.fakes.scripted import chat, collect, make_model, submit, until_phase

ABSENT, READY = ModelState.ABSENT, ModelState.READY


async def ask(house: House, model: str, **more: float) -> str:
    """Send one request; return how it ended."""
    with trio.fail_after(1e6):
        _, end = await collect(submit(house, chat(model=model, **more)))
    return end.error.code if end.error is not None else end.reason


async def refusal(call: object) -> RkvlmdError:
    with pytest.raises(RkvlmdError) as info:
        await call  # type: ignore[misc]
    return info.value


# --- swaps -------------------------------------------------------------------------------


async def test_encoders_stay_over_a_swap(tmp_path: Path, machine: Machine) -> None:
    async with machine.house(tmp_path, "a", "b") as house:
        assert await ask(house, "a") == "stop"
        assert await ask(house, "b") == "stop"
        assert machine.alive() == ["decoder:b", "encoder:a", "encoder:b"]
        a, b = house.residency.model("a"), house.residency.model("b")
        assert (a.state, a.encoders_kept, a.memory_bytes) == (ABSENT, 1, 100 * MB)
        assert (b.state, b.encoders_kept, b.memory_bytes) == (READY, 0, 400 * MB)
        assert house.residency.loaded_name() == "b"
        machine.started.clear()
        assert await ask(house, "a") == "stop"
        assert machine.started == ["decoder:a"]
        assert house.residency.restarts == {"encoder": 0, "decoder": 1}


async def test_the_least_recently_used_encoders_leave_for_a_load(
    tmp_path: Path, machine: Machine
) -> None:
    async with machine.house(tmp_path, "a", "b", "c", memory={"reserve_bytes": 0}) as house:
        for name in ("a", "b", "c", "a"):
            assert await ask(house, name) == "stop"
        assert machine.alive() == ["decoder:a", "encoder:a", "encoder:b", "encoder:c"]
        # Every model has shown by now what it takes: b's decoder needs 300 MB and finds, with
        # a's gone, 250 MB; the encoders of c are the youngest but those of a.
        machine.total = machine.total - machine.free() - 50 * MB
        assert await ask(house, "c") == "stop"
        assert machine.alive() == ["decoder:c", "encoder:a", "encoder:c"]


async def test_a_load_that_does_not_fit_unloads_nothing(tmp_path: Path, machine: Machine) -> None:
    async with machine.house(tmp_path, "a", "b", "c", memory={"reserve_bytes": 0}) as house:
        for name in ("c", "b", "a"):
            assert await ask(house, name) == "stop"
        before = machine.alive()
        # b and c have left room for 500 MB at most, were all their encoders to go.
        machine.total = machine.total - machine.free() - 250 * MB
        error = await refusal(house.residency.load("b"))
        assert error.code == "insufficient_memory"
        assert "needs 300 MB" in error.message
        assert "only 250 MB" in error.message
        assert await ask(house, "b") == "insufficient_memory"
        assert machine.alive() == before
        assert house.residency.model("b").encoders_kept == 1
        assert await ask(house, "a") == "stop"


async def test_the_budget_bounds_all_models_together(tmp_path: Path, machine: Machine) -> None:
    limits = {"reserve_bytes": 0, "models_bytes": 550 * MB}
    async with machine.house(tmp_path, "a", "b", "c", memory=limits) as house:
        for name in ("a", "b", "c"):  # each shows what it takes
            assert await ask(house, name) == "stop"
        most = 0
        for name in ("a", "b", "c", "b", "a"):
            assert await ask(house, name) == "stop"
            most = max(most, machine.total - machine.free())
        assert most <= 550 * MB
        assert machine.alive() == ["decoder:a", "encoder:a", "encoder:b"]
        machine.sizes["decoder"] = 500 * MB  # what a holds now, and what it will need
        assert await ask(house, "a") == "stop"
        await house.residency.unload("a")
        assert (await refusal(house.residency.load("a"))).code == "insufficient_memory"


async def test_encoders_that_would_not_fit_the_domain_of_the_npu_leave(
    tmp_path: Path, machine: Machine
) -> None:
    def on_npu(name: str, size: int) -> None:
        folder = make_model(tmp_path / "models", name)
        os.truncate(folder / "vision.onnx", size)
        tree = json.loads((folder / "rkvlm.json").read_text())
        tree["encoders"][0] |= {"engine": "rknn", "baked": True, "layout": "nhwc"}
        (folder / "rkvlm.json").write_text(json.dumps(tree))

    for name in "abc":
        on_npu(name, 1_800 * MB)
    machine.total = 64_000 * MB  # there is memory enough
    async with machine.house(tmp_path) as house:
        for name in "abc":
            await house.residency.load(name)
        assert machine.alive() == ["decoder:c", "encoder:b", "encoder:c"]
        assert house.residency.model("b").memory_bytes == 1_800 * MB


def test_the_domain_of_the_encoders() -> None:
    giga = 1 << 30
    assert memory.crowd(giga, [("a", giga), ("b", 2 * giga)]) == []
    assert memory.crowd(giga + 1, [("cpu", 0), ("a", giga), ("b", 2 * giga)]) == ["a"]
    assert memory.crowd(9 * giga, [("a", giga)]) == ["a"]  # its own trouble comes at its load


async def test_kept_encoders_leave_when_the_library_finds_no_memory(
    tmp_path: Path, machine: Machine
) -> None:
    async with machine.house(tmp_path, "a", "b", "c") as house:
        for name in ("a", "b"):
            assert await ask(house, name) == "stop"
        machine.hidden = 450 * MB  # one model alone
        assert await ask(house, "c") == "stop"
        assert machine.alive() == ["decoder:c", "encoder:c"]
        machine.hidden = 350 * MB
        assert await ask(house, "a") == "insufficient_memory"
        # Else each request for it would cost the other model its place.
        assert house.residency.model("a").state is ModelState.FAILED
        assert "not enough memory" in house.residency.model("a").detail
        with pytest.raises(RkvlmdError, match="failed to load"):
            submit(house, chat(model="a"))
        machine.hidden = 450 * MB
        assert (await house.residency.load("a")).state is READY


async def test_kept_encoders_leave_when_memory_gets_short(
    tmp_path: Path, machine: Machine, autojump_clock: trio.abc.Clock
) -> None:
    async with machine.house(tmp_path, "a", "b", "c", memory={"reserve_bytes": 200 * MB}) as house:
        for name in ("b", "a", "c"):
            assert await ask(house, name) == "stop"
            await trio.sleep(1)
        await trio.sleep(60)
        assert machine.alive() == ["decoder:c", "encoder:a", "encoder:b", "encoder:c"]
        machine.total -= machine.free() - 90 * MB  # less than half of the reserve is free
        await trio.sleep(60)
        assert machine.alive() == ["decoder:c", "encoder:a", "encoder:c"]  # b was used before a
        machine.total -= 1000 * MB
        await trio.sleep(60)
        # What serves stays, whatever happens.
        assert machine.alive() == ["decoder:c", "encoder:c"]


async def test_a_kept_encoder_that_dies_is_started_by_the_next_load_alone(
    tmp_path: Path, machine: Machine
) -> None:
    async with machine.house(tmp_path, "a", "b", engine={"restarts": 0}) as house:
        assert await ask(house, "a") == "stop"
        assert await ask(house, "b") == "stop"
        machine.started.clear()
        machine.named("encoder:a").die()
        with trio.fail_after(60):
            while house.residency.model("a").encoders_kept:
                await house.residency.wait_change()
        assert await ask(house, "b") == "stop"
        assert machine.started == []
        assert await ask(house, "a") == "stop"
        assert sorted(machine.started) == ["decoder:a", "encoder:a"]


async def test_unload_takes_the_kept_encoders_too(tmp_path: Path, machine: Machine) -> None:
    async with machine.house(tmp_path, "a", "b") as house:
        assert await ask(house, "a") == "stop"
        assert await ask(house, "b") == "stop"
        await house.residency.unload("a")
        assert machine.alive() == ["decoder:b", "encoder:b"]


# --- keep_alive --------------------------------------------------------------------------


async def left_after(house: House, model: str) -> float:
    """Return after how many seconds a model leaves, ``inf`` if not within a year."""
    began = trio.current_time()
    with trio.move_on_after(365 * 86400):
        while house.residency.model(model).state is not ABSENT:
            await house.residency.wait_change()
        return round(trio.current_time() - began, 3)
    return math.inf


@pytest.mark.parametrize(
    ("settings", "manifest", "asked", "seconds"),
    [
        (-1.0, None, None, math.inf),  # the default: never
        (60.0, None, None, 60.0),
        (60.0, 20.0, None, 20.0),
        (60.0, -1.0, None, math.inf),
        (60.0, 0.0, None, 0.0),
        (60.0, None, 30.0, 30.0),
        (60.0, None, 0.0, 10.0),  # a request does not unload at once: the owner's least
        (-1.0, None, 30.0, 30.0),
        (60.0, None, math.inf, 900.0),  # nor does it pin: the owner's most
        (60.0, None, 5000.0, 900.0),
        (5.0, None, None, 5.0),  # the bounds are for requests
    ],
)
async def test_idle_models_leave(
    tmp_path: Path, machine: Machine, autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch,
    settings: float, manifest: float | None, asked: float | None, seconds: float,
) -> None:  # fmt: skip
    models = {
        "keep_alive_seconds": settings,
        "keep_alive_min_seconds": 10.0,
        "keep_alive_max_seconds": 900.0,
    }
    async with machine.house(tmp_path, "a", models=models) as house:
        if manifest is not None:
            set_manifest(tmp_path, house, manifest)
        more = {} if asked is None else {"keep_alive": asked}
        assert await ask(house, "a", **more) == "stop"
        planned = house.residency.model("a").idle_seconds
        if seconds:  # else it may be on its way out by now
            assert planned == (None if math.isinf(seconds) else pytest.approx(seconds))
        assert await left_after(house, "a") == seconds
        if seconds < math.inf:
            assert machine.alive() == []
            assert await ask(house, "a") == "stop"  # it is not held


def set_manifest(tmp: Path, house: House, seconds: float) -> None:
    """Put a ``keep_alive_seconds`` into the manifest of a and have it read again."""
    path = tmp / "models" / "a" / "rkvlm.json"
    tree = json.loads(path.read_text())
    tree["defaults"] = {"keep_alive_seconds": seconds}
    path.write_text(json.dumps(tree))
    entries, problems = catalog.scan(tmp / "models", demo=False)
    assert not problems
    house.residency.rescan(entries)


async def test_each_use_counts_anew_and_a_long_one_is_left_alone(
    tmp_path: Path, machine: Machine, autojump_clock: trio.abc.Clock
) -> None:
    async with machine.house(tmp_path, "a", models={"keep_alive_seconds": 100.0}) as house:
        assert await ask(house, "a") == "stop"
        await trio.sleep(90)
        assert await ask(house, "a") == "stop"
        await trio.sleep(90)
        assert house.residency.model("a").state is READY
        async with house.tools.lease.hold("somebody", "a") as grip:
            await house.residency.ensure("a", grip)
            await trio.sleep(1000)
            assert house.residency.model("a").idle_seconds is None
            house.residency.used("a")
        assert house.residency.model("a").state is READY
        assert await left_after(house, "a") == 100.0


async def test_another_keep_alive_counts_from_the_last_use(
    tmp_path: Path, machine: Machine, autojump_clock: trio.abc.Clock
) -> None:
    async with machine.house(tmp_path, "a", "b") as house:
        assert await ask(house, "b", keep_alive=4000.0) == "stop"
        assert await ask(house, "a") == "stop"
        await trio.sleep(20)
        wanted = replace(
            house.settings, models=replace(house.settings.models, keep_alive_seconds=50.0)
        )
        house.adopt(wanted)
        assert await left_after(house, "a") == 30.0
        house.adopt(wanted)  # nothing else has changed: no model gets more time, or less
        assert await ask(house, "a", keep_alive=4000.0) == "stop"
        house.adopt(replace(wanted, models=replace(wanted.models, max_tokens=9)))
        assert await left_after(house, "a") == 4000.0


async def test_a_pin_that_cannot_be_kept_is_told(
    tmp_path: Path, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "models.new").mkdir()  # where the new file would be written
    async with machine.house(tmp_path, "a", ledger=True) as house:
        assert (await house.residency.pin("a")).pinned
    assert "the pin will be forgotten at a restart" in caplog.text


async def test_a_model_that_somebody_waits_for_does_not_leave(
    tmp_path: Path, machine: Machine, autojump_clock: trio.abc.Clock
) -> None:
    limits = {"keep_alive_seconds": 10.0}
    async with machine.house(tmp_path, "a", models=limits, queue={"max_jumps": 0}) as house:
        assert await ask(house, "a") == "stop"
        async with house.tools.lease.hold("somebody", "a"):
            await trio.sleep(20)  # its time is over, and the unload waits for its turn
            assert house.tools.lease.waiting == 1
            job = submit(house, chat(model="a"))
            await until_phase(house, job, "waiting")
        assert (await collect(job))[1].reason == "stop"
        assert sorted(machine.started) == ["decoder:a", "encoder:a"]
        assert await left_after(house, "a") == 10.0


async def test_kept_encoders_leave_when_their_time_is_over(
    tmp_path: Path, machine: Machine, autojump_clock: trio.abc.Clock
) -> None:
    async with machine.house(tmp_path, "a", "b", models={"keep_alive_seconds": 50.0}) as house:
        assert await ask(house, "a") == "stop"
        await trio.sleep(30)
        assert await ask(house, "b") == "stop"
        await trio.sleep(30)
        assert machine.alive() == ["decoder:b", "encoder:b"]


# --- pins --------------------------------------------------------------------------------


async def test_a_pinned_model_is_never_swapped_out(tmp_path: Path, machine: Machine) -> None:
    async with machine.house(tmp_path, "a", "b") as house:
        assert (await house.residency.pin("a")).pinned
        assert house.residency.model("a").state is READY
        with pytest.raises(RkvlmdError) as info:
            submit(house, chat(model="b"))
        assert (info.value.code, info.value.status) == ("model_pinned", 503)
        error = await refusal(house.residency.load("b"))
        assert (error.code, error.message) == (
            "model_pinned", "The model 'a' is pinned; unpin it first.",
        )  # fmt: skip
        assert (await refusal(house.residency.pin("b"))).code == "model_pinned"
        assert (await refusal(house.residency.unload("a"))).code == "model_pinned"
        assert await ask(house, "a") == "stop"
        assert machine.alive() == ["decoder:a", "encoder:a"]
        assert not (await house.residency.unpin("a")).pinned
        assert await ask(house, "b") == "stop"


async def test_a_request_that_waits_when_the_pin_comes(tmp_path: Path, machine: Machine) -> None:
    async with machine.house(tmp_path, "a", "b") as house:
        await house.residency.load("a")
        async with house.tools.lease.hold("somebody", "a"):
            job = submit(house, chat(model="b"))
            with trio.fail_after(60):
                await house.residency.pin("a")
        _, end = await collect(job)
        assert end.error is not None
        assert end.error.code == "model_pinned"
        assert house.residency.model("a").state is READY


async def test_a_pinned_model_does_not_leave_when_idle(
    tmp_path: Path, machine: Machine, autojump_clock: trio.abc.Clock
) -> None:
    async with machine.house(tmp_path, "a", models={"keep_alive_seconds": 10.0}) as house:
        await house.residency.pin("a")
        assert await ask(house, "a", keep_alive=0.0) == "stop"
        assert await left_after(house, "a") == math.inf
        await house.residency.unpin("a")
        assert await left_after(house, "a") == 10.0


async def test_a_pin_survives_a_restart(tmp_path: Path, machine: Machine) -> None:
    async with machine.house(tmp_path, "a", "b", ledger=True) as house:
        await house.residency.pin("a")
    async with machine.house(tmp_path, "a", "b", ledger=True) as house:
        with trio.fail_after(60):
            while house.residency.model("a").state is not READY:
                await house.residency.wait_change()
        assert house.residency.model("a").pinned
        with pytest.raises(RkvlmdError, match="pinned"):
            submit(house, chat(model="b"))
        await house.residency.unpin("a")
    async with machine.house(tmp_path, "a", "b", ledger=True) as house:
        assert not house.residency.model("a").pinned
        assert house.residency.model("a").state is ABSENT


async def test_a_model_that_cannot_be_loaded_is_not_pinned(
    tmp_path: Path, machine: Machine
) -> None:
    async with machine.house(tmp_path, "a", "b") as house:
        machine.total = 1
        assert (await refusal(house.residency.pin("a"))).code == "insufficient_memory"
        assert not house.residency.model("a").pinned
        machine.total = 8000 * MB
        assert await ask(house, "b") == "stop"


async def test_a_damaged_state_file_is_no_reason_to_fail(
    tmp_path: Path, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "models.json").write_bytes(b"\xff{")
    async with machine.house(tmp_path, "a", ledger=True) as house:
        assert await ask(house, "a") == "stop"
    assert "damaged" in caplog.text


# --- loads that are under way --------------------------------------------------------------


async def test_requests_for_a_model_that_is_loading_wait_and_say_so(
    tmp_path: Path, machine: Machine
) -> None:
    async with machine.house(tmp_path, "a", "b") as house:
        gate = trio.Event()
        verify = house.residency._loader.verify

        async def slow(record: object) -> None:
            await gate.wait()
            await verify(record)  # type: ignore[arg-type]

        house.residency._loader.verify = slow  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(house.residency.load, "a")
            await trio.testing.wait_all_tasks_blocked()
            assert house.residency.model("a").state is ModelState.LOADING
            jobs = [submit(house, chat(model=name)) for name in ("a", "a", "b")]
            await trio.testing.wait_all_tasks_blocked()
            assert [view.phase for view in house.scheduler.jobs()] == [
                "loading",
                "loading",
                "waiting",
            ]
            assert house.status()["queue"]["loading"] == 2
            assert house.status()["models"][0]["state"] == "loading"
            gate.set()
        for job in jobs:
            assert (await collect(job))[1].reason == "stop"


async def test_what_a_load_took_tells_how_long_the_next_one_will_take(
    tmp_path: Path, machine: Machine, patient_clock: trio.abc.Clock
) -> None:
    async with machine.house(tmp_path, "a", "b", ledger=True) as house:
        bring_up = house.residency._loader.bring_up
        seen: list[float | None] = []

        async def slow(record: object) -> None:
            for _ in range(4):
                seen.append(house.residency.model("a").seconds_left)
                await trio.sleep(5)
            await bring_up(record)  # type: ignore[arg-type]

        house.residency._loader.bring_up = slow  # type: ignore[method-assign]
        await house.residency.load("a")
        assert seen == [None] * 4  # nobody knows, and there is no progress
        seen.clear()
        await house.residency.unload("a")
        await house.residency.load("a")
        assert seen == [pytest.approx(left, abs=0.01) for left in (20, 15, 10, 5)]
        await house.residency.load("b")
        seen.clear()
        await house.residency.load("a")  # the decoder alone: that was never done
        assert seen == [None] * 4
    async with machine.house(tmp_path, "a", "b", ledger=True) as house:
        record = house.residency._records["a"]
        assert record.memo.load_seconds["decoder.0+encoder.0"] == pytest.approx(20, abs=0.01)
        assert record.need([p for p in _parts(house) if p.role == "decoder"]) == 300 * MB


def _parts(house: House) -> list[object]:
    return list(parts_of(house.residency.entry("a")))
