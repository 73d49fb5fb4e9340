"""A daemon of one's own for a while: started in a scratch folder, listening, stopped in order."""

from __future__ import annotations

import os
import selectors
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

#: Longest wait for the daemon to listen, seconds: a cold start on a slow card.
START_SECONDS = 60.0
#: Longest wait for it to leave, seconds; after that it is killed.
STOP_SECONDS = 45.0
#: Lines of the log that an error shows.
_LAST_LINES = 8


class ThrowawayError(Exception):
    """Why the daemon did not come up, or did not end as it should; one sentence and its log's end."""


@dataclass(frozen=True, slots=True)
class Daemon:
    """A daemon that listens at ``address``; ``ready_seconds`` after just before its exec."""

    pid: int
    address: str
    control: Path
    log: Path
    ready_seconds: float


@contextmanager
def running(
    command: Sequence[str],
    scratch: Path,
    *,
    models: Path | None = None,
    settings: str = "",
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Iterator[Daemon]:
    """Run a daemon inside the block; it is stopped with SIGTERM.

    Args:
      command: how to start it; its options are added.
      scratch: an empty folder for its sockets, state and log.
      models: its folder of model folders; ``None``: an empty one.
      settings: its settings, TOML; nothing of this machine's is read.
      environ: its environment; ``None``: ours.
      cwd: where it runs; ``None``: here.

    Raises:
      ThrowawayError: it did not come up, or did not end as it should.

    """
    config, control, log = scratch / "rkvlmd.toml", scratch / "control.sock", scratch / "log"
    config.write_text(settings)
    options = ["--config", str(config), "--http", "127.0.0.1:0", "--control", str(control)]
    options += ["--state", str(scratch / "state"), "--models", str(models or scratch / "models")]
    with log.open("wb") as errors:
        began = time.monotonic()
        try:
            daemon = subprocess.Popen(
                [*command, *options],
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=None if environ is None else dict(environ),
                process_group=0,  # a terminal's Ctrl-C comes to us alone, and we stop it in order
            )
        except OSError as exc:
            raise ThrowawayError(f"the daemon cannot be started: {exc.strerror}") from exc
    assert daemon.stdout is not None
    try:
        with daemon.stdout:
            address = _address(daemon.stdout, log)
            yield Daemon(daemon.pid, address, control, log, time.monotonic() - began)
            _stop(daemon)
        if daemon.returncode != 0:
            message = f"the daemon ended with status {daemon.returncode}{last_words(log)}"
            raise ThrowawayError(message)
    finally:
        if daemon.poll() is None:
            _stop(daemon)


def _stop(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _address(stdout: IO[bytes], log: Path) -> str:
    """Wait for the line that ends in ``listening on ADDRESS``; return the address."""
    deadline = time.monotonic() + START_SECONDS
    said = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        while b"\n" not in said:
            if not selector.select(max(deadline - time.monotonic(), 0)):
                what = f"did not listen within {START_SECONDS:.0f} s"
                raise ThrowawayError(f"the daemon {what}{last_words(log)}")
            data = os.read(stdout.fileno(), 4096)
            if not data:
                raise ThrowawayError(f"the daemon did not start{last_words(log)}")
            said += data
    line = said.partition(b"\n")[0].decode(errors="replace")
    _, found, address = line.rpartition("listening on ")
    if not found:
        raise ThrowawayError(f"the daemon said {line[:200]!r} instead of its address")
    return address.strip()


def last_words(log: Path) -> str:
    """Return the end of the daemon's log, to be put after a sentence."""
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    if not lines:
        return ""
    return "; its last words:\n" + "\n".join(f"  {line}" for line in lines[-_LAST_LINES:])
