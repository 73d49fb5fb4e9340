"""What the figures were measured on: the machine, its other load, and the versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

import rkvlmd

_PACKAGES = ("trio", "hypercorn", "numpy", "onnxruntime", "pillow", "tokenizers")
_ARCHITECTURES = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "ARM64", "arm64": "ARM64"}
#: How long the load of other programs is watched, seconds.
WATCH_SECONDS = 1.0


def describe(name: str = "") -> dict[str, Any]:
    """Return the machine; ``name`` replaces the name that is made from its parts."""
    cores = len(os.sched_getaffinity(0))
    architecture = _ARCHITECTURES.get(platform.machine().lower(), platform.machine())
    model, virtual = _processor(), _virtual()
    made = f"{cores}-core {architecture} {'VM' if virtual else 'machine'}"
    return {
        "name": name or (f"{made} ({model})" if model else made),
        "cores": cores,
        "architecture": architecture,
        "processor": model,
        "virtual": virtual,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "busy_before": round(busy_share(WATCH_SECONDS), 2),
    }


def versions() -> dict[str, str]:
    """Return the versions that make a difference; packages that are not installed are left out."""
    found = {"rkvlmd": rkvlmd.__version__, "Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def busy_share(seconds: float) -> float:
    """Watch for ``seconds``; return how much of all cores was in use, 0..1."""
    before = _ticks()
    time.sleep(seconds)
    idle, total = (after - old for after, old in zip(_ticks(), before, strict=True))
    return 1 - idle / total if total > 0 else 0.0


def _ticks() -> tuple[int, int]:
    """Idle and all ticks of all cores (proc(5): idle and iowait are the fourth and fifth)."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def _processor() -> str:
    """The board's name, else the processor's; empty where neither is told."""
    board = _read("/proc/device-tree/model").strip("\0\n ")
    if board:
        return board
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return " ".join(value.split())
    return ""


def _virtual() -> bool:
    flags = (line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("flags"))
    return (
        "hypervisor" in next(flags, "").split()
        or Path("/sys/hypervisor/type").exists()
        or Path("/proc/device-tree/hypervisor").exists()
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
