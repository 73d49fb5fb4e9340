"""A daemon that watches its own loop: ``python -m tools.benchlib.probed_daemon REPORT ...``.

REPORT is a JSON object: ``late`` names a file to which every standstill of the
loop is appended, ``late_ms`` says from where, ``tasks`` a file for the number
of tasks, ``profile`` a file for a profile. The other arguments are ``rkvlmd``'s.
"""

from __future__ import annotations

import cProfile
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import trio

from rkvlmd import __main__ as entry
from rkvlmd import daemon

#: How often the probe wants to run, seconds.
PROBE_SECONDS = 0.001
#: Pause between two counts of the tasks, seconds.
TASKS_SECONDS = 1.0


async def _probe(path: Path, least: float) -> None:
    """A task that wants to run every millisecond; how late it is says how long the loop stood."""
    with path.open("a") as file:
        due, used = time.monotonic() + PROBE_SECONDS, time.thread_time()
        while True:
            await trio.sleep(max(due - time.monotonic(), 0))
            now, cpu = time.monotonic(), time.thread_time()
            if now - due >= least:
                # The processor's time tells a busy loop from a machine that did not let it run.
                late, spent = 1000 * (now - due), 1000 * (cpu - used)
                file.write(json.dumps({"at": now, "late_ms": late, "cpu_ms": spent}) + "\n")
                file.flush()
            due, used = now + PROBE_SECONDS, cpu


async def _tasks(path: Path) -> None:
    while True:
        count = trio.lowlevel.current_statistics().tasks_living
        await trio.Path(path).write_text(json.dumps({"at": time.monotonic(), "tasks": count}))
        await trio.sleep(TASKS_SECONDS)


async def _run(plan: dict[str, Any], settings: Any) -> None:
    def announce(address: str) -> None:
        print(f"probed rkvlmd listening on {address}", flush=True)

    async with trio.open_nursery() as nursery:
        if "late" in plan:
            nursery.start_soon(_probe, Path(plan["late"]), plan.get("late_ms", 2.0) / 1000)
        if "tasks" in plan:
            nursery.start_soon(_tasks, Path(plan["tasks"]))
        await daemon.main(settings, announce=announce)
        nursery.cancel_scope.cancel(reason="the daemon has ended")


def main(argv: list[str]) -> int:
    """Run the daemon until a signal ends it."""
    plan = json.loads(argv[0])
    settings = entry.settings_of(entry.parser().parse_args(argv[1:]))
    entry.set_up_log("warning")
    profile = cProfile.Profile()
    if "profile" in plan:
        profile.enable()
    trio.run(partial(_run, plan, settings))
    if "profile" in plan:
        profile.disable()
        profile.dump_stats(plan["profile"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
