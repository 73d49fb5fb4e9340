"""The daemon process at rest: its memory, how soon it listens, how soon a model is loaded."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rkvlmd import throwaway
from rkvlmd.ctl.client import Client

from . import process
from .figures import BenchError, Figure, spread

#: Targets: MB (10^6 bytes), seconds.
MOST_MB, MOST_READY, MOST_LOAD, MOST_CTL = 45.0, 1.0, 1.5, 0.1
RUNS = 7
#: How long the daemon is left alone before its memory is read, seconds.
SETTLE_SECONDS = 1.0
_MB = 1e6


def run(*, runs: int = RUNS, models: Path | None = None, model: str = "") -> list[Figure]:
    """Start daemons one after the other and load a model in each; medians.

    Args:
      runs: how many are measured; one more is started first, unmeasured, so
        that programs and libraries are in the page cache.
      models: folder of model folders; ``None``: the demo model alone.
      model: which to load; empty: the default one. Without any model the
        figure of the load is left out.

    """
    with process.running(models=models):
        pass
    ready: list[float] = []
    idle: list[process.Memory] = []
    loads: list[float] = []
    ctl: list[tuple[float, float]] = []
    bare: list[float] = []
    name, loaded = "", {}
    for _ in range(runs):
        with process.running(models=models) as daemon:
            ready.append(daemon.ready_seconds)
            time.sleep(SETTLE_SECONDS)
            idle.append(process.memory(daemon.pid))
            ctl.append(_ctl(daemon.control))
            bare.append(_command(["-c", "pass"])[0])
            with Client(daemon.control) as client:
                name = choose(client, model)
                if not name:
                    continue
                began = time.monotonic()
                client.call("load", {"model": name}, progress=lambda _: None)
                loads.append(time.monotonic() - began)
            loaded = _all_memory(daemon.pid)
    middle = sorted(idle, key=lambda m: m.pss)[len(idle) // 2]
    figures = [
        Figure(
            "daemon idle, no model: PSS",
            middle.pss / _MB,
            "MB",
            most=MOST_MB,
            detail={**asdict(middle), "pss_mb": spread([m.pss / _MB for m in idle])},
        ),
        Figure(
            "exec to listening",
            statistics.median(ready),
            "s",
            most=MOST_READY,
            detail=spread(ready),
        ),
        Figure(
            "rkvlmctl status: its own time",
            statistics.median(cpu for cpu, _ in ctl),
            "s",
            most=MOST_CTL,
            detail={
                "cpu": spread([cpu for cpu, _ in ctl]),
                "wall": spread([wall for _, wall in ctl]),
                "cpu_of_a_bare_interpreter": spread(bare),
            },
        ),
    ]
    if loads:
        detail = {"model": name, **spread(loads), "memory_after": loaded}
        figures.append(
            Figure("load of a model", statistics.median(loads), "s", most=MOST_LOAD, detail=detail)
        )
    return figures


def choose(client: Client, model: str) -> str:
    """Return the model to use: ``model``, else the default one; empty where there is none.

    Raises:
      BenchError: there is no model of that name.

    """
    views = client.call("models")["models"]
    if model:
        if all(view["name"] != model for view in views):
            raise BenchError(f"there is no model {model!r}")
        return model
    views.sort(key=lambda view: not view.get("default"))
    return str(views[0]["name"]) if views else ""


def _all_memory(pid: int) -> dict[str, Any]:
    """The memory of the daemon and of each child, in bytes."""
    pids = {"daemon": pid, **process.children(pid)}
    return {name: asdict(process.memory(number)) for name, number in pids.items()}


def _ctl(control: Path) -> tuple[float, float]:
    """CPU seconds and whole seconds of one ``rkvlmctl status``, the interpreter's start included."""
    return _command(["-m", "rkvlmd.ctl", "--control", str(control), "--json", "status"])


def _command(arguments: list[str]) -> tuple[float, float]:
    before, began = _children_cpu(), time.monotonic()
    subprocess.run(
        [sys.executable, *arguments],
        cwd=process.ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=throwaway.START_SECONDS,
    )
    return _children_cpu() - before, time.monotonic() - began


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
