"""``actors.child`` with real processes."""

from __future__ import annotations

import json
import os
import resource
import signal
from dataclasses import replace
from typing import Any

import pytest
import trio

from rkvlmd.actors.child import Child, ChildDiedError
from rkvlmd.settings import EngineSettings
from rkvlmd.wire import child as wire

pytestmark = pytest.mark.process


def make(script: dict[str, Any] | None = None, **settings: Any) -> Child:
    return Child(
        "scripted:test",
        "scripted",
        replace(EngineSettings(), grace_seconds=1.0, **settings),
        arguments=["--script", json.dumps(script or {})],
    )


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def test_hello_load_generate_leave() -> None:
    child = make({"tokens": 2})
    with trio.fail_after(60):
        async with trio.open_nursery() as inner:
            await inner.start(child.run)
            assert child.alive
            assert child.hello is not None
            assert child.hello.pid == child.pid
            await child.send(wire.Load(folder="/nowhere", manifest={}))
            while not isinstance((await child.receive())[0], wire.Ready):
                pass
            order = wire.Generate(id=child.next_id(), tokens=[1, 2], max_tokens=9)
            await child.send(order)
            seen = []
            while not seen or not isinstance(seen[-1], wire.GenerateDone):
                seen.append((await child.receive())[0])
            assert [type(m).__name__ for m in seen] == [
                "Prefilled", "Text", "Text", "GenerateDone",
            ]  # fmt: skip
            inner.cancel_scope.cancel()
    assert child.death is not None
    assert child.death.planned
    assert gone(child.pid)


@pytest.mark.parametrize(
    ("number", "how"), [(signal.SIGKILL, "killed by SIGKILL"), (40, "killed by signal 40")]
)
async def test_kill_from_outside_is_unplanned(number: int, how: str) -> None:
    """Real-time signals, as 40, have no names."""
    child = make()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(child.run)
            os.kill(child.pid, number)
            with pytest.raises(ChildDiedError) as info:
                await child.receive()
    assert info.value.how == how
    assert not info.value.planned
    with pytest.raises(ChildDiedError):
        await child.send(wire.Abort(id=1))


async def test_our_kill_is_planned() -> None:
    child = make()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(child.run)
            child.kill("the test says so")
            child.kill("again")
    assert child.death is not None
    assert child.death.planned
    assert child.death.how == "the test says so"


async def test_last_words() -> None:
    child = make({"fault": {"at": "load", "kind": "segv"}})
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(child.run)
            await child.send(wire.Load(folder="/nowhere", manifest={}))
            with pytest.raises(ChildDiedError) as info:
                while True:
                    await child.receive()
    assert info.value.how == "killed by SIGSEGV"
    assert "scripted fault: segv at load" in info.value.last_words


async def test_no_hello_in_time() -> None:
    child = make({"fault": {"at": "hello", "kind": "hang"}}, hello_seconds=1.5)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            with pytest.raises(ChildDiedError, match="did not say hello in time"):
                await nursery.start(child.run)
    assert gone(child.pid)


async def test_child_that_cannot_start() -> None:
    child = Child("x", "no-such-role", EngineSettings())
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            with pytest.raises(ChildDiedError, match="exit status 2"):
                await nursery.start(child.run)


async def test_stopped_child_is_killed_after_the_grace() -> None:
    child = make({"fault": {"at": "load", "kind": "stop"}})
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(child.run)
            await child.send(wire.Load(folder="/nowhere", manifest={}))
            with trio.move_on_after(0.3):
                while True:
                    await child.receive()
            nursery.cancel_scope.cancel()
    assert gone(child.pid)


async def test_terminal_signals_do_not_reach_the_child() -> None:
    child = make()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(child.run)
            assert os.getpgid(child.pid) == child.pid
            os.kill(child.pid, signal.SIGTERM)
            os.kill(child.pid, signal.SIGINT)
            await child.send(wire.Load(folder="/nowhere", manifest={}))
            while not isinstance((await child.receive())[0], wire.Ready):
                pass
            nursery.cancel_scope.cancel()


async def test_no_descriptors_left_is_a_death_and_not_the_end() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    child = make()
    async with trio.open_nursery() as nursery:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), hard))
        try:
            with pytest.raises(ChildDiedError, match="could not be started"):
                await nursery.start(child.run)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
