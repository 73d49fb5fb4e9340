"""A daemon in its own folder: started, watched through /proc, stopped."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .figures import BenchError

#: The repository; the daemon is started from it.
ROOT = Path(__file__).resolve().parents[2]
#: Longest wait for the daemon to listen, and to leave after SIGTERM, seconds.
START_SECONDS = 60.0
STOP_SECONDS = 45.0
#: Most bytes of a log that an error shows.
_LOG_BYTES = 2000


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
    full, ``private`` not at all.
    """

    pss: int
    rss: int
    private: int


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
        scratch = Path(folder)
        control, log = scratch / "control.sock", scratch / "log"
        (scratch / "rkvlmd.toml").write_text(settings)
        command = [sys.executable, "-m", *program]
        command += ["--config", str(scratch / "rkvlmd.toml"), "--http", "127.0.0.1:0"]
        command += ["--control", str(control), "--state", str(scratch / "state")]
        command += ["--models", str(models or scratch / "models")]
        with log.open("wb") as errors:
            began = time.monotonic()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=None if environ is None else dict(environ),
            )
        assert process.stdout is not None
        try:
            with process.stdout:
                address = _address(process.stdout, log)
                ready = time.monotonic() - began
                host, _, port = address.removeprefix("http://").rpartition(":")
                yield Daemon(process.pid, host, int(port), control, ready)
            _stop(process)
            if process.returncode != 0:
                raise BenchError(f"the daemon ended with {process.returncode}{_tail(log)}")
        finally:
            if process.poll() is None:
                _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _address(stdout: IO[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    said = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        while b"\n" not in said:
            if not selector.select(max(deadline - time.monotonic(), 0)):
                raise BenchError(f"the daemon did not listen in time{_tail(log)}")
            if not (data := os.read(stdout.fileno(), 4096)):
                raise BenchError(f"the daemon did not start{_tail(log)}")
            said += data
    line = said.partition(b"\n")[0].decode(errors="replace")
    _, found, address = line.rpartition("listening on ")
    if not found:
        raise BenchError(f"the daemon said {line[:200]!r} instead of its address")
    return address.strip()


def _tail(log: Path) -> str:
    text = log.read_text(errors="replace").strip()
    return f"; its log ends:\n{text[-_LOG_BYTES:]}" if text else ""


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
    return Memory(found["Pss"], found["Rss"], found["Private_Clean"] + found["Private_Dirty"])


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
