"""A load on one server: closed loop (so many clients) or open loop (so many arrivals a second)."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import trio

from . import process, trace
from .chatload import Answer, Request, Target, ask
from .figures import percentile, significant
from .work import Script, Work

#: Pause between two looks at the memory of the process tree, seconds.
WATCH_SECONDS = 0.5


@dataclass(slots=True)
class Plan:
    """How much is sent: ``requests`` in all, or for ``seconds``; ``rate`` arrivals a second.

    ``rate`` 0 is a closed loop of ``clients``; in an open loop ``clients`` is
    the number of addresses that take turns.
    """

    clients: int = 4
    requests: int = 0
    seconds: float = 0.0
    rate: float = 0.0
    seed: int = 1


@dataclass(slots=True)
class Load:
    """What a load did; ``began`` and ``ended`` are the monotonic clock, seconds."""

    began: float
    ended: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    peak: dict[str, int] = field(default_factory=dict)


async def run(
    where: Target, work: Work, plan: Plan, *, pid: int | None = None, collect: bool = True
) -> Load:
    """Send the load; return when the last answer has ended.

    ``pid``: a process tree whose memory is watched; ``collect`` false keeps
    counts alone, for long loads.
    """
    load = Load(time.monotonic())
    gate = _Gate(plan)
    async with trio.open_nursery() as watching:
        if pid is not None:
            watching.start_soon(_watch, load, pid)
        async with trio.open_nursery() as nursery:
            if plan.rate > 0:
                await _open_loop(where, work, plan, gate, load, nursery, collect=collect)
            else:
                for client in range(plan.clients):
                    nursery.start_soon(_client, where, work, client, gate, load, collect)
        watching.cancel_scope.cancel(reason="the load has ended")
    load.ended = time.monotonic()
    return load


class _Gate:
    """Says whether one more request may be sent."""

    def __init__(self, plan: Plan) -> None:
        self._left = plan.requests or math.inf
        self._until = time.monotonic() + (plan.seconds or math.inf)

    def open(self) -> bool:
        return self._left > 0 and time.monotonic() < self._until

    def take(self) -> bool:
        if not self.open():
            return False
        self._left -= 1
        return True


async def _client(
    where: Target, work: Work, client: int, gate: _Gate, load: Load, collect: bool
) -> None:
    while gate.open():
        await visit(where, work.script(client), gate.take, load, collect=collect)


async def _open_loop(
    where: Target,
    work: Work,
    plan: Plan,
    gate: _Gate,
    load: Load,
    nursery: trio.Nursery,
    *,
    collect: bool,
) -> None:
    rng = random.Random(plan.seed)
    due, number = trio.current_time(), 0
    while gate.open():
        script = work.script(number % max(plan.clients, 1))

        async def arrive(script: Script = script) -> None:
            await visit(where, script, gate.take, load, collect=collect)

        nursery.start_soon(arrive)
        number += 1
        due += rng.expovariate(plan.rate)
        await trio.sleep_until(due)


async def visit(
    where: Target,
    script: Script,
    take: Any = lambda: True,
    load: Load | None = None,
    *,
    collect: bool = True,
) -> list[Answer]:
    """Do one client's script, each request after the answer before; return the answers."""
    found: list[Answer] = []
    try:
        request: Request = next(script)
        while take():
            answer = await ask(where, request)
            found.append(answer)
            if load is not None:
                load.answers.append(answer if collect else _light(answer))
            request = script.send(answer)
    except StopIteration:
        pass
    return found


def _light(answer: Answer) -> Answer:
    """An answer without its texts, for loads of many thousand."""
    return Answer(answer.kind, answer.sent, answer.status, answer.outcome, ended=answer.ended)


async def _watch(load: Load, pid: int) -> None:
    while True:
        for name, held in (await trio.to_thread.run_sync(process.tree_memory, pid)).items():
            load.peak[name] = max(load.peak.get(name, 0), held.pss)
        await trio.sleep(WATCH_SECONDS)


def summary(load: Load, npu: Iterable[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return what a load was like: times in milliseconds, shares 0..1, memory in MB (10^6)."""
    good = [a for a in load.answers if a.good]
    seconds = max(load.ended - load.began, 1e-9)
    gaps = [1000 * (b - a) for answer in good for a, b in pairwise(answer.texts)]
    report: dict[str, Any] = {
        "seconds": significant(seconds),
        "requests": len(load.answers),
        "outcomes": dict(sorted(Counter(a.outcome for a in load.answers).items())),
        "answers_per_second": significant(len(good) / seconds),
        "tokens_per_second": significant(sum(a.tokens for a in good) / seconds),
        "first_token_ms": spread([1000 * a.first for a in load.answers if a.first is not None]),
        "inter_token_ms": spread(gaps),
        "whole_ms": spread([1000 * (a.ended - a.sent) for a in good]),
    }
    kinds = sorted({a.kind for a in load.answers})
    if len(kinds) > 1:
        report["first_token_ms_by_kind"] = {
            kind: spread([1000 * a.first for a in load.answers if a.kind == kind and a.first])
            for kind in kinds
        }
    if load.peak:
        report["peak_pss_mb"] = {k: significant(v / 1e6) for k, v in sorted(load.peak.items())}
        report["peak_pss_mb"]["all"] = significant(sum(load.peak.values()) / 1e6)
    if npu is not None:
        report["npu"] = trace.use(npu)
    return report


def spread(values: list[float]) -> dict[str, float] | None:
    """Return the percentiles that people ask for; ``None`` of nothing."""
    if not values:
        return None
    return {
        "p50": significant(percentile(values, 0.5)),
        "p95": significant(percentile(values, 0.95)),
        "p99": significant(percentile(values, 0.99)),
        "mean": significant(statistics.fmean(values)),
        "max": significant(max(values)),
    }
