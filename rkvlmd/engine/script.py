"""Faults on demand, for tests and benchmarks; never used without ``--script``, or a load that asks.

A script is a JSON object; ``fault`` in it is an object or a list of them:

* ``at``: ``hello``, ``load``, ``encode``, ``prefill``, ``generate``, ``embed``, ``abort``,
  ``picture``, ``video`` or ``render``;
* ``kind``: ``kill`` (SIGKILL), ``segv``, ``exit`` (status 3), ``error`` (a ``failed`` answer),
  ``hang`` (the worker waits for good and hears no abort; the main thread goes on beating) or
  ``stop`` (SIGSTOP: the whole process, beats included);
* ``times``: how often it happens, 1 unless said; ``after_tokens`` (``generate``): before which
  token;
* ``file``: the path of a file that counts how often it has happened, so that ``times`` holds
  over restarts.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

from rkvlmd.errors import RkvlmdError

EXIT_STATUS = 3


class Script:
    """What a scripted child does; see the module for the keys of ``fault``."""

    def __init__(self, script: dict[str, Any]) -> None:
        self.values = script
        fault = script.get("fault", [])
        self._faults: list[dict[str, Any]] = fault if isinstance(fault, list) else [fault]
        self._counts = [0] * len(self._faults)

    def merged(self, more: dict[str, Any]) -> Script:
        """Return a script in which ``more`` goes before what this one says."""
        merged = Script(self.values | more)
        if "fault" not in more:
            merged._counts = self._counts
        return merged

    def seconds(self, key: str) -> float:
        """Return a duration, 0 unless given."""
        return float(self.values.get(key, 0.0))

    def strike(self, at: str, tokens: int = 0) -> bool:
        """Do the fault that is due here, if any; return whether an abort shall be ignored.

        Raises:
          RkvlmdError: the fault's kind is ``error``.

        """
        for i, fault in enumerate(self._faults):
            if fault.get("at") != at or tokens < int(fault.get("after_tokens", 0)):
                continue
            if not self._due(i, fault):
                continue
            kind = fault.get("kind", "kill")
            print(f"scripted fault: {kind} at {at}", file=sys.stderr, flush=True)
            if kind == "error":
                raise RkvlmdError("engine_error", "The script asked for an error.")
            if at == "abort" and kind == "hang":
                return True
            _do(kind)
        return False

    def _due(self, index: int, fault: dict[str, Any]) -> bool:
        path = fault.get("file")
        count = self._counts[index] if path is None else _read(Path(path))
        if count >= int(fault.get("times", 1)):
            return False
        self._counts[index] = count + 1
        if path is not None:
            Path(path).write_text(str(count + 1), encoding="ascii")
        return True


def _read(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii") or "0")
    except FileNotFoundError:
        return 0


def _do(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "segv":
        # To this thread, as a real one: sent to the process, another thread may get it later.
        signal.pthread_kill(threading.get_ident(), signal.SIGSEGV)
    elif kind == "stop":
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
    elif kind == "exit":
        os._exit(EXIT_STATUS)
    elif kind == "hang":
        hang()
    else:
        raise ValueError(f"unknown fault {kind!r}")


def hang() -> NoReturn:
    """Wait for good."""
    while True:
        threading.Event().wait()
