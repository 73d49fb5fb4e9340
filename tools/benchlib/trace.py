"""The simulator's trace: what the NPU did, and how much of the time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: Work of the NPU that is not a request's.
_LOADS = frozenset({"load", "encoder_load", "init"})


class Trace:
    """Reads a trace file from where it was last marked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def mark(self) -> None:
        """Forget everything up to now."""
        self._offset = self.path.stat().st_size if self.path.exists() else 0

    def events(self, kind: str = "") -> list[dict[str, Any]]:
        """Return what happened since the mark, or the events of one kind."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._offset)
            lines = file.read().decode(errors="replace").splitlines()
        found = [json.loads(line) for line in lines if line.endswith("}")]
        return [event for event in found if not kind or event["ev"] == kind]


def work(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the NPU's work for requests, by its beginning."""
    found = [e for e in events if e["ev"] == "npu" and e["what"] not in _LOADS]
    return sorted(found, key=lambda e: e["begin"])


def use(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return how busy the NPU was between its first work and its last, 0..1, and with what."""
    jobs = work(events)
    if not jobs:
        return {"busy": 0.0, "seconds": 0.0}
    window = max(j["end"] for j in jobs) - jobs[0]["begin"]
    by: dict[str, float] = {}
    for job in jobs:
        by[job["what"]] = by.get(job["what"], 0.0) + (job["end"] - job["begin"]) / 1e9
    return {
        "busy": sum(by.values()) * 1e9 / window if window else 0.0,
        "seconds": window / 1e9,
        "by_work": {name: round(seconds, 4) for name, seconds in sorted(by.items())},
        "jobs": len(jobs),
    }
