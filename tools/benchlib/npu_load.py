"""Figures of the simulated NPU under load: how busy it is, and what a client waits for."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import trio

from rkvlmd.ctl.client import Client
from tests.npusim import compiler

from . import load, photos, process, simulated, trace
from .chatload import Answer, ask
from .figures import BenchError, Figure, percentile, significant, spread
from .simulated import Board, board
from .work import Shape, Work

#: Longest wait for the bare loop, seconds.
BARE_SECONDS = 600.0
#: Longest wait for a crowd to be admitted, seconds.
ADMISSION_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Options:
    """How the figures of the simulated NPU are taken; ``short``: a few requests, at no speed."""

    scale: float = 10.0
    short: bool = False
    minutes: float = 60.0
    scenes: int = 1000

    @property
    def speed(self) -> float:
        """By how much the RK3588's times are divided."""
        return simulated.QUICK if self.short else self.scale

    @property
    def size(self) -> tuple[int, int]:
        """The pixels of a large picture."""
        return photos.SMALL if self.short else photos.LARGE

    def some(self, count: int, few: int) -> int:
        """Return how many of something."""
        return few if self.short else count


# --- one client ------------------------------------------------------------------------


def overhead(options: Options) -> list[Figure]:
    """Time to the first token above the NPU's own time, one client, one 640x480 JPEG."""
    with board(scale=options.speed) as made:
        above, waits = [], []
        work = Work("fresh", Shape(tokens=8))
        for number in range(options.some(40, 3)):
            made.trace.mark()
            (answer,) = trio.run(load.visit, made.target, work.script(0))
            if number < options.some(3, 1):
                continue
            first = _first(answer)
            waits.append(first)
            above.append(first - _spent(made, answer))
    detail = simulated.describe(made.times) | {
        "first_token_ms": spread(waits),
        "above_ms": spread(above),
    }
    name = "first token above the NPU's time, 1 client"
    return [Figure(name, statistics.median(above), "ms", most=15.0, detail=detail)]


def _first(answer: Answer) -> float:
    """Milliseconds to the first token."""
    if answer.first is None:
        raise BenchError(f"an answer has no text: {answer.outcome}")
    return 1000 * answer.first


def _spent(made: Board, answer: Answer) -> float:
    """Milliseconds from the request to its first token that the NPU took for encode and prefill.

    And those that the simulator took for its own checks: no library does that.
    """
    events = made.trace.events()
    # The first token comes with the prefill; a second one may come before it is read.
    jobs = [job for job in trace.work(events) if job["what"] in ("encode", "prefill")]
    parts = [(job["begin"], job["end"], job["end"] - job["begin"]) for job in jobs]
    parts += [(e["end"] - e["ns"], e["end"], e["ns"]) for e in events if e["ev"] == "checks"]
    return sum(
        took / 1e6
        for begin, end, took in parts
        if answer.sent <= begin / 1e9 and end / 1e9 <= answer.texts[0]
    )


def conversation(options: Options) -> list[Figure]:
    """Six turns on one picture: what is prefilled, and the first token above that."""
    with board(scale=options.speed) as made:
        # A first conversation, so that every process has done everything once.
        shape = Shape(tokens=32, turns=options.some(6, 3), size=photos.SMALL)
        work = Work("conversation", shape)
        trio.run(load.visit, made.target, work.script(0))
        made.trace.mark()
        answers = trio.run(load.visit, made.target, work.script(0))
        prefills = made.trace.events("prefill")
        encodes = len(made.trace.events("encode"))
        above = [_first(a) - _spent(made, a) for a in answers]
    if len(prefills) != len(answers):
        raise BenchError(f"{len(answers)} answers had {len(prefills)} prefills")
    rows = []
    for before, now, prefill, late in zip(
        answers, answers[1:], prefills[1:], above[1:], strict=False
    ):
        known = before.usage["prompt_tokens"] + before.usage["completion_tokens"]
        new = now.usage["prompt_tokens"] - known
        rows.append({"new": new, "prefilled": prefill["computed"], "above_ms": significant(late)})
    most = max(row["prefilled"] - row["new"] for row in rows)
    detail = simulated.describe(made.times) | {"turns": rows, "encodes": encodes}
    return [
        Figure(
            "conversation: tokens prefilled beyond the new turn's", most, "tokens", 0.0,
            detail=detail,
        ),
        Figure(
            "conversation: first token above the NPU's time, worst turn",
            max(above[1:]), "ms", most=10.0, detail={"above_ms": spread(above[1:])},
        ),
    ]  # fmt: skip


# --- how busy --------------------------------------------------------------------------


