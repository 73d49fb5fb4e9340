"""The figures of the simulated NPU, by the names that ``tools/bench`` gives them."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from . import npu_demo, npu_life, npu_load, npu_open
from .figures import Figure
from .npu_load import Options

MEASURES: dict[str, tuple[Callable[[Options], list[Figure]], str]] = {
    "overhead": (npu_load.overhead, "first token above the NPU's own time, one client"),
    "busy": (npu_load.busy, "NPU busy against a bare loop, 16 clients and one"),
    "same-picture": (npu_load.same_picture, "encodes of one picture from 8 clients at once"),
    "conversation": (npu_load.conversation, "six turns on one picture"),
    "interleaved": (npu_load.interleaved, "16 conversations of 4 turns in turn"),
    "interactive": (npu_load.interactive, "4 interactive clients among 64"),
    "waiting": (npu_open.waiting, "1,000 streaming clients that wait"),
    "loop": (npu_open.loop, "the daemon's loop with 16 pictures of 12 megapixels"),
    "leavers": (npu_open.leavers, "200 clients that leave at random moments"),
    "memory": (npu_life.memory, "memory of all processes with one model loaded"),
    "restart": (npu_life.restart, "the answer after a child's death"),
    "profile": (npu_life.profile, "a profile of the daemon under 16 clients"),
    "demo": (npu_demo.demo, "the demo model through the Rockchip engine and the CPU engine"),
    "soak": (npu_life.soak, "mixed load with faults for --minutes"),
}
#: What ``all`` leaves out: it takes an hour, or an evaluation of the demo model.
LONG = frozenset({"soak", "demo"})


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of these figures."""
    parser.add_argument(
        "--scale", type=float, default=10.0, metavar="N",
        help="RK3588 times are divided by this; 1: full speed of the board; default: 10",
    )  # fmt: skip
    parser.add_argument("--short", action="store_true", help="a few requests: shows that it works")
    parser.add_argument("--minutes", type=float, default=60.0, help="of the soak; default: 60")
    parser.add_argument("--scenes", type=int, default=1000, help="of each skill of the demo model")


def chosen(name: str) -> list[str]:
    """Return the figures of a name; ``all`` means those that take minutes."""
    return [known for known in MEASURES if known not in LONG] if name == "all" else [name]


def measure(name: str, args: argparse.Namespace) -> list[Figure]:
    """Take one figure."""
    run = MEASURES[name][0]
    return run(Options(args.scale, args.short, args.minutes, args.scenes))
