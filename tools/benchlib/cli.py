"""The command line of ``tools/bench``: which figures, and how they are printed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import trio

from rkvlmd.ctl.client import CtlError

from . import first_token, idle, jpeg, loading, machine, npu, simulated, token_latency
from .figures import BenchError, Figure, table

Measure = Callable[[argparse.Namespace], list[Figure]]


def _idle(args: argparse.Namespace) -> list[Figure]:
    return idle.run(runs=args.runs or idle.RUNS, models=args.models, model=args.model)


def _first_token(args: argparse.Namespace) -> list[Figure]:
    repeats = args.repeats or first_token.REPEATS
    return first_token.run(repeats=repeats, models=args.models, model=args.model)


def _token_latency(args: argparse.Namespace) -> list[Figure]:
    return token_latency.run(
        tokens=args.tokens or token_latency.TOKENS,
        waiting=args.waiting or token_latency.WAITING,
        runs=args.runs or token_latency.RUNS,
    )


def _decode_speed(_: argparse.Namespace) -> list[Figure]:
    from . import decode_speed

    found = decode_speed.run()
    name = "decoding, best of the CPU engine against transformers"
    return [Figure(name, found["best_ratio"], "x", least=decode_speed.GOAL, detail=found)]


def _jpeg(args: argparse.Namespace) -> list[Figure]:
    return jpeg.run(repeats=args.repeats or jpeg.REPEATS)


def _families(args: argparse.Namespace) -> list[Figure]:
    from . import families

    names = [args.model] if args.model else []
    return families.run(repeats=args.repeats or families.REPEATS, names=names)


MEASURES: dict[str, tuple[Measure, str]] = {
    "idle": (_idle, "the daemon at rest: memory, time to listen, time to load a model"),
    "first-token": (_first_token, "from a request with a picture to the first token"),
    "token-latency": (_token_latency, "from a token leaving the child to the client's socket"),
    "jpeg": (_jpeg, "a 12-megapixel JPEG to encoder input"),
    "families": (_families, "per family: a JPEG to encoder input, beside transformers"),
    # Last: torch in the same process makes what comes after it slower.
    "decode-speed": (_decode_speed, "tokens per second of the CPU engine beside others"),
}


def _families_table(figures: list[Figure]) -> str:
    from . import families

    return families.table(figures)


#: Figures whose Markdown is a table of their own, behind the others.
APART: dict[str, Callable[[list[Figure]], str]] = {"families": _families_table}
#: Largest number that an option takes.
_MOST = 100_000


def main(argv: list[str] | None = None) -> int:
    """Measure and print; return the exit status: 0, or 1 where something could not be measured."""
    args = _parser().parse_args(argv)
    if args.command in {"load", "compare"}:
        return _load(args)
    if args.command == "npu":
        work = {f"npu {name}": partial(npu.measure, name, args) for name in npu.chosen(args.figure)}
    else:
        if args.models is not None:
            args.models = args.models.resolve()
        names = list(MEASURES) if args.command == "all" else [args.command]
        work = {name: partial(MEASURES[name][0], args) for name in names}
    report = _report(args)
    apart: list[str] = []
    for name, measure in work.items():
        print(f"bench: {name} ...", file=sys.stderr, flush=True)
        try:
            figures = measure()
        except (BenchError, CtlError, ImportError) as exc:
            report["missing"][name] = str(exc)
        except BaseExceptionGroup as group:
            report["missing"][name] = _why(group)
        else:
            if args.markdown and name in APART:
                apart.append(APART[name](figures))
            else:
                report["figures"] += [figure.as_json() for figure in figures]
    print("\n".join((table(report), *apart)) if args.markdown else json.dumps(report, indent=2))
    return 1 if report["missing"] else 0


def _report(args: argparse.Namespace) -> dict[str, Any]:
    """Return what is said of every measurement, without figures yet."""
    report: dict[str, Any] = {
        "machine": machine.describe(args.machine),
        "versions": machine.versions(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "note": args.note,
        "figures": [],
        "missing": {},
    }
    if args.command == "npu":
        times = simulated.Times.of(simulated.QUICK if args.short else args.scale)
        said = f"Simulated NPU: {times.words}; no figure of a board."
        report["npu"] = simulated.describe(times)
        report["note"] = f"{said} {args.note}".strip()
    return report


def _why(group: BaseExceptionGroup[BaseException]) -> str:
    """Return the reason out of a nursery's group; anything but a reason goes on up."""
    _, rest = group.split((BenchError, CtlError, trio.TooSlowError))
    if rest is not None:
        raise group
    leaf: BaseException = group
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    return str(leaf) or "it took too long"


def _load(args: argparse.Namespace) -> int:
    """Load one server or two; nothing has a target there."""
    if args.command == "compare":
        found = loading.compare(args.first, args.second, args)
        reports = [found["first"], found["second"]]
    else:
        found = loading.one(args.url, args)
        reports = [found]
    if args.markdown:
        print(loading.table(*reports))
    else:
        print(json.dumps({"machine": machine.describe(args.machine), **found}, indent=2))
    return 0 if all(report["answers_per_second"] for report in reports) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench",
        description="Measure rkvlmd on this machine. Every figure has its target beside it.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="FIGURE")
    for name, (_, words) in MEASURES.items():
        _options(commands.add_parser(name, help=words, description=words))
    _options(commands.add_parser("all", help="all of them, one after the other"))
    words = "figures of a daemon on the simulated NPU of tests/npusim"
    board = commands.add_parser("npu", help=words, description=words)
    board.add_argument("figure", metavar="FIGURE", help="or all", choices=[*npu.MEASURES, "all"])
    board.epilog = "; ".join(f"{name}: {what}" for name, (_, what) in npu.MEASURES.items())
    npu.options(board)
    words = "load an OpenAI-compatible server"
    load = commands.add_parser("load", help=words, description=words)
    load.add_argument("url", metavar="URL")
    words = "load two servers in turn with the same work"
    compare = commands.add_parser("compare", help=words, description=words)
    compare.add_argument("first", metavar="URL_A")
    compare.add_argument("second", metavar="URL_B")
    loading.options(load)
    loading.options(compare)
    for printed in (board, load, compare):
        _printing(printed)
    return parser


def _printing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true", help="print a table instead of JSON")
    parser.add_argument("--machine", default="", help="name of the machine; default: made up")
    parser.add_argument("--note", default="", help="a sentence to print with the figures")


def _options(parser: argparse.ArgumentParser) -> None:
    _printing(parser)
    parser.add_argument(
        "--models", type=Path, help="folder of model folders; default: the demo model alone"
    )
    parser.add_argument(
        "--model", default="", help="name of the model, or of a family; default: the first"
    )
    for option, words in (
        ("--runs", "how often idle and token-latency measure"),
        ("--repeats", "requests of first-token, decodings of jpeg"),
        ("--tokens", "tokens of each run of token-latency"),
        ("--waiting", "clients that wait in token-latency"),
    ):
        parser.add_argument(option, type=_count, metavar="N", help=words)


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= _MOST:
        raise argparse.ArgumentTypeError(f"must be 1 to {_MOST}")
    return value
