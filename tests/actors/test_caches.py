"""What is kept between requests, and how much of everything may be in the house at one time."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.abc
import trio.testing

from rkvlmd.actors import memory
from rkvlmd.actors.blobs import Blob, from_bytes
from rkvlmd.actors.embeddings import EmbeddingCache, Rows
from rkvlmd.actors.house import House
from rkvlmd.actors.job import Job
from rkvlmd.actors.loading import conversations_bytes
from rkvlmd.actors.prep import Prep
from rkvlmd.actors.slots import Gate, Slot
from rkvlmd.actors.warm import Warm
from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import PictureSource
from rkvlmd.settings import QueueSettings, Settings
from rkvlmd.wire.child import GenerateDone, Tensor
from tests.fakes.children import FakeChild, FakeLoader
from tests.fakes.parts import house_of
from tests.fakes.quick_house import quick_house
from tests.fakes.scripted import chat, collect, make_model, settings_for, submit, until_phase
from tests.fakes.stage import Stage

# --- embeddings ------------------------------------------------------------------------------


async def rows(size: int = 100) -> Rows:
    return Rows(await from_bytes(b"x" * size), Tensor(shape=(size,), dtype="uint8"))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("leaves", [False, True])
async def test_eight_clients_with_the_same_picture_cause_one_encode(
    tmp_path: Path, overlap: bool, leaves: bool
) -> None:
    stage = Stage(same=True, encode_gate=trio.Event())
    async with quick_house(tmp_path, "a", child=stage.child, npu={"overlap": overlap}) as house:
        with trio.fail_after(60):
            jobs = [submit(house, chat(pictures=1, model="a"), f"10.0.0.{n}") for n in range(8)]
            await stage.encoding.wait()
            await trio.testing.wait_all_tasks_blocked(0.005)
            if leaves:
                first = next(job for job in jobs if job.phase == "encoding")
                first.abandon("client_gone")
                jobs.remove(first)
            assert stage.encode_gate is not None
            stage.encode_gate.set()
            for job in jobs:
                assert (await collect(job))[1].reason == "stop"
        assert stage.encodes == 1
        assert house.tools.cache.hits == len(jobs) - (not leaves)
    assert Blob.live == 0


async def test_callers_of_one_key_wait_for_one_make() -> None:
    made: list[str] = []
    gate = trio.Event()

    async def make() -> Rows:
        made.append("begun")
        await gate.wait()
        return await rows()

    got: list[bool] = []

    async def call(cache: EmbeddingCache) -> None:
        found, there = await cache.get_or_make("k", make)
        found.blob.close()
        got.append(there)

    with trio.fail_after(60), EmbeddingCache(1000) as cache:
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(call, cache)
            await trio.testing.wait_all_tasks_blocked()
            assert "k" in cache
            assert made == ["begun"]
            gate.set()
        assert sorted(got) == [False, *[True] * 7]
        assert (cache.hits, cache.misses) == (7, 1)
    assert Blob.live == 0


async def test_when_a_make_fails_the_next_one_tries() -> None:
    calls = 0

    async def make() -> Rows:
        nonlocal calls
        calls += 1
        await trio.lowlevel.checkpoint()
        if calls == 1:
            raise RkvlmdError("engine_error", "no")
        return await rows()

    async def call(cache: EmbeddingCache, ends: list[str]) -> None:
        try:
            found, _ = await cache.get_or_make("k", make)
            found.blob.close()
            ends.append("well")
        except RkvlmdError:
            ends.append("failed")

    ends: list[str] = []
    with EmbeddingCache(1000) as cache:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(call, cache, ends)
    assert sorted(ends) == ["failed", "well", "well"]
    assert calls == 2
    assert Blob.live == 0


async def test_rows_that_a_job_waits_for_leave_last() -> None:
    with EmbeddingCache(250) as cache, cache.wanted(["a"]), cache.wanted(["a", "z"]):
        for key in "abcd":
            made = await rows()
            cache.put(key, made)
            made.blob.close()
        assert "a" in cache
        assert "c" not in cache
        assert "d" in cache
        # The budget holds all the same.
        with cache.wanted("de"):
            for key in "ef":
                made = await rows()
                cache.put(key, made)
                made.blob.close()
                assert cache.bytes <= 250
    assert Blob.live == 0


# --- what the decoder's cache holds ----------------------------------------------------------

LONG = "Say all that there is to say about it. " * 9


def done(number: int, held: list[str], forgot: tuple[int, ...] = ()) -> GenerateDone:
    return GenerateDone(
        id=1, reason="stop", completion=1, seconds=0.0, conversation=number, held=held,
        forgot=list(forgot),
    )  # fmt: skip


def test_warm_is_what_the_decoder_has_said() -> None:
    warm, decoder = Warm(), FakeChild("decoder:a", "decoder")
    warm.learn(decoder, done(0, ["a", "b"]))
    warm.learn(decoder, done(1, ["a", "c"]))
    assert all(name in warm for name in "abc")
    warm.learn(decoder, done(1, ["a", "d"]))
    assert "c" not in warm
    warm.learn(decoder, done(2, ["e"], forgot=(0,)))
    assert "b" not in warm
    assert warm.conversations == 2
    warm.learn(decoder, done(2, []))  # aborted, and unknown
    assert "e" not in warm
    other = FakeChild("decoder:a", "decoder")
    warm.learn(other, done(0, ["z"]))  # another process, with nothing of all that
    assert "d" not in warm
    assert "z" in warm
    other.kill("test")
    assert "z" not in warm
    warm.learn(decoder, None)
    assert warm.conversations == 0


async def waiting(house: House, text: str, client: str) -> Job:
    job = submit(house, chat(text, model="a"), client)
    await until_phase(house, job, "waiting")
    return job


async def ended_in_order(jobs: dict[str, Job]) -> list[str]:
    names: list[str] = []

    async def watch(name: str, job: Job) -> None:
        assert (await collect(job))[1].reason == "stop"
        names.append(name)

    async with trio.open_nursery() as nursery:
        for name, job in jobs.items():
            nursery.start_soon(watch, name, job)
    return names


@pytest.mark.parametrize(("jumps", "wanted"), [(4, "follow-up x y"), (0, "x y follow-up")])
async def test_a_follow_up_comes_before_its_cache_is_overwritten(
    tmp_path: Path, jumps: int, wanted: str
) -> None:
    stage = Stage()
    queue = {"max_jumps": jumps}
    async with quick_house(tmp_path, "a", child=stage.child, queue=queue) as house:
        with trio.fail_after(60):
            assert (await collect(submit(house, chat(LONG, model="a"))))[1].reason == "stop"
            await house.scheduler.wait_empty()
            async with house.tools.lease.hold("test", "a"):
                jobs = {
                    "x": await waiting(house, "x" * 300, "10.0.0.2"),
                    "y": await waiting(house, "y" * 300, "10.0.0.3"),
                    "follow-up": await waiting(house, LONG + "And?", "10.0.0.1"),
                }
            assert " ".join(await ended_in_order(jobs)) == wanted


async def test_what_a_failed_run_leaves_is_not_known(tmp_path: Path) -> None:
    stage = Stage(answer_gate=trio.Event(), fail="decoder")
    async with quick_house(tmp_path, "a", child=stage.child) as house:
        with trio.fail_after(60):
            stage.answer_gate = None
            await collect(submit(house, chat(LONG, model="a")))
            assert house.tools.warm.conversations == 0
            await collect(submit(house, chat(LONG, model="a")))
            assert house.tools.warm.conversations == 1


async def test_what_an_aborted_run_leaves_is_known(tmp_path: Path) -> None:
    stage = Stage(answer_gate=trio.Event())
    async with quick_house(tmp_path, "a", child=stage.child) as house:
        with trio.fail_after(60):
            job = submit(house, chat(LONG, model="a"))
            await stage.answering.wait()
            job.abandon("client_gone")
            await house.scheduler.wait_empty()
            assert house.tools.warm.conversations == 1


# --- ceilings --------------------------------------------------------------------------------


def test_pixels_have_a_ceiling_of_their_own() -> None:
    gate = Gate(QueueSettings(max_pixels=1000))
    first, second = gate.enter("a", 1), gate.enter("b", 1)
    first.add_pixels(600)
    second.add_pixels(400)
    for _ in range(50):
        gate.served(10.0)
    with pytest.raises(RkvlmdError, match="too many pictures") as info:
        second.add_pixels(1)
    assert (info.value.code, info.value.retry_after) == ("server_is_overloaded", 10)
    first.close()
    with pytest.raises(RkvlmdError, match=r"may have 1000 pixels.*these have 1001") as info:
        second.add_pixels(601)
    assert info.value.code == "too_many_images"
    second.add_pixels(600)
    assert gate.pixels == 1000
    second.close()
    assert gate.pixels == 0
    assert gate.refusals == {"pixels": 1}


async def test_pictures_beyond_the_ceiling_are_refused_and_nothing_stays(tmp_path: Path) -> None:
    # Pictures of eight values, so of three pixels, each.
    async with quick_house(tmp_path, "a", queue={"max_pixels": 7}) as house:
        with trio.fail_after(60):
            async with house.tools.lease.hold("test", "a"):
                two = submit(house, chat(pictures=2, model="a"))
                await until_phase(house, two, "waiting")
                _, end = await collect(submit(house, chat(pictures=1, model="a"), "10.0.0.2"))
                assert end.error is not None
                assert end.error.code == "server_is_overloaded"
                assert 1 <= (end.error.retry_after or 0) <= 120
            assert (await collect(two))[1].reason == "stop"
            assert (await collect(submit(house, chat(pictures=2, model="a"))))[1].reason == "stop"
            await house.scheduler.wait_empty()
        assert house.scheduler.gate.pixels == 0
    assert Blob.live == 0


async def test_a_download_counts_until_it_is_decoded(tmp_path: Path) -> None:
    """However many pictures wait for the prep children, their files are paid for."""
    seen: list[int] = []

    class Looking(FakeChild):
        def sha256(self) -> str:
            seen.append(house.scheduler.gate.bytes)
            return super().sha256()

    class Fetcher:
        async def fetch(self, url: str, field: str, **_: object) -> bytes:
            await trio.lowlevel.checkpoint()
            return b"x" * 600

    sources = tuple(PictureSource("url", "http://x/y.png", f"[{n}]") for n in range(3))
    request = replace(chat(pictures=3, model="a"), pictures=sources)
    made: Any = Looking
    async with quick_house(tmp_path, "a", child=made, queue={"max_bytes": 2800}) as house:
        house.tools.fetcher = Fetcher()  # type: ignore[assignment]
        with trio.fail_after(60):
            assert (await collect(submit(house, request)))[1].reason == "stop"
            await house.scheduler.wait_empty()
            assert max(seen) == 1000 + 3 * 600
            assert house.scheduler.gate.bytes == 0
            async with house.tools.lease.hold("test", "a"):
                waits = submit(house, chat(model="a"))
                await until_phase(house, waits, "waiting")
                _, end = await collect(submit(house, request, "10.0.0.2"))
                assert end.error is not None
                assert end.error.code == "server_is_overloaded"
            assert (await collect(waits))[1].reason == "stop"
    assert Blob.live == 0


async def test_a_request_with_too_many_embeddings_is_refused_with_both_numbers(
    tmp_path: Path,
) -> None:
    # Four rows of eight floats a picture.
    queue = {"max_embedding_bytes": 300}
    async with quick_house(tmp_path, "a", queue=queue) as house:
        with trio.fail_after(60):
            assert (await collect(submit(house, chat(pictures=2, model="a"))))[1].reason == "stop"
            _, end = await collect(submit(house, chat(pictures=3, model="a")))
            assert end.error is not None
            assert (end.error.code, end.error.status) == ("too_many_images", 400)
            assert "384 bytes" in end.error.message
            assert "300" in end.error.message


def test_the_ceilings_together_leave_room_on_a_board_of_4_gb() -> None:
    """The defaults, at their worst all at the same time."""
    settings = Settings()
    mb = 1 << 20
    parts = {
        # The text of the bodies, a copy of their pictures on its way to the prep children, and
        # one body that is being parsed.
        "bodies": 2 * settings.queue.max_bytes + settings.http.max_body_bytes,
        # Three floats a pixel; most encoders take bytes, a quarter of that.
        "pixels": 12 * settings.queue.max_pixels,
        "embeddings": settings.cache.embeddings_bytes + settings.queue.max_embedding_bytes,
        "downloads": settings.media.max_fetches * settings.media.max_image_bytes,
        # Address space, of which some 130 MB of libraries are never touched.
        "prep": settings.prep.children * (settings.prep.memory_bytes - 130 * mb),
        "connections": settings.http.max_connections * settings.http.max_header_bytes,
        "daemon": 64 * mb,
    }
    # What is left is the system's and the model's; what a load takes is checked against what is free.
    assert sum(parts.values()) <= 2200 * mb, {k: v // mb for k, v in parts.items()}


def test_no_mix_of_requests_exceeds_a_ceiling() -> None:
    rng = random.Random(5)
    settings = QueueSettings(
        max_jobs=6, max_jobs_per_client=4, max_bytes=1 << 20, max_pixels=90_000
    )
    gate, slots = Gate(settings), list[Slot]()
    refused, waits = 0, set[tuple[int, int | None]]()
    for _ in range(20_000):
        try:
            kind = rng.randrange(4)
            if kind == 0:
                slots.append(gate.enter(rng.choice("abc"), rng.randrange(1 << 19)))
            elif slots and kind == 1:
                rng.choice(slots).resize(rng.randrange(1 << 19))
            elif slots and kind == 2:
                rng.choice(slots).add_pixels(rng.randrange(30_000))
            elif slots:
                slots.pop(rng.randrange(len(slots))).close()
        except RkvlmdError as exc:
            refused += 1
            waits.add((exc.status, exc.retry_after))
        assert gate.jobs == len(slots) <= 6
        assert gate.bytes == sum(slot.size for slot in slots) <= 1 << 20
        assert gate.pixels == sum(slot.pixels for slot in slots) <= 90_000
    assert refused > 100
    assert all(1 <= (after or 0) <= 120 for status, after in waits if status in (429, 503))
    assert {status for status, _ in waits} == {400, 429, 503}
    assert set(gate.refusals) == {"jobs", "bytes", "pixels", "client"}
    for slot in slots:
        slot.close()
    assert gate.jobs == gate.bytes == gate.pixels == 0


class _Peak(trio.abc.Instrument):
    """The most bytes of memfds, seen after every step of every task."""

    def __init__(self) -> None:
        self.bytes = 0

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.bytes = max(self.bytes, Blob.live_bytes)


async def test_driven_to_the_ceilings_the_house_holds_no_more(tmp_path: Path) -> None:
    """Sixty clients with pictures at the same time, who stay or leave."""
    rng = random.Random(9)
    stage, peak = Stage(), _Peak()
    queue: dict[str, Any] = {"max_jobs": 40, "max_jobs_per_client": 0, "max_pixels": 90}
    cache = {"embeddings_bytes": 2_000}
    trio.lowlevel.add_instrument(peak)
    async with quick_house(tmp_path, "a", child=stage.child, queue=queue, cache=cache) as house:
        codes = set[str]()

        async def client(number: int) -> None:
            for _ in range(4):
                try:
                    job = submit(house, chat(pictures=number % 4, model="a"), f"10.0.0.{number}")
                except RkvlmdError as exc:
                    codes.add(exc.code)
                    for _ in range(20):  # the others go on meanwhile
                        await trio.lowlevel.checkpoint()
                    continue
                if number % 5 == 0:
                    for _ in range(rng.randrange(60)):
                        await trio.lowlevel.checkpoint()
                    job.abandon("client_gone")
                _, end = await collect(job)
                assert end.reason in ("stop", "client_gone", "error"), end
                if end.error is not None:
                    codes.add(end.error.code)
                assert house.tools.cache.bytes <= 2_000

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for number in range(60):
                    nursery.start_soon(client, number)
            await house.scheduler.wait_empty()
        assert codes == {"server_is_overloaded"}
        assert house.scheduler.gate.refusals.keys() >= {"jobs", "pixels"}
        assert house.scheduler.gate.jobs == house.scheduler.gate.pixels == 0
    trio.lowlevel.remove_instrument(peak)
    assert Blob.live == 0
    # The pictures (104 bytes of text each) on their way to a prep child, 8 bytes of pixels each,
    # rows that are kept, rows of the one job that has the lease.
    assert 0 < peak.bytes <= 40 * 3 * 112 + 3 * 90 + 2_000 + 4 * 128


@pytest.mark.parametrize(("kept", "fits"), [(50 << 20, True), (150 << 20, False)])
async def test_a_load_counts_what_conversations_may_take(
    tmp_path: Path, kept: int, fits: bool
) -> None:
    make_model(tmp_path / "models", "a")
    settings = settings_for(tmp_path, cache={"conversations_bytes": kept})
    made: Any = FakeChild
    loader = FakeLoader(settings, tmp_path, make_child=made)
    prep = Prep(settings, lambda name: made(name, "prep"))
    room = memory.OVERHEAD_BYTES + settings.memory.reserve_bytes + (100 << 20)
    async with house_of(settings, loader, prep, room=lambda: room) as house:
        with trio.fail_after(60):
            if fits:
                await house.residency.load("a")
            else:
                with pytest.raises(RkvlmdError) as info:
                    await house.residency.load("a")
                assert info.value.code == "insufficient_memory"


def test_each_engine_has_a_budget_of_its_own() -> None:
    settings = Settings()
    assert conversations_bytes(settings, "onnx") == settings.cache.conversations_bytes > 0
    # On the NPU it rests on what only a board can tell.
    assert conversations_bytes(settings, "rkllm") == settings.npu.conversations_bytes == 0
