"""``rkvlmctl top``: who waits, in which phase, for how long; how busy the NPU is; tokens a second."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rkvlmd.board import gauges
from rkvlmd.board.root import Root
from rkvlmd.ctl import render
from rkvlmd.ctl.client import Client

#: Columns of a job for people.
_JOBS = (
    "id", "client", "model", "priority", "phase", "phase_age", "age", "pictures",
    "prompt_tokens", "completion_tokens",
)  # fmt: skip
#: Clears a terminal's screen and goes to its top left corner (ECMA-48: ED, CUP).
_CLEAR = "\x1b[2J\x1b[H"
#: Phases in which a job holds the lease.
_RUNNING = ("loading", "encoding", "prefill", "generating")


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at the daemon; ``at`` is the monotonic clock, seconds."""

    at: float
    status: dict[str, Any]
    jobs: list[dict[str, Any]]
    board: gauges.Gauges


def take(client: Client, root: Root) -> Sample:
    """Look once.

    Raises:
      CtlError: the daemon does not answer.

    """
    status = client.call("status")
    jobs = client.call("jobs").get("jobs", [])
    return Sample(time.monotonic(), status, jobs, gauges.read(root))


def summary(now: Sample, before: Sample | None) -> dict[str, Any]:
    """Return what is shown; rates need a sample ``before``, and are ``None`` without one.

    ``busy`` is the share of the time (0..1) for which a request held the
    engine, ``tokens_per_second`` counts generated tokens of all requests.
    """
    board = now.board
    ready = [m for m in now.status.get("models", []) if m.get("state") != "absent"]
    return {
        "version": now.status.get("version"),
        "state": now.status.get("state"),
        "uptime": now.status.get("uptime"),
        "busy": _rate(now, before, "lease", "busy_seconds"),
        "tokens_per_second": _rate(now, before, "tokens", "generated"),
        "running": sum(job.get("phase") in _RUNNING for job in now.jobs),
        "waiting": sum(job.get("phase") not in _RUNNING for job in now.jobs),
        "models": ready,
        "npu": {
            "load": {core: round(share, 3) for core, share in board.load},
            "hertz": board.hertz,
            "celsius": board.celsius,
        },
        "jobs": sorted(now.jobs, key=_order),
    }


def _rate(now: Sample, before: Sample | None, section: str, key: str) -> float | None:
    new = now.status.get(section, {}).get(key)
    old = None if before is None else before.status.get(section, {}).get(key)
    if before is None or new is None or old is None or now.at <= before.at:
        return None
    # A daemon that was started anew counts from 0.
    return float(round(max(new - old, 0) / (now.at - before.at), 4))


def _order(job: dict[str, Any]) -> tuple[bool, float]:
    """Those that hold the engine first, then the oldest."""
    return job.get("phase") not in _RUNNING, -float(job.get("age", 0))


def screen(shown: dict[str, Any], *, colour: bool) -> str:
    """Return what people see."""
    busy, rate = shown["busy"], shown["tokens_per_second"]
    head = [
        f"rkvlmd {shown['version']}, {shown['state']}, up {render.cell('uptime', shown['uptime'])}",
        f"engine busy {'-' if busy is None else f'{min(busy, 1):.0%}'}",
        f"{'-' if rate is None else f'{rate:.1f}'} tokens/s",
        f"{shown['running']} running, {shown['waiting']} waiting",
    ]
    lines = [render.plain("   ".join(head))]
    npu = _npu(shown["npu"])
    if npu:
        lines.append(npu)
    models = ", ".join(f"{m.get('name')} {m.get('state')}" for m in shown["models"])
    lines += [render.plain(f"models: {models or 'none is loaded'}"), ""]
    if shown["jobs"]:
        lines.append(render.table(shown["jobs"], _JOBS, colour=colour))
    else:
        lines.append("no requests are under way")
    return "\n".join(lines)


def _npu(npu: dict[str, Any]) -> str:
    said = []
    if npu["load"]:
        said.append(" ".join(f"{core}: {share:.0%}" for core, share in npu["load"].items()))
    if npu["hertz"] is not None:
        said.append(f"{npu['hertz'] // 1_000_000} MHz")
    if npu["celsius"] is not None:
        said.append(f"{npu['celsius']:.0f} °C")
    return f"NPU {', '.join(said)}" if said else ""


def run(
    client: Client, *, interval: float, once: bool, as_json: bool, root: Path, out: TextIO
) -> int:
    """Show it until interrupted; with ``once`` or ``as_json`` one time, over one interval.

    Raises:
      CtlError: the daemon does not answer.

    """
    tree = Root(root.absolute() if str(root) != "/" else root)
    live = out.isatty()
    before = take(client, tree)
    if live and not (once or as_json):
        _show(out, summary(before, None))
    while True:
        time.sleep(interval)
        now = take(client, tree)
        shown = summary(now, before)
        before = now
        if as_json:
            print(json.dumps(shown), file=out, flush=True)
            return 0
        if once:
            print(screen(shown, colour=render.wants_colour(out)), file=out, flush=True)
            return 0
        _show(out, shown)


def _show(out: TextIO, shown: dict[str, Any]) -> None:
    """Draw anew; where ``out`` is no terminal, one screen after the other."""
    text = screen(shown, colour=False)
    if out.isatty():
        width, height = render.window(out)
        # A line that wraps would push the top off the screen.
        lines = [line[:width] for line in text.splitlines()[: max(height - 1, 1)]]
        text = _CLEAR + "\n".join(lines)
    else:
        text += "\n"
    print(text, file=out, flush=True)
