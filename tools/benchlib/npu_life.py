"""Figures of the simulated NPU over a daemon's life: memory, restarts, hours, and a profile."""

from __future__ import annotations

import compileall
import contextlib
import io
import json
import os
import pstats
import signal
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import trio

from . import load, photos, process, simulated
from .figures import BenchError, Figure, significant
from .idle import SETTLE_SECONDS
from .npu_load import Options
from .simulated import Board, board
from .work import Shape, Work

_MB = 1e6
#: Targets, MB (10^6 bytes): all with prep children, all without, the daemon.
MOST_ALL, MOST_REST, MOST_DAEMON = 130.0, 100.0, 45.0
#: After how long idle prep children leave in these figures, seconds.
PREP_IDLE = 3.0
#: How late the answer after a death may be, on top of a load, milliseconds.
MOST_LATE = 300.0
#: Pause between two looks in the soak, seconds.
LOOK_SECONDS = 5.0
#: The first part of the soak that does not count, as one of so many: until then caches fill, and
#: the C library's and Python's heaps find their size.
SETTLING = 4
#: Parts into which what counts is cut, and Student's t of so many: two sides, 95 %, 8 degrees.
BLOCKS = 10
STUDENT = 2.31
#: One of so many works of each kind fails in the soak.
FAULTS = "segv@decode:every=400:times=1000;fail@prefill:every=150:times=1000;none@encode:every=90:times=1000"


def memory(options: Options) -> list[Figure]:
    """PSS of every process with one model loaded, with both prep children and without."""
    # As pip does when it installs: a process that compiles modules itself takes more.
    compileall.compile_dir(process.ROOT / "rkvlmd", quiet=2)
    idle = f"[prep]\nidle_seconds = {PREP_IDLE}\n"
    with board(scale=options.speed, settings=idle) as made:
        # Both prep children have decoded a picture, as in daily work.
        shape = Shape(tokens=8, size=photos.SMALL)
        done = trio.run(load.run, made.target, Work("two", shape), load.Plan(clients=2, requests=4))
        if not all(answer.good for answer in done.answers):
            raise BenchError("the model did not answer")
        # At rest: what the last answer needed goes a moment after it.
        time.sleep(SETTLE_SECONDS)
        with_prep = process.tree_memory(made.daemon.pid)
        _until(lambda: not any(n.startswith("prep") for n in made.pids()), 60 + PREP_IDLE)
        without = process.tree_memory(made.daemon.pid)
    if sum(name.startswith("prep") for name in with_prep) != 2:
        raise BenchError("there were not both prep children")
    detail = simulated.describe(made.times) | {
        "with_prep_mb": _megabytes(with_prep), "without_prep_mb": _megabytes(without)
    }  # fmt: skip
    rows = (
        ("PSS of all processes, one model loaded, both prep children up", with_prep, MOST_ALL),
        ("PSS of all processes, one model loaded, no prep children", without, MOST_REST),
        ("PSS of the daemon process, one model loaded", {"daemon": with_prep["daemon"]}, MOST_DAEMON),
    )  # fmt: skip
    return [
        Figure(name, sum(m.pss for m in found.values()) / _MB, "MB", most=most, detail=detail)
        for name, found, most in rows
    ]


def _megabytes(found: dict[str, process.Memory]) -> dict[str, float]:
    return {name: significant(held.pss / _MB) for name, held in sorted(found.items())}


