"""Starts the real daemon as a process, on free sockets, for end-to-end tests."""

from __future__ import annotations

import base64
import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[2]
#: Longest wait for anything of a daemon, seconds.
PATIENCE = 60.0


@dataclass
class Daemon:
    """A running daemon; ``log`` is filled when it has ended."""

    process: subprocess.Popen[bytes]
    url: str
    control: Path
    log: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def ctl(self, *arguments: str) -> dict[str, Any]:
        """Run ``rkvlmctl --json``; return what it printed, its status under ``exit``."""
        done = subprocess.run(
            [sys.executable, "-m", "rkvlmd.ctl", "--control", str(self.control), "--json", *arguments],
            capture_output=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        answer: dict[str, Any] = json.loads(done.stdout or b"{}")
        return {**answer, "exit": done.returncode}

    def children(self) -> dict[str, int]:
        """Return the pids of the children, by name."""
        return {child["name"]: child["pid"] for child in self.ctl("status")["children"]}

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


@contextmanager
def running(
    tmp: Path, models: Path, *, options: Sequence[str] = (), python: Sequence[str] = (),
    module: Sequence[str] = ("rkvlmd",), config: str = "",
) -> Iterator[Daemon]:  # fmt: skip
    """Start a daemon; kill it at the end if it still runs."""
    (tmp / "rkvlmd.toml").write_text(config)
    control = tmp / "control.sock"
    with open(tmp / "log", "wb") as log:
        process = subprocess.Popen(
            [
                sys.executable, *python, "-m", *module, "--config", str(tmp / "rkvlmd.toml"),
                "--http", "127.0.0.1:0", "--control", str(control), "--models", str(models),
                "--state", str(tmp / "state"), *options,
            ],
            stdout=subprocess.PIPE, stderr=log, cwd=ROOT,
        )  # fmt: skip
    daemon = None
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], PATIENCE)
        line = process.stdout.readline().decode().strip() if ready else ""
        assert "listening on http://" in line, (line, (tmp / "log").read_text())
        daemon = Daemon(process, line.split()[-1], control)
        yield daemon
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()
        if daemon is not None:
            daemon.log = (tmp / "log").read_text()


def png(colour: tuple[int, int, int] = (200, 30, 30), size: int = 64) -> str:
    """Return a one-coloured picture as a data URI."""
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def question(text: str = "What is this?", *pictures: str) -> list[dict[str, Any]]:
    """Return ``messages`` with one user turn."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": u}} for u in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def gone(pid: int) -> bool:
    """Whether a process is gone, waiting a little for it."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except OSError:
            return True
        os.sched_yield()
    return False