def busy(options: Options) -> list[Figure]:
    """NPU busy against a bare loop: 16 clients with fresh 12 MP pictures, two each, and one client."""
    many, few = options.some(16, 2), options.some(12, 2)
    shape = Shape(tokens=32, size=options.size)
    with board(scale=options.speed) as made:
        _draw(shape, 2 * many + few)
        crowd, work = load.Plan(clients=many, requests=2 * many), Work("fresh", shape)
        made.trace.mark()
        first = trio.run(load.run, made.target, work, crowd)
        jobs = made.trace.events()
        encoders = len(made.trace.events("encoder_init"))
        made.trace.mark()
        one = trio.run(load.run, made.target, work, load.Plan(clients=1, requests=few))
        single = made.trace.events()
        bare = _bare(made, jobs)
        bare_one = _bare(made, single)
    _all_good(first, one)
    target = 90.0 if made.times.scale > 1 else 95.0
    said = simulated.describe(made.times)
    return [
        _ratio(f"NPU busy against a bare loop, {many} clients", jobs, bare, 99.0, said | {
            "load": load.summary(first), "encoder_loads_in_the_run": encoders,
        }),
        _ratio("NPU busy against a bare loop, 1 client", single, bare_one, target, said | {
            "load": load.summary(one), "server_medians_ms": _stages(one),
            "idle_ms_per_answer": _gaps(single), "idle_ms_per_answer_bare": _gaps(bare_one),
        }),
    ]  # fmt: skip


def _draw(shape: Shape, count: int) -> None:
    """Draw the pictures before the clock."""
    for number in range(1, count + 1):
        photos.photo(number, *shape.size)


def _all_good(*loads: load.Load) -> None:
    bad = [answer.outcome for done in loads for answer in done.answers if not answer.good]
    if bad:
        raise BenchError(f"{len(bad)} answers were not whole: {sorted(set(bad))}")


def _ratio(
    name: str, jobs: list[dict[str, Any]], bare: list[dict[str, Any]], least: float, detail: Any
) -> Figure:
    ours, theirs = trace.use(jobs), trace.use(bare)
    if not theirs["busy"]:
        raise BenchError("the bare loop did nothing")
    value = 100 * ours["busy"] / theirs["busy"]
    return Figure(name, value, "%", least=least, detail=detail | {"ours": ours, "bare": theirs})


