"""Figures of the simulated NPU with many connections: those that wait, and those that leave."""

from __future__ import annotations

import json
import random
import resource
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import trio

from . import load, photos, process, simulated, trace
from .chatload import Answer, Request, ask
from .figures import BenchError, Figure, percentile, significant
from .npu_load import Options
from .simulated import Board, board
from .work import Shape, Work, turn

#: Bytes of a waiting client's body, about.
BODY = 1000
#: Longest wait for all to be admitted, seconds.
ADMISSION_SECONDS = 300.0
#: How much longer than one token the NPU may work on for one who left, milliseconds.
GRACE_MS = 50.0
#: Loopback addresses that the clients of a crowd have, so that no client has all of it.
ADDRESSES = 50
#: Longest answer of those who leave, tokens.
TOKENS = 60


def waiting(options: Options) -> list[Figure]:
    """A thousand streaming clients wait while one is served: memory of each, and the stream."""
    count = options.some(1000, 20)
    _more_descriptors(count)
    # The stream lasts longer than the others need to come.
    words = {"NPUSIM_REPLY_WORDS": str(options.some(16000, 1500))}
    scale = 20.0 if options.short else options.scale
    with board(scale=scale, environ=words) as made:
        seen = trio.run(_wait, made, count, options.some(12, 1))
    before, after, stream = seen.before, seen.after, seen.times
    gaps = [1000 * (b - a) for a, b in pairwise(stream)]
    if not gaps:
        raise BenchError("the stream ended before the others had come")
    detail = simulated.describe(made.times) | {
        "clients": count,
        "pss_before_mb": significant(before.pss / 1e6),
        "pss_with_all_waiting_mb": significant(after.pss / 1e6),
        "inter_token_ms": load.spread(gaps),
        "tokens_while_they_wait": len(gaps),
        "seconds_until_all_waited": significant(seen.seconds),
    }
    late = percentile(gaps, 0.99) - made.times.decode
    return [
        Figure(
            f"daemon memory of a waiting client, of {count}", (after.pss - before.pss) / count / 1e3,
            "kB", most=60.0, detail=detail,
        ),
        Figure(
            f"inter-token time above the NPU's with {count} waiting, 99th percentile", late, "ms",
            most=5.0, detail=detail,
        ),
    ]  # fmt: skip


