"""Orders that go out in the turn of the loop in which what they wait for is read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from rkvlmd.actors.blobs import Blob
from rkvlmd.actors.house import House
from rkvlmd.actors.prep import Prep
from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import ModelState
from rkvlmd.wire import child as wire
from tests.fakes.children import FakeChild, FakeLoader
from tests.fakes.parts import house_of
from tests.fakes.scripted import chat, collect, make_model, settings_for, submit
from tests.fakes.torture import AbandonAtStep, abandon_everywhere

CONTEXT = 4096


@dataclass
class Npu:
    """What is sent to encoder and decoder, and that no two of them ever work at once."""

    log: list[str] = field(default_factory=list)
    working: str = ""
    reading: bool = False
    same: bool = False
    fail: str = ""
    render_gate: trio.Event | None = None
    encode_gate: trio.Event | None = None
    rendering: trio.Event = field(default_factory=trio.Event)
    numbers: Any = field(default_factory=lambda: count(1))

    def begins(self, order: wire.ToChild) -> None:
        if not isinstance(order, wire.Encode | wire.Generate):
            return
        name = type(order).__name__
        assert not self.working, f"{name} beside {self.working}"
        self.working = name
        self.log.append(f"{name} in the turn" if self.reading else name)

    def child(self, name: str, role: str) -> FakeChild:
        return NpuChild(self, name, role)


class NpuChild(FakeChild):
    """Has the NPU from an order to its end; reads of ends are marked."""

    def __init__(self, npu: Npu, name: str, role: str) -> None:
        super().__init__(name, role)
        self.npu = npu

    def sha256(self) -> str:
        return f"{0 if self.npu.same else next(self.npu.numbers):064x}"

    async def send(self, message: wire.ToChild, fds: Sequence[int] = ()) -> None:
        if self.alive:
            self.npu.begins(message)
        if isinstance(message, wire.Render) and self.npu.render_gate is not None:
            self.npu.rendering.set()
            await self.npu.render_gate.wait()
        await super().send(message, fds)

    def send_now(self, order: bytes, fds: Sequence[int] = ()) -> bool:
        message = self.order_of(order)
        if self.alive:
            self.npu.begins(message)
        return super().send_now(order, fds)

    async def _encode(self, order: wire.Encode) -> None:
        if self.npu.encode_gate is not None:
            await self.npu.encode_gate.wait()
        if self.npu.fail == "encode":
            self.npu.fail = ""
            await self._answer(wire.Failed(id=order.id, code="engine_error", message="No."))
        else:
            await super()._encode(order)

    async def _answer(self, message: wire.FromChild, fd: int | None = None) -> None:
        ends = isinstance(message, wire.EncodeDone | wire.GenerateDone)
        ends = ends or (isinstance(message, wire.Failed) and self.role != "prep")
        heard, npu = self.listener, self.npu

        def hear(said: wire.FromChild, fds: Sequence[int]) -> bool:
            npu.reading = True
            try:
                return heard is not None and heard(said, fds)
            finally:
                npu.reading = False

        if not ends:
            await super()._answer(message, fd)
            return
        await trio.lowlevel.checkpoint()
        npu.working, heard = "", self.listener
        fds = [] if fd is None else [fd]
        assert not hear(message, fds)
        await self._say.send((message, fds))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model(tmp_path / "models", "a", context=CONTEXT)
    return tmp_path


@asynccontextmanager
async def opened(folder: Path, npu: Npu, **sections: Any) -> AsyncIterator[House]:
    settings = settings_for(folder, **sections)
    loader = FakeLoader(settings, folder, make_child=npu.child)
    prep = Prep(settings, lambda name: npu.child(name, "prep"))
    with trio.fail_after(60):
        async with house_of(settings, loader, prep) as house:
            await house.residency.load("a")
            yield house
    assert Blob.live == 0


async def test_the_next_encode_and_the_generation_wait_for_no_task(folder: Path) -> None:
    npu = Npu()
    async with opened(folder, npu) as house:
        async with house.tools.lease.hold("test", "a"):
            jobs = [submit(house, chat("x", pictures=2), f"10.0.0.{n}") for n in range(3)]
            await trio.testing.wait_all_tasks_blocked()
        for job in jobs:
            assert (await collect(job))[1].reason == "stop"
    each = ["Encode in the turn", "Encode", "Generate in the turn"]
    # The test gave the lease back in a turn of its own.
    assert npu.log == ["Encode", *each[1:], *each, *each]


async def test_text_follows_in_the_turn_after(folder: Path) -> None:
    npu = Npu()
    async with opened(folder, npu) as house:
        jobs = [submit(house, chat("x"), f"10.0.0.{n}") for n in range(3)]
        for job in jobs:
            assert (await collect(job))[1].reason == "stop"
        assert not house.tools.lease.held
    assert npu.log == ["Generate"] * 3


async def test_rows_that_are_there_need_no_encode(folder: Path) -> None:
    npu = Npu(same=True)
    async with opened(folder, npu, cache={"embeddings_bytes": 1000}) as house:
        for _ in range(2):
            assert (await collect(submit(house, chat("x", pictures=1))))[1].reason == "stop"
    assert npu.log == ["Encode", "Generate", "Generate"]


async def test_an_idle_npu_encodes_before_there_is_a_prompt(folder: Path) -> None:
    npu = Npu(render_gate=trio.Event())
    async with opened(folder, npu) as house:
        job = submit(house, chat("x", pictures=1))
        await npu.rendering.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert npu.log == ["Encode"]
        assert not npu.working, "it has ended before the prompt is there"
        assert house.tools.lease.held
        assert npu.render_gate is not None
        npu.render_gate.set()
        assert (await collect(job))[1].reason == "stop"
        assert job.seconds["encode"] >= 0
    assert npu.log == ["Encode", "Generate"]


async def test_it_does_not_where_somebody_else_has_the_npu(folder: Path) -> None:
    npu = Npu(render_gate=trio.Event())
    async with opened(folder, npu) as house:
        async with house.tools.lease.hold("test", "a"):
            job = submit(house, chat("x", pictures=1))
            await npu.rendering.wait()
            await trio.testing.wait_all_tasks_blocked()
            assert npu.log == []
            assert npu.render_gate is not None
            npu.render_gate.set()
        assert (await collect(job))[1].reason == "stop"


async def test_it_does_not_where_the_prompt_may_be_too_long(folder: Path) -> None:
    npu = Npu(render_gate=trio.Event())
    async with opened(folder, npu) as house:
        slot = house.scheduler.reserve("10.0.0.1", CONTEXT + 1000)
        job = house.scheduler.submit(slot, chat("x", pictures=1), request_id="long")
        slot.release()
        await npu.rendering.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert npu.log == []
        assert not house.tools.lease.held
        assert npu.render_gate is not None
        npu.render_gate.set()
        assert (await collect(job))[1].reason == "stop"


async def test_it_does_not_while_the_prep_child_is_busy(folder: Path) -> None:
    """The lease must not wait for the pictures of others."""
    npu = Npu(render_gate=trio.Event())
    async with opened(folder, npu, prep={"children": 2}) as house:
        first = submit(house, chat("x"))
        await npu.rendering.wait()
        second = submit(house, chat("y", pictures=1))
        await trio.testing.wait_all_tasks_blocked()
        assert "decode_image" in second.seconds, "another child has looked at the picture"
        assert not house.tools.lease.held
        assert npu.render_gate is not None
        npu.render_gate.set()
        for job in (first, second):
            assert (await collect(job))[1].reason == "stop"


async def test_a_prompt_that_fails_gives_the_lease_back_after_the_encode(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npu = Npu(encode_gate=trio.Event())
    async with opened(folder, npu) as house:

        async def refuse(*_: Any) -> None:
            assert house.tools.lease.held
            assert npu.log == ["Encode"]
            raise RkvlmdError("invalid_request", "No such role.")

        monkeypatch.setattr("rkvlmd.actors.prepare.rendered", refuse)
        job = submit(house, chat("x", pictures=1))
        await trio.testing.wait_all_tasks_blocked()
        assert npu.working
        assert house.tools.lease.held
        assert npu.encode_gate is not None
        npu.encode_gate.set()
        _, end = await collect(job)
        assert end.error is not None
        assert end.error.code == "invalid_request"
        await house.scheduler.wait_empty()
        assert not house.tools.lease.held
        monkeypatch.undo()
        assert (await collect(submit(house, chat("x", pictures=1))))[1].reason == "stop"


async def test_nothing_is_generated_for_one_who_left_during_the_encode(folder: Path) -> None:
    npu = Npu(encode_gate=trio.Event())
    async with opened(folder, npu) as house:
        job = submit(house, chat("x", pictures=1))
        await trio.testing.wait_all_tasks_blocked()
        job.abandon("client_gone")
        await trio.testing.wait_all_tasks_blocked()
        assert house.tools.lease.held, "the NPU is still at work"
        assert npu.encode_gate is not None
        npu.encode_gate.set()
        await house.scheduler.wait_empty()
        assert not house.tools.lease.held
    assert npu.log == ["Encode"]


async def test_an_encode_that_fails_early_is_the_job_s_error(folder: Path) -> None:
    npu = Npu(fail="encode")
    async with opened(folder, npu) as house:
        _, end = await collect(submit(house, chat("x", pictures=1)))
        assert end.error is not None
        assert end.error.code == "engine_error"
        await house.scheduler.wait_empty()
        assert not house.tools.lease.held


async def test_files_that_were_exchanged_meanwhile_are_not_asked(folder: Path) -> None:
    """What was prepared for the one would be garbage to the other."""
    npu = Npu()
    async with opened(folder, npu) as house:
        async with house.tools.lease.hold("test", "a"):
            job = submit(house, chat("x", pictures=1))
            await trio.testing.wait_all_tasks_blocked()
            record = house.residency._records["a"]
            record.entry = type(record.entry)(**{**vars_of(record.entry), "digest": "other"})
        _, end = await collect(job)
    assert end.error is not None
    assert (end.error.code, end.error.should_retry) == ("model_unloaded", True)


def vars_of(entry: Any) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in entry.__dataclass_fields__}


async def test_a_bug_before_the_lease_is_used_gives_it_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npu = Npu()

    def fail(*_: Any) -> None:
        raise RuntimeError("nobody thought of it")

    async with opened(folder, npu) as house:
        monkeypatch.setattr("rkvlmd.models.rkllm.without_effect", fail)
        _, end = await collect(submit(house, chat("x", pictures=1)))
        assert end.error is not None
        assert end.error.code == "server_error"
        await house.scheduler.wait_empty()
        assert not house.tools.lease.held
        monkeypatch.undo()
        assert (await collect(submit(house, chat("x", pictures=1))))[1].reason == "stop"


@pytest.mark.parametrize("which", [0, 1])
def test_never_two_at_work_whenever_a_job_is_abandoned(folder: Path, which: int) -> None:
    """The first of three has an idle NPU, the second is given it by the first."""

    async def scenario(instrument: AbandonAtStep) -> None:
        npu = Npu()
        async with opened(folder, npu) as house:
            jobs = [submit(house, chat("x", pictures=1), f"10.0.0.{n}") for n in range(3)]
            instrument.job = jobs[which]
            for number, job in enumerate(jobs):
                _, end = await collect(job)
                assert end.reason == "stop" or (number == which and end.reason == "client_gone")
            await house.scheduler.wait_empty()
            assert not house.tools.lease.held
            assert not npu.working
            assert house.residency.model("a").state is ModelState.READY
            assert not any(house.tools.residency.restarts.values())

    assert 20 < abandon_everywhere(scenario) < 999
