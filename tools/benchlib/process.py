"""A daemon in its own folder: started, watched through /proc, stopped."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rkvlmd import throwaway

from .figures import BenchError

#: The repository; the daemon is started from it.
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Daemon:
    """A running daemon; ``ready_seconds`` is from just before exec to its listening line."""

    pid: int
    host: str
    port: int
    control: Path
    ready_seconds: float


@dataclass(frozen=True, slots=True)
class Memory:
    """One process's memory in bytes.

    ``pss`` divides what processes share by their number, ``rss`` counts it in
    full, ``private`` not at all. ``anonymous`` is the part of ``pss`` that is in
    no file: the process's own data, which do not move when others that share
    its libraries come and go.
    """

    pss: int
    rss: int
    private: int
    anonymous: int


@contextmanager
def running(
    *,
    models: Path | None = None,
    settings: str = "",
    program: Sequence[str] = ("rkvlmd",),
    environ: Mapping[str, str] | None = None,
) -> Iterator[Daemon]:
    """Run a daemon inside the block, with its sockets and folders in a temporary one.

    Args:
      models: its folder of model folders; ``None``: an empty one.
      settings: its settings file, TOML; nothing of this machine's is read.
      program: the module to start and arguments before the options.
      environ: its environment; ``None``: ours.

    Raises:
      BenchError: it did not come up or did not leave as it should.

    """
    with tempfile.TemporaryDirectory(prefix="rkvlmd-bench-") as folder:
        command = [sys.executable, "-m", *program]
        try:
            with throwaway.running(
                command, Path(folder), models=models, settings=settings, environ=environ, cwd=ROOT
            ) as daemon:
                host, _, port = daemon.address.removeprefix("http://").rpartition(":")
                yield Daemon(daemon.pid, host, int(port), daemon.control, daemon.ready_seconds)
        except throwaway.ThrowawayError as exc:
            raise BenchError(str(exc)) from exc


def memory(pid: int) -> Memory:
    """Return what a process of this user holds (proc(5), ``smaps_rollup``).

    Raises:
      BenchError: it is gone, or the kernel has no such file.

    """
    found: dict[str, int] = {}
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError as exc:
        raise BenchError(f"/proc/PID/smaps_rollup: {exc.strerror}") from None
    for line in lines:
        key, _, value = line.partition(":")
        found[key] = int(value.split()[0]) * 1024
    return Memory(
        pss=found["Pss"],
        rss=found["Rss"],
        private=found["Private_Clean"] + found["Private_Dirty"],
        # Kernels before 5.3 do not divide it; what is shared of it is next to nothing.
        anonymous=found.get("Pss_Anon", found["Anonymous"]),
    )


def children(pid: int) -> dict[str, int]:
    """Return name and pid of each child process; the name is the one after ``--name``."""
    found: dict[str, int] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            pids = (task / "children").read_text().split()
        except OSError:  # the thread has ended
            continue
        for child in pids:
            try:
                words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
            except OSError:
                continue
            name = words[words.index("--name") + 1] if "--name" in words[:-1] else child
            found[name] = int(child)
    return found


def tree(pid: int) -> dict[str, int]:
    """Return name and pid of a process and of all below it; those that end meanwhile are left out."""
    found = {"daemon": pid}
    waiting = [pid]
    while waiting:
        try:
            below = children(waiting.pop())
        except OSError:
            continue
        for name, number in below.items():
            found[name if name not in found else f"{name} {number}"] = number
            waiting.append(number)
    return found


def tree_memory(pid: int) -> dict[str, Memory]:
    """Return what each process of a tree holds, by name."""
    found = {}
    for name, number in tree(pid).items():
        try:
            found[name] = memory(number)
        except BenchError:
            continue
    return found


def descriptors(pid: int) -> int:
    """Return how many files a process of this user has open.

    Raises:
      BenchError: it is gone.

    """
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError as exc:
        raise BenchError(f"/proc/PID/fd: {exc.strerror}") from None