def _more_descriptors(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 512
    if soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise BenchError(f"{needed} descriptors are needed, and {hard} allowed")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@dataclass(frozen=True, slots=True)
class _Seen:
    """The daemon's memory before and with all waiting, and the stream's times while they wait."""

    before: process.Memory
    after: process.Memory
    times: list[float]
    seconds: float


async def _wait(made: Board, count: int, seconds: float) -> _Seen:
    long = Work("text", Shape(tokens=simulated.CONTEXT - 400, words=20))
    text = "x" * (BODY - 200)
    async with trio.open_nursery() as crowd:
        answer = _Live()
        crowd.start_soon(answer.follow, made, next(long.script(0)))
        with trio.fail_after(ADMISSION_SECONDS):
            await answer.began.wait()
            before = await trio.to_thread.run_sync(process.memory, made.daemon.pid)
            came = time.monotonic()
            for client in range(count):
                said = [turn(f"{client} {text}", size=(1, 1))]
                body = {"messages": said, "max_tokens": 8}
                crowd.start_soon(ask, made.target, Request(body, source=10 + client % ADDRESSES))
            await _until_admitted(made, count, answer)
        since = time.monotonic()
        await trio.sleep(seconds)
        after = await trio.to_thread.run_sync(process.memory, made.daemon.pid)
        until = time.monotonic()
        crowd.cancel_scope.cancel(reason="measured")
    times = [at for at in answer.times if since <= at <= until]
    return _Seen(before, after, times, since - came)


class _Live:
    """A stream whose times are seen while it runs."""

    def __init__(self) -> None:
        self.began = trio.Event()
        self.times: list[float] = []
        self.ended = False

    async def follow(self, made: Board, request: Request) -> None:
        answer = Answer("stream", time.monotonic(), texts=_Times(self))
        await ask(made.target, request, answer=answer)
        self.ended = True


class _Times(list[float]):
    """Times of texts; tells the stream of each."""

    def __init__(self, live: _Live) -> None:
        super().__init__()
        self._live = live

    def append(self, at: float) -> None:
        super().append(at)
        self._live.times.append(at)
        self._live.began.set()


async def _until_admitted(made: Board, count: int, stream: _Live) -> None:
    """Wait until the lease's queue has them all."""
    while True:
        if stream.ended:
            raise BenchError("the stream ended before all others waited")
        status = await trio.to_thread.run_sync(made.status)
        if status["lease"]["waiting"] >= count:
            return
        await trio.sleep(0.2)


# --- the loop --------------------------------------------------------------------------


def loop(options: Options) -> list[Figure]:
    """16 requests with 12-megapixel pictures at once: how long the daemon's loop stands still."""
    count = options.some(16, 2)
    with _probed() as (program, late):
        with board(scale=options.speed, program=program) as made:
            shape = Shape(tokens=32, size=options.size)
            work = Work("fresh", shape)
            bodies = [next(work.script(client)) for client in range(count)]
            encoded = [request.encode(made.target) for request in bodies]
            began = time.monotonic()
            answers = trio.run(_at_once, made, bodies, encoded)
            ended = time.monotonic()
        bad = [a.outcome for a in answers if not a.good]
        if bad:
            raise BenchError(f"{len(bad)} answers were not whole: {sorted(set(bad))}")
        stands = [json.loads(line) for line in late.read_text().splitlines()]
    seen = [stand for stand in stands if began <= stand["at"] <= ended + 0.1]
    worst = max(seen, key=lambda stand: stand["late_ms"], default={"late_ms": 0.0, "cpu_ms": 0.0})
    detail = simulated.describe(made.times) | {
        "requests": count,
        "bytes_of_bodies": sum(map(len, encoded)),
        "worst": worst,
        "worst_ms_of_the_processor": max((s["cpu_ms"] for s in seen), default=0.0),
        "standstills_above_2_ms": len(seen),
    }
    name = f"longest standstill of the loop, {count} pictures of 12 megapixels"
    return [Figure(name, worst["late_ms"], "ms", most=20.0, detail=detail)]


class _probed:
    """Where a probed daemon writes, and its program; a context manager."""

    def __init__(self, **plan: Any) -> None:
        self._plan = plan

    def __enter__(self) -> tuple[tuple[str, ...], Path]:
        self._folder = tempfile.TemporaryDirectory(prefix="rkvlmd-probe-")
        late = Path(self._folder.name) / "late"
        late.touch()
        plan = {"late": str(late)} | self._plan
        return ("tools.benchlib.probed_daemon", json.dumps(plan)), late

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


async def _at_once(made: Board, requests: list[Request], bodies: list[bytes]) -> list[Answer]:
    found: list[Answer] = []

    async def one(request: Request, body: bytes) -> None:
        found.append(await ask(made.target, request, body))

    async with trio.open_nursery() as nursery:
        for request, body in zip(requests, bodies, strict=True):
            nursery.start_soon(one, request, body)
    return found


# --- those who leave -------------------------------------------------------------------


def leavers(options: Options) -> list[Figure]:
    """200 clients leave at random moments: how long the NPU works on for one of them."""
    count = options.some(200, 10)
    scale = 20.0 if options.short else options.scale
    with board(scale=scale) as made:
        trio.run(load.visit, made.target, Work("text").script(0))
        made.trace.mark()
        answers = trio.run(_leave, made, count)
        # One who stays shows that the house is in order.
        (last,) = trio.run(load.visit, made.target, Work("text").script(0))
        events = made.trace.events()
    if not last.good:
        raise BenchError(f"the one who stayed was answered {last.outcome}")
    overtime = _overtime(events, answers)
    left = {c: a for c, a in answers.items() if a.gone is not None}
    inside = [ms for ms in overtime.values() if ms > 0]
    if not inside and not options.short:
        raise BenchError("nobody left while the NPU worked for it")
    detail = simulated.describe(made.times) | {
        "clients": count,
        "left": len(left),
        "left_while_the_npu_worked_for_them": len(inside),
        "work_after_leaving_ms": load.spread(inside),
    }
    worst = max(inside, default=0.0)
    most = made.times.decode + GRACE_MS
    name = f"work of the NPU for one of {count} clients after it left, worst"
    return [Figure(name, worst, "ms", most=significant(most), detail=detail)]


async def _leave(made: Board, count: int) -> dict[int, Answer]:
    """Have them come and leave so that each phase is left by some: a short queue all the time.

    Every fourth one brings a picture of its own.
    """
    rng = random.Random(5)
    times = made.times
    job = (times.decode * TOKENS + times.prefill * 100 + times.encode / 4) / 1000
    found: dict[int, Answer] = {}

    async def one(client: int, comes: float, after: float) -> None:
        await trio.sleep(comes)
        own = [client] if client % 4 == 0 else []
        said = turn(f"client {client:04d} says something short", *own, size=photos.SMALL)
        body = {"messages": [said], "max_tokens": TOKENS}
        request = Request(body, "leaver", client % ADDRESSES, leave=after)
        found[client] = await ask(made.target, request)

    async with trio.open_nursery() as nursery:
        for client in range(count):
            nursery.start_soon(
                one, client, rng.uniform(0, 0.7 * count * job), rng.uniform(0, 2 * job)
            )
    return found


def _overtime(events: list[dict[str, Any]], answers: dict[int, Answer]) -> dict[int, float]:
    """Milliseconds for which the NPU worked for a client after that had left, by client.

    An encode or a prefill in flight cannot be interrupted: what it takes does
    not count. A prefill that began later does.
    """
    runs: list[tuple[int, int]] = []
    for event in events:
        if event["ev"] == "run" and "client " in event["prompt"]:
            number = int(event["prompt"].partition("client ")[2][:4])
            runs.append((event["t"], number))
    jobs = trace.work(events)
    found: dict[int, float] = {}
    for (began, client), after in zip(runs, [*runs, (1 << 63, -1)][1:], strict=True):
        gone = answers[client].gone
        if gone is None:
            continue
        # An encode in between is for whoever comes next.
        mine = [j for j in jobs if began <= j["begin"] < after[0] and j["what"] != "encode"]
        left = gone * 1e9
        # The parts of a prefill follow each other, and no abort comes between them.
        prefill = [j for j in mine if j["what"] == "prefill"]
        flying = [j["end"] for j in prefill if prefill[0]["begin"] <= left]
        since = max(left, *flying, 0)
        late = [j["end"] - since for j in mine if j["end"] > since]
        found[client] = max(late, default=0.0) / 1e6
    return found