def _until(true: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise BenchError("the processes did not come to rest")
        time.sleep(0.2)


def restart(options: Options) -> list[Figure]:
    """A decoder that dies: how much later than one load the next answer comes."""
    late, loads, warm = [], [], []
    with board(scale=options.speed) as made:
        # No prompt comes twice: a content at which children die is refused.
        work = Work("text", Shape(tokens=8))
        for number in range(options.some(7, 1) + 1):
            (usual,) = trio.run(load.visit, made.target, work.script(0))
            pid = made.pids()[f"decoder:{simulated.NAME}"]
            os.kill(pid, signal.SIGKILL)
            (answer,) = trio.run(load.visit, made.target, work.script(0))
            if not (usual.good and answer.good):
                raise BenchError(f"the answers ended {usual.outcome}, {answer.outcome}")
            if number == 0:  # the first time, files are read that nobody had read
                continue
            took, before = answer.ended - answer.sent, usual.ended - usual.sent
            warm.append(1000 * before)
            loads.append(1000 * took)
            # The encoder lives on: the load is the decoder's alone.
            late.append(1000 * (took - before) - made.times.decoder_load)
    detail = simulated.describe(made.times) | {
        "answer_ms": load.spread(warm), "answer_after_a_death_ms": load.spread(loads)
    }  # fmt: skip
    name = "answer after a child's death, above one load"
    return [Figure(name, statistics.median(late), "ms", most=MOST_LATE, detail=detail)]


# --- hours -----------------------------------------------------------------------------


def soak(options: Options) -> list[Figure]:
    """Mixed load with faults: descriptors, tasks and memory over time, and their slopes."""
    minutes = 0.1 if options.short else options.minutes
    with tempfile.TemporaryDirectory(prefix="rkvlmd-soak-") as folder:
        tasks = Path(folder) / "tasks"
        program = ("tools.benchlib.probed_daemon", json.dumps({"tasks": str(tasks)}))
        faults = {"NPUSIM_FAULT": FAULTS}
        with board(scale=options.speed, program=program, environ=faults) as made:
            looks, done = trio.run(_soak, made, tasks, minutes * 60)
    figures = []
    detail = simulated.describe(made.times) | {
        "minutes": minutes, "faults": FAULTS, "looks": len(looks), "load": load.summary(done)
    }  # fmt: skip
    detail["settling_minutes"] = minutes / SETTLING
    looks = looks[len(looks) // SETTLING :]
    for name, words, unit, divide in (
        ("descriptors", "descriptors", "", 1.0),
        ("tasks", "tasks", "", 1.0),
        ("anonymous", "anonymous memory of the daemon", "MB", _MB),
        ("pss", "PSS of the daemon", "MB", _MB),
        ("tree_pss", "PSS of all processes", "MB", _MB),
    ):
        points = [(at / 3600, look[name] / divide) for at, look in looks]
        slope, error = slope_of(points)
        values = [value for _, value in points]
        figures.append(
            Figure(
                f"soak of {minutes:g} minutes: {words}, an hour", slope, unit,
                most=significant(max(STUDENT * error, 1e-9)),
                detail=detail | {
                    "noise": significant(error), "first": significant(values[0]),
                    "last": significant(values[-1]), "most": significant(max(values)),
                    "parts": [significant(level, 4) for _, level in blocks_of(points)],
                },
            )
        )  # fmt: skip
        detail = {}
    return figures


async def _soak(
    made: Board, tasks: Path, seconds: float
) -> tuple[list[tuple[float, dict[str, float]]], load.Load]:
    looks: list[tuple[float, dict[str, float]]] = []
    began = time.monotonic()
    shape = Shape(tokens=24, turns=3, leave=0.1, leave_within=3.0, size=photos.SMALL)
    plan = load.Plan(clients=8, seconds=seconds)

    async def watch() -> None:
        while True:
            await trio.sleep(min(LOOK_SECONDS, seconds / 12))
            with contextlib.suppress(BenchError):
                look = await trio.to_thread.run_sync(_look, made, tasks)
                looks.append((time.monotonic() - began, look))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        done = await load.run(made.target, Work("mixed", shape), plan, collect=False)
        nursery.cancel_scope.cancel(reason="the time is over")
    return looks, done


def _look(made: Board, tasks: Path) -> dict[str, float]:
    held = process.tree_memory(made.daemon.pid)
    try:
        count = json.loads(tasks.read_text())["tasks"]
    except (OSError, ValueError) as exc:
        raise BenchError("the tasks are not counted yet") from exc
    return {
        "descriptors": process.descriptors(made.daemon.pid),
        "tasks": count,
        "anonymous": held["daemon"].anonymous,
        "pss": held["daemon"].pss,
        "tree_pss": sum(memory.pss for memory in held.values()),
    }


def slope_of(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the mean growth from block to block, and its standard error, both in y per x.

    Memory comes in steps and stays: two looks after each other say nearly the
    same, so they are no independent samples, and the standard error of a line
    through all of them, which takes them for such, is many times too small (of
    a random walk: by the root of a fifteenth of their number). Growths from one
    of ``BLOCKS`` equal parts to the next are nearly independent, for a walk as
    for steps. So one step in an hour, however high, is noise, for its growth
    was in one part alone; what grows in most parts is a slope. Noise around a
    constant level counts up to three times as much as it should, which the
    averaging within a block makes up for.

    Raises:
      BenchError: fewer than three points, or all of one moment.

    """
    if len(points) < 3:
        raise BenchError("there are too few points for a slope")
    blocks = blocks_of(points)
    wide = blocks[-1][0] - blocks[0][0]
    if wide == 0:
        raise BenchError("all points are of one moment")
    slope = (blocks[-1][1] - blocks[0][1]) / wide
    rest = [(b[1] - a[1]) - slope * (b[0] - a[0]) for a, b in pairwise(blocks)]
    spread = (sum(value**2 for value in rest) / (len(rest) - 1)) ** 0.5
    return slope, spread * len(rest) ** 0.5 / wide


def blocks_of(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the means of ``BLOCKS`` equal parts, or all points where there are fewer."""
    count = min(BLOCKS, len(points))
    cuts = [len(points) * number // count for number in range(count + 1)]
    return [
        (statistics.fmean(x for x, _ in part), statistics.fmean(y for _, y in part))
        for begin, end in pairwise(cuts)
        for part in [points[begin:end]]
    ]


# --- where the time goes ---------------------------------------------------------------


def profile(options: Options) -> list[Figure]:
    """A profile of the daemon under 16 clients with fresh pictures: the functions that cost most."""
    count = options.some(16, 2)
    with tempfile.TemporaryDirectory(prefix="rkvlmd-profile-") as folder:
        file = Path(folder) / "profile"
        program = ("tools.benchlib.probed_daemon", json.dumps({"profile": str(file)}))
        with board(scale=options.speed, program=program) as made:
            work = Work("fresh", Shape(tokens=32, size=options.size))
            plan = load.Plan(clients=count, requests=2 * count)
            before = _cpu(made.daemon.pid)
            done = trio.run(load.run, made.target, work, plan)
            used = _cpu(made.daemon.pid) - before
        rows = top_of(file)
    detail = simulated.describe(made.times) | {
        "top": rows, "cpu_seconds": significant(used), "load": load.summary(done)
    }  # fmt: skip
    share = 100 * used / (done.ended - done.began)
    return [
        Figure("processor time of the daemon, profiled, of one core", share, "%", detail=detail)
    ]


def top_of(file: Path, most: int = 12) -> list[dict[str, Any]]:
    """Return the functions in which a profiled program itself spent most time, without waiting."""
    stats = pstats.Stats(str(file), stream=io.StringIO())
    rows = []
    for (path, line, name), (_, calls, own, whole, _) in stats.stats.items():  # type: ignore[attr-defined]
        if "poll" in name and "select" in name:
            continue
        short = "/".join(Path(path).parts[-3:])
        rows.append(
            {
                "function": f"{short}:{line} {name}" if path != "~" else name,
                "own_s": round(own, 4),
                "whole_s": round(whole, 4),
                "calls": calls,
            }
        )
    rows.sort(key=lambda row: -row["own_s"])
    return rows[:most]


def _cpu(pid: int) -> float:
    """Seconds of the processor that a process has used (proc(5), ``stat``)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
