"""``tools/bench load`` and ``compare``: a load on any OpenAI-compatible server, or on two in turn."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import trio

from . import chatload, load, photos
from .figures import significant
from .trace import Trace
from .work import KINDS, Shape, Work


def options(parser: argparse.ArgumentParser) -> None:
    """Add what describes a load."""
    parser.add_argument(
        "--work", choices=sorted(KINDS), default="fresh", help="what is asked; default: fresh"
    )
    parser.add_argument("--clients", type=int, default=4, help="clients, or addresses of a rate")
    parser.add_argument("--requests", type=int, default=0, help="requests in all")
    parser.add_argument("--seconds", type=float, default=0.0, help="how long")
    parser.add_argument(
        "--rate",
        type=float,
        default=0.0,
        help="arrivals a second (open loop); default: a closed one",
    )
    parser.add_argument("--tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--words", type=int, default=40, help="words of a text prompt")
    parser.add_argument("--turns", type=int, default=4, help="turns of a conversation")
    parser.add_argument("--size", type=_size, default=photos.SMALL, metavar="WxH", help="pictures")
    parser.add_argument(
        "--leave", type=float, default=0.0, help="share of clients that leave, 0..1"
    )
    parser.add_argument(
        "--leave-within", type=float, default=2.0, metavar="SECONDS", help="how soon they leave"
    )
    parser.add_argument(
        "--deadline", type=float, default=0.0, metavar="SECONDS", help="deadline of each request"
    )
    parser.add_argument("--seed", type=int, default=1, help="the same seed asks the same")
    parser.add_argument("--model", default="", help="name of the model")
    parser.add_argument("--key", default="", help="API key")
    parser.add_argument("--warm-up", type=int, default=1, metavar="N", help="requests before")
    parser.add_argument("--pid", type=int, help="process whose tree's memory is watched")
    parser.add_argument("--trace", type=Path, help="trace of a simulated NPU (tests/npusim)")


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    size = int(width), int(height)
    if min(size) < 16:
        raise argparse.ArgumentTypeError("must be at least 16x16")
    return size


def one(url: str, args: argparse.Namespace) -> dict[str, Any]:
    """Load one server; return what it was like."""
    where = chatload.target(url, key=args.key, model=args.model)
    plan = load.Plan(args.clients, args.requests, args.seconds, args.rate, args.seed)
    if not plan.requests and not plan.seconds:
        plan.requests = 4 * args.clients
    shape = Shape(
        size=args.size, tokens=args.tokens, words=args.words, turns=args.turns, leave=args.leave,
        leave_within=args.leave_within, deadline=args.deadline, seed=args.seed,
    )  # fmt: skip
    # Other pictures and prompts than those of the load, or caches would know these.
    before = Work("text", Shape(tokens=4), first=1_000_000)
    for _ in range(args.warm_up):
        trio.run(load.visit, where, before.script(0))
    found = Trace(args.trace) if args.trace is not None else None
    if found is not None:
        found.mark()
    work = Work(args.work, shape)

    async def run() -> load.Load:
        return await load.run(where, work, plan, pid=args.pid)

    done = trio.run(run)
    return {"url": url, "work": args.work} | load.summary(done, found.events() if found else None)


def compare(first: str, second: str, args: argparse.Namespace) -> dict[str, Any]:
    """Load two servers in turn with the same work; ratios are the second over the first."""
    args.pid = args.trace = None
    reports = [one(url, args) for url in (first, second)]
    ratios = {}
    for path in (
        ("answers_per_second",), ("tokens_per_second",), ("first_token_ms", "p50"),
        ("first_token_ms", "p95"), ("inter_token_ms", "p50"), ("inter_token_ms", "p95"),
        ("whole_ms", "p50"),
    ):  # fmt: skip
        here, there = (_at(report, path) for report in reports)
        if here and there:
            ratios[" ".join(path)] = significant(there / here)
    return {"first": reports[0], "second": reports[1], "second_over_first": ratios}


def _at(report: dict[str, Any], path: tuple[str, ...]) -> float | None:
    value: Any = report
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def table(*reports: dict[str, Any]) -> str:
    """Return reports side by side as Markdown."""
    rows = [("", *(report["url"] for report in reports)), ("---", *("---:" for _ in reports))]

    def add(name: str, *path: str) -> None:
        values = [_at(report, path) for report in reports]
        if any(value is not None for value in values):
            rows.append((name, *("-" if value is None else f"{value:g}" for value in values)))

    add("requests", "requests")
    for outcome in sorted({name for report in reports for name in report["outcomes"]}):
        add(f"ended: {outcome}", "outcomes", outcome)
    add("answers a second", "answers_per_second")
    add("tokens a second", "tokens_per_second")
    for key, name in (("first_token_ms", "first token"), ("inter_token_ms", "between tokens")):
        for share in ("p50", "p95", "p99"):
            add(f"{name}, {share}, ms", key, share)
    add("NPU busy, 0 to 1", "npu", "busy")
    add("memory of the process tree (PSS), peak, MB", "peak_pss_mb", "all")
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
