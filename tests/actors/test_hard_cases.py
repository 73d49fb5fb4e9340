"""What happens at the same moment as something else: unloads and deaths, stops and drains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from rkvlmd.actors import memory
from rkvlmd.actors.blobs import Blob
from rkvlmd.actors.house import House
from rkvlmd.actors.loading import HASHES, MOST_HASHES, Loader
from rkvlmd.actors.records import Record
from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import ModelState
from rkvlmd.models import catalog
from tests.fakes.machine import Machine
from tests.fakes.machine import machine as machine  # a fixture
from tests.fakes.quick_house import quick_house
from tests.fakes.scripted import chat, collect, make_model, settings_for, submit
from tests.fakes.stage import Stage


async def until_waiting(house: House, count: int) -> None:
    """Wait until so many wait for the lease."""
    while house.tools.lease.waiting < count:
        await trio.lowlevel.checkpoint()


async def test_a_repair_does_not_load_what_the_owner_has_unloaded(
    tmp_path: Path, machine: Machine
) -> None:
    async with machine.house(tmp_path, "a") as house:
        with trio.fail_after(60):
            await house.residency.load("a")
            async with trio.open_nursery() as nursery:
                async with house.tools.lease.hold("10.0.0.1", "a"):
                    nursery.start_soon(house.residency.unload, "a")
                    await until_waiting(house, 1)
                    machine.named("decoder:a").die()
                    await until_waiting(house, 2)
            async with house.tools.lease.hold("10.0.0.1", "a"):
                pass  # the repair had its turn before
        view = house.residency.model("a")
        assert (view.state, view.held, machine.alive()) == (ModelState.ABSENT, True, [])


async def test_a_load_that_waits_ends_when_the_model_is_unloaded(
    tmp_path: Path, machine: Machine
) -> None:
    async with machine.house(tmp_path, "a") as house:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:

                async def load() -> None:
                    with pytest.raises(RkvlmdError) as info:
                        await house.residency.load("a")
                    assert info.value.code == "model_unloaded"

                async with house.tools.lease.hold("10.0.0.1", "a"):
                    nursery.start_soon(load)
                    await until_waiting(house, 1)
                    nursery.start_soon(house.residency.unload, "a")
                    await until_waiting(house, 2)
        assert machine.started == []


async def test_all_who_wait_for_the_last_job_hear_of_its_end(tmp_path: Path) -> None:
    """As a stop does while ``rkvlmctl drain`` looks again and again."""
    async with quick_house(tmp_path, "a") as house:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                async with house.tools.lease.hold("test", "a"):
                    job = submit(house, chat(model="a"))
                    for _ in range(3):
                        nursery.start_soon(house.scheduler.wait_empty)
                        await trio.testing.wait_all_tasks_blocked()
                await collect(job)


async def test_an_error_together_with_a_cancellation_ends_one_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with quick_house(tmp_path, "a") as house:
        begun = trio.Event()
        count = 0

        async def do(_build: Any, blobs: Sequence[Blob], **_: Any) -> Any:
            nonlocal count
            count += 1
            first = count == 1
            if not first:
                begun.set()
            try:
                await trio.sleep_forever()
            finally:
                for blob in blobs:
                    blob.close()
                if first:
                    raise OSError(24, "Too many open files")

        monkeypatch.setattr(house.tools.prep, "do", do)
        with trio.fail_after(60):
            job = submit(house, chat(model="a", pictures=2))
            await begun.wait()
            job.abandon("client_gone")
            await house.scheduler.wait_empty()
            monkeypatch.undo()
            _, end = await collect(submit(house, chat(model="a", pictures=2)))
        assert end.reason == "stop"


async def test_a_stop_does_not_wait_for_an_encode_that_hangs(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    stage = Stage(fail="encoder", how="hang")
    engine = {"abort_seconds": 3.0, "encode_seconds": 600.0}
    async with quick_house(tmp_path, "a", child=stage.child, engine=engine) as house:
        job = submit(house, chat(model="a", pictures=1))
        await stage.encoding.wait()
        began = trio.current_time()
        await house.scheduler.drain(20)
        assert trio.current_time() - began == pytest.approx(23, abs=0.5)
        _, end = await collect(job)
        assert end.reason == "shutdown"
        await trio.sleep(60)
        assert house.residency.loading("a") is False  # nothing is brought back


async def test_a_machine_whose_memory_cannot_be_read_now(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:  # fmt: skip
    """As without a free descriptor: a load is refused, and what serves goes on."""
    async with machine.house(tmp_path, "a", "b", "c") as house:
        for model in "ab":
            assert (await collect(submit(house, chat(model=model))))[1].reason == "stop"
        monkeypatch.setattr(house.residency, "_room", lambda: memory.room(tmp_path))
        await trio.sleep(60)  # somebody looks whether kept encoders must leave
        _, end = await collect(submit(house, chat(model="c")))
        assert end.error is not None
        assert (end.error.code, end.error.retry_after) == ("insufficient_memory", 5)
        assert (await collect(submit(house, chat(model="b"))))[1].reason == "stop"
        assert machine.alive() == ["decoder:b", "encoder:a", "encoder:b"]


# --- checked hashes ----------------------------------------------------------------------


class Reads:
    """A loader over two models, and how often ``catalog.verify`` had to read files."""

    def __init__(self, tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("a", "b"):
            make_model(tmp / "models", name)
        self.state = tmp / "state"
        self.state.mkdir()
        self.settings = settings_for(tmp)
        entries, _ = catalog.scan(tmp / "models", demo=False)
        self.records = {name: Record(entry) for name, entry in entries.items()}
        self.count = 0
        real = catalog._read_into

        def read(*arguments: Any) -> int:
            self.count += 1
            return real(*arguments)

        monkeypatch.setattr(catalog, "_read_into", read)

    async def verify(self, loader: Loader, name: str) -> bool:
        """Whether the files of a model were read."""
        before = self.count
        await loader.verify(self.records[name])
        return self.count > before


async def test_hashes_are_remembered_over_swaps_and_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(tmp_path, monkeypatch)
    loader = Loader(reads.settings, reads.state)
    assert [await reads.verify(loader, name) for name in "abab"] == [True, True, False, False]
    again = Loader(reads.settings, reads.state)
    assert [await reads.verify(again, name) for name in "ab"] == [False, False]


async def test_no_more_hashes_than_that_are_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(tmp_path, monkeypatch)
    loader = Loader(reads.settings, reads.state)
    loader._remembered = {f"0:{number}:0:0": "" for number in range(MOST_HASHES)}
    assert await reads.verify(loader, "a")
    assert len(loader._remembered) == MOST_HASHES
    assert not await reads.verify(loader, "a")


@pytest.mark.parametrize("damage", [b"", b"\0" * 500, b'{"a":"\xff"}', b"[" * 100_000, b"[1]"])
async def test_damaged_hashes_are_found_out_again(
    damage: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(tmp_path, monkeypatch)
    (reads.state / HASHES).write_bytes(damage)
    loader = Loader(reads.settings, reads.state)
    assert await reads.verify(loader, "a")
    assert not await reads.verify(Loader(reads.settings, reads.state), "a")


async def test_a_load_that_meets_a_bug_is_not_the_end_of_the_house(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def verify(*_: Any) -> None:
        raise OSError("something nobody thought of")

    async with machine.house(tmp_path, "a", "b") as house:
        with trio.fail_after(60):
            monkeypatch.setattr(house.residency._loader, "verify", verify)
            _, end = await collect(submit(house, chat("x", model="a")))
            assert end.error is not None
            assert end.error.code == "model_failed"
            assert "nobody thought" not in end.error.message
            assert house.residency.model("a").state is ModelState.FAILED
            monkeypatch.undo()
            assert (await collect(submit(house, chat("x", model="b"))))[1].reason == "stop"
