"""The owner's orders: load, unload, pin, unpin, drain, resume, reload."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any

from rkvlmd.ctl import render
from rkvlmd.ctl.client import Client
from rkvlmd.wire.control import Progress

#: What goes on when its caller stops watching.
WATCHED = frozenset({"load", "unload", "pin", "drain"})
NAMES = WATCHED | {"unpin", "resume", "reload"}

EPILOG = """\
  load, unload, pin, unpin
                     {"model": {"name", "state", "pinned", ...}}
  drain, resume      {"draining", "jobs": how many requests are left}
  reload             {"applied": [KEY], "needs_restart": [KEY], "rejected": [SAYS],
                     "models": {"added", "changed", "removed", "waiting", "problems"}}
"""


def add(command: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the commands."""
    for name, what in (
        ("load", "load a model and wait until it is ready"),
        ("unload", "unload a model and hold it until a load"),
        ("pin", "load a model and keep it: no swap, no idle unload, over restarts too"),
        ("unpin", "let a pinned model go like any other again"),
    ):
        command(name, what).add_argument("name", metavar="NAME")
    drain = command("drain", "refuse new requests and wait until those under way have ended")
    drain.add_argument("--no-wait", action="store_true", help="return at once")
    command("resume", "take new requests again after a drain")
    command("reload", "read the settings file and the models folder again")


def run(client: Client, args: argparse.Namespace) -> dict[str, Any]:
    """Give one order; show its progress on a terminal."""
    params = {"model": args.name} if hasattr(args, "name") else {}
    if args.command == "drain":
        params = {"wait": "no" if args.no_wait else "yes"}
    if args.command not in WATCHED or params.get("wait") == "no":
        return client.call(args.command, params)
    line = render.ProgressLine(sys.stderr)

    def step(now: Progress) -> None:
        left = f"about {render.seconds(now.seconds_left)} left" if now.seconds_left else ""
        line.show(now.model, now.state, now.progress, " ".join(filter(None, (left, now.detail))))

    try:
        return client.call(args.command, params, progress=step)
    finally:
        line.clear()


def status(command: str, result: Mapping[str, Any]) -> int:
    """Return the exit status of an order that was answered."""
    return 1 if command == "reload" and result.get("rejected") else 0


def interrupted(command: str) -> str:
    """Say what goes on when somebody stops watching."""
    what = {"drain": "the server stays drained until a resume"}
    return f"stopped watching; {what.get(command, f'the {command} goes on')}"


def for_people(command: str, result: Mapping[str, Any]) -> str:
    """Return the answer to an order in words."""
    if command in {"drain", "resume"}:
        left = result.get("jobs", 0)
        drained = "drained: new requests are refused until a resume"
        return f"{drained if result.get('draining') else 'serving'}; requests under way: {left}"
    if command == "reload":
        return _reloaded(result)
    model = result.get("model", {})
    said = " ".join(render.cell(key, model.get(key)) for key in ("name", "state"))
    memory = model.get("memory_bytes")
    pinned = ", pinned" if model.get("pinned") else ""
    return (f"{said}, {render.size(memory)}" if memory else said) + pinned


def _reloaded(result: Mapping[str, Any]) -> str:
    models = result.get("models", {})
    lines = [
        (title, names)
        for title, names in (
            ("applied", result.get("applied")),
            ("needs a restart", result.get("needs_restart")),
            ("rejected, so no setting was applied", result.get("rejected")),
            ("models added", models.get("added")),
            ("models changed", models.get("changed")),
            ("models removed", models.get("removed")),
            ("loaded as they were until they are unloaded", models.get("waiting")),
            ("wrong in the models folder", models.get("problems")),
        )
        if names
    ]
    if not lines:
        return "nothing has changed"
    return "\n".join(
        f"{title}: {', '.join(render.cell('', name) for name in names)}" for title, names in lines
    )


def model_row(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of ``rkvlmctl models``."""
    share = model.get("progress", 0)
    row = {**model, "progress": f"{share:.0%}" if model.get("state") == "loading" else ""}
    if model.get("default"):
        row["name"] = f"{model.get('name')} (default)"
    left, idle, kept = (model.get(k) for k in ("seconds_left", "idle_seconds", "encoders_kept"))
    notes = [
        "pinned" if model.get("pinned") else "",
        "held until load" if model.get("held") else "",
        f"about {render.seconds(left)} left" if left else "",
        "encoder kept" if kept else "",
        f"leaves in {render.seconds(idle)}" if idle else "",
        model.get("detail", ""),
    ]
    row["detail"] = "; ".join(filter(None, notes))
    return row
