"""No table of the house grows with the requests it has served, however they ended."""

from __future__ import annotations

import functools
import gc
import types
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from rkvlmd.actors import crashes
from rkvlmd.actors.blobs import Blob, from_bytes
from rkvlmd.actors.crashes import CrashMemory
from rkvlmd.actors.embeddings import EmbeddingCache, Rows
from rkvlmd.actors.house import House
from rkvlmd.actors.job import Job
from rkvlmd.actors.ready import Picture, View
from rkvlmd.actors.seen import Seen, Source
from rkvlmd.messages import EndReason
from rkvlmd.wire import child as wire
from tests.fakes.quick_house import quick_house
from tests.fakes.scripted import chat, collect, submit
from tests.fakes.stage import Stage

_SIMPLE = (str, bytes, int, float, type(None), type, types.ModuleType)
_TABLES = (dict, list, set, frozenset, deque)


def tables(house: House) -> Counter[str]:
    """Return how many things each table holds that can be reached from the house, by its path."""
    found: Counter[str] = Counter()
    known, waiting = {id(house)}, deque([("house", house)])
    while waiting:
        path, value = waiting.popleft()
        if isinstance(value, _TABLES):
            found[path] += len(value)
        for name, inner in _inside(value):
            if id(inner) not in known and not isinstance(inner, _SIMPLE):
                known.add(id(inner))
                waiting.append((path + name, inner))
    return found


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of containers, of functions, and of objects of ours."""
    if isinstance(value, (*_TABLES, tuple)):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        yield from (("[]", item) for item in items)
    elif isinstance(value, types.MethodType):
        yield "", value.__self__
    elif isinstance(value, types.FunctionType):
        yield from (("()", cell.cell_contents) for cell in value.__closure__ or ())
    elif isinstance(value, functools.partial):
        yield from (("()", item) for item in (value.func, *value.args))
    elif type(value).__module__.startswith("rkvlmd."):
        slots = [getattr(kind, "__slots__", ()) for kind in type(value).__mro__]
        names = {n for some in slots for n in ((some,) if isinstance(some, str) else some)}
        for name in sorted({*names, *getattr(value, "__dict__", ())}):
            yield f".{name}", getattr(value, name, None)


@contextmanager
def no_collector() -> Iterator[None]:
    """Leave what refers to itself where it is."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def ended(house: House, text: str, pictures: int = 0, client: str = "10.0.0.1") -> EndReason:
    job = submit(house, chat(text, pictures=pictures, model="a"), client)
    return (await collect(job))[1].reason


async def round_of_requests(house: House, stage: Stage, number: int) -> None:
    """One request of each kind, none of which was there before."""
    client = f"10.0.{number // 200}.{number % 200}"
    assert await ended(house, f"text {number}", client=client) == "stop"
    assert await ended(house, f"picture {number}", 2, client) == "stop"
    for how, reason in (("error", "error"), ("die", "stop")):
        for role in ("encoder", "decoder"):
            stage.fail, stage.how = role, how
            assert await ended(house, f"{role} {how} {number}", 1, client) == reason
    # One leaves before its pictures have rows.
    async with house.tools.lease.hold("", ""):
        job = submit(house, chat(f"leaver {number}", pictures=1, model="a"), client)
        await job.checked.wait()
        job.abandon("client_gone")
        await house.scheduler.wait_empty()


async def test_no_table_grows_with_requests(tmp_path: Path) -> None:
    stage = Stage()
    async with quick_house(
        tmp_path, "a", child=stage.child,
        cache={"embeddings_bytes": 1000}, queue={"crash_refusal_seconds": 0.0},
    ) as house:  # fmt: skip
        with trio.fail_after(60):
            for number in range(8):
                await round_of_requests(house, stage, number)
            await house.tools.prep.wait_idle()
            before = tables(house)
            assert before["house.tools.seen._pictures"] <= len(house.tools.cache)
            for number in range(8, 40):
                await round_of_requests(house, stage, number)
            await house.tools.prep.wait_idle()
            more = tables(house) - before
            # The hash of one more decimal place, a message that was not read yet.
            assert {path: count for path, count in more.items() if count > 4} == {}
    assert Blob.live == 0


@pytest.mark.parametrize("role", ["", "encoder", "decoder"])
async def test_a_job_that_has_ended_is_freed_at_once(tmp_path: Path, role: str) -> None:
    """Its error does not hold the frames in which it was raised, which hold the job."""
    stage = Stage(fail=role)
    async with quick_house(tmp_path, "a", child=stage.child) as house:
        with trio.fail_after(60):
            assert await ended(house, "the first one loads") in {"error", "stop"}
            await house.scheduler.wait_empty()
            with no_collector():
                # What the load still knows of its job is one job, and no more.
                before = living()
                for number in range(3):
                    stage.fail = role
                    assert await ended(house, f"x {number}", 1) == ("error" if role else "stop")
                await house.scheduler.wait_empty()
                await trio.testing.wait_all_tasks_blocked()
                assert living() <= before


def living() -> set[str]:
    """Return the jobs that somebody still knows."""
    return {found.id for found in gc.get_objects() if isinstance(found, Job)}


# --- what pictures became ----------------------------------------------------------------------


def source(size: int = 5) -> Source:
    return Source(("digest", "auto"), "raw", size)


def picture(sha256: str, *keys: str) -> Picture:
    return Picture(tuple(View(None, key, 0, 4) for key in keys), (0,), sha256)


async def put(cache: EmbeddingCache, *keys: str) -> None:
    for key in keys:
        with await from_bytes(b"x" * 100) as blob:
            cache.put(key, Rows(blob, wire.Tensor(shape=(100,), dtype="uint8")))


async def test_a_picture_is_forgotten_with_its_rows() -> None:
    with EmbeddingCache(300) as cache:
        known = Seen(cache)
        for number in range(100):
            held = known.learn(source(number), picture(str(number), f"{number}"))
            await put(cache, f"{number}")
            held.close()
        cache.sweep()
        assert len(known) == len(cache) == 3
        assert known.hashes(source(99)) == ["99"]
        assert (len(known._alike), known._views) == (3, 3)


async def test_a_picture_that_nobody_encoded_is_forgotten_with_its_job() -> None:
    with EmbeddingCache(1000) as cache:
        known = Seen(cache)
        first, second = (known.learn(source(), picture("p", "a", "b")) for _ in range(2))
        await put(cache, "a")
        assert len(known) == 1
        first.close()
        assert len(known) == 0
        await put(cache, "b")
        # Another job had it encoded.
        second.close()
        assert known.hashes(source()) == ["p"]
        second.close()
        assert (len(known), known._views) == (1, 2)


async def test_deaths_are_forgotten_when_their_time_is_over(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = CrashMemory(10.0)
    for number in range(20):
        memory.note(str(number))
        await trio.sleep(1)
    assert len(memory) <= 11
    memory.note("0")
    await trio.sleep(9.5)
    assert len(memory) == 1
    await trio.sleep(1)
    assert len(memory) == 0
    monkeypatch.setattr(crashes, "MOST", 5)
    for number in range(20):
        memory.note(str(number))
    assert len(memory) == 5