def _bare(made: Board, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Do the same runs without a server; return the NPU's work."""
    prompts = [event["prompt"] for event in events if event["ev"] == "run"]
    where = made.folder / "bare"
    where.mkdir(exist_ok=True)
    environ = made.environ | {
        "NPUSIM_TRACE": str(where / "trace.jsonl"), "NPUSIM_NPU": str(where / "npu")
    }  # fmt: skip
    found = trace.Trace(where / "trace.jsonl")
    command = [
        sys.executable,
        "-m",
        "tools.benchlib.bare",
        str(compiler.library(simulated.VERSION)),
        str(made.model),
        "32",
    ]
    with subprocess.Popen(
        command, cwd=process.ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    ) as loop:  # fmt: skip
        try:
            assert loop.stdin is not None
            assert loop.stdout is not None
            print(json.dumps(prompts), file=loop.stdin, flush=True)
            while (line := loop.stdout.readline().strip()) != "ready":
                if not line and loop.poll() is not None:
                    raise BenchError("the bare loop did not start")
            found.mark()
            print("go", file=loop.stdin, flush=True)
            loop.communicate(timeout=BARE_SECONDS)
        finally:
            if loop.poll() is None:
                loop.kill()
    if loop.returncode != 0:
        raise BenchError(f"the bare loop ended with {loop.returncode}")
    return found.events()


def _stages(done: load.Load) -> dict[str, float]:
    names = list(done.answers[0].timings)
    return {
        name: significant(1000 * statistics.median(a.timings.get(name, 0) for a in done.answers))
        for name in names
    }


def _gaps(events: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds in which the NPU stood still, for each answer, by the work before and after."""
    jobs = trace.work(events)
    answers = max(sum(event["ev"] == "end" for event in events), 1)
    found: dict[str, float] = defaultdict(float)
    for before, after in pairwise(jobs):
        between = f"{before['what']} to {after['what']}"
        found[between] += max(after["begin"] - before["end"], 0) / 1e6
    return {name: significant(total / answers) for name, total in sorted(found.items())}


# --- several clients -------------------------------------------------------------------


def same_picture(options: Options) -> list[Figure]:
    """Eight clients with one picture at once: how often it is encoded."""
    with board(scale=options.speed) as made:
        made.trace.mark()
        work, plan = Work("same", Shape()), load.Plan(clients=8, requests=8)
        done = trio.run(load.run, made.target, work, plan)
        encodes = len(made.trace.events("encode"))
    _all_good(done)
    return [
        Figure(
            "encodes of one picture from 8 clients", encodes, "", most=1.0,
            detail=simulated.describe(made.times),
        )
    ]  # fmt: skip


def interactive(options: Options) -> list[Figure]:
    """64 clients, 4 of them interactive: their first token beside what they see alone."""
    others, each = options.some(60, 3), options.some(6, 2)
    shape = Shape(tokens=32, size=options.size)
    with board(scale=options.speed) as made:
        _draw(shape, others + 10 * each)
        alone = trio.run(_hurried, made, Work("fresh", shape), 0, each)
        beside = trio.run(_hurried, made, Work("fresh", shape, 4 * each + 1), others, each)
    firsts = [percentile([_first(a) for a in run], 0.95) for run in (alone, beside)]
    times = made.times
    # A job: its picture, 196 tokens of it and some twenty of text, 32 tokens of answer.
    job = times.encode + times.prefill * 220 + times.decode * 32
    most = 1.3 * firsts[0] + job
    detail = simulated.describe(times) | {
        "alone_ms": load.spread([_first(a) for a in alone]),
        "with_the_others_ms": load.spread([_first(a) for a in beside]),
        "one_job_ms": significant(job),
    }
    name = f"interactive first token, 95th percentile, 4 of {others + 4} clients"
    return [Figure(name, firsts[1], "ms", most=significant(most), detail=detail)]


async def _hurried(made: Board, work: Work, others: int, each: int) -> list[Answer]:
    """Four interactive clients, each asking ``each`` times, beside ``others`` that never stop."""
    found: list[Answer] = []

    async def hurry(client: int) -> None:
        for _ in range(each):
            request = next(work.script(client))
            request.priority = "interactive"
            found.append(await ask(made.target, request))

    async def keep_on(client: int) -> None:
        while True:
            await load.visit(made.target, work.script(client))

    async with trio.open_nursery() as crowd:
        for client in range(others):
            crowd.start_soon(keep_on, client + 10)
        if others:
            await _until_waiting(made, others - 1)
        async with trio.open_nursery() as four:
            for client in range(4):
                four.start_soon(hurry, client)
        crowd.cancel_scope.cancel(reason="the four are done")
    bad = [a.outcome for a in found if not a.good]
    if bad:
        raise BenchError(f"{len(bad)} interactive answers were not whole: {sorted(set(bad))}")
    return found


async def _until_waiting(made: Board, count: int) -> None:
    with trio.fail_after(ADMISSION_SECONDS):
        while len(await trio.to_thread.run_sync(_jobs, made)) < count:  # noqa: ASYNC110 - seen from outside
            await trio.sleep(0.05)


def _jobs(made: Board) -> list[Any]:
    with Client(made.daemon.control) as client:
        return list(client.call("jobs")["jobs"])


def interleaved(options: Options) -> list[Figure]:
    """16 conversations of 4 turns: answers a second against the same, one after the other."""
    # Room for the prompts of all, and for the rows of their pictures: 6.4 MB each.
    settings = "[npu]\nconversations_bytes = 268435456\n[cache]\nembeddings_bytes = 134217728\n"
    clients, turns = options.some(16, 3), options.some(4, 2)
    shape = Shape(tokens=32, turns=turns, size=photos.SMALL)
    rates, prefilled, loads = [], [], []
    for side_by_side in (False, True):
        # One after the other the library's own cache is enough, and nothing else costs time.
        with board(scale=options.speed, settings=settings if side_by_side else "") as made:
            work = Work("conversation", shape)
            _draw(shape, clients)
            made.trace.mark()
            done = trio.run(_talks, made, work, clients, side_by_side)
            _all_good(done)
            rates.append(len(done.answers) / (done.ended - done.began))
            prefilled.append(sum(e["computed"] for e in made.trace.events("prefill")))
            loads.append(load.summary(done))
    detail = simulated.describe(simulated.Times.of(options.speed)) | {
        "answers_per_second": {
            "one after the other": significant(rates[0]), "interleaved": significant(rates[1])
        },
        "prefilled_tokens": {"one after the other": prefilled[0], "interleaved": prefilled[1]},
        "interleaved": loads[1],
        "settings": settings,
    }  # fmt: skip
    name = f"{clients} conversations of {turns} turns, interleaved, against no prefix twice"
    return [Figure(name, 100 * rates[1] / rates[0], "%", least=90.0, detail=detail)]


async def _talks(made: Board, work: Work, clients: int, side_by_side: bool) -> load.Load:
    """Hold one conversation a client."""
    done = load.Load(time.monotonic())

    async def talk(client: int) -> None:
        await load.visit(made.target, work.script(client), load=done)

    async with trio.open_nursery() as nursery:
        for client in range(clients):
            if side_by_side:
                nursery.start_soon(talk, client)
            else:
                await talk(client)
    done.ended = time.monotonic()
    return done
