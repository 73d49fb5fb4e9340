"""An environment in which the simulator is quick, and says what happened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.npusim import models

#: Times of a simulated NPU that nobody waits for, milliseconds.
QUICK = {
    "NPUSIM_LOAD_MS": "1",
    "NPUSIM_PREFILL_MS": "0.001",
    "NPUSIM_DECODE_MS": "0.05",
    "NPUSIM_ENCODE_MS": "1",
    "NPUSIM_ENCODER_LOAD_MS": "1",
}
#: Where ``rknnlite`` is.
PYTHON = Path(__file__).parent / "python"


@dataclass
class Sim:
    """One simulated board: a folder with its trace and its NPU."""

    folder: Path

    @property
    def environ(self) -> dict[str, str]:
        """The variables of a quick board without faults."""
        return QUICK | {
            "NPUSIM_TRACE": str(self.folder / "trace.jsonl"),
            "NPUSIM_NPU": str(self.folder / "npu"),
            "NPUSIM_FAULT_FILE": str(self.folder / "faults"),
            "NPUSIM_GO": str(self.folder / "go"),
        }

    def go(self) -> None:
        """Let what waits (``wait@PLACE``) go on, and not wait again."""
        (self.folder / "go").touch()

    def trace(self, event: str = "") -> list[dict[str, Any]]:
        """Return what happened."""
        return models.read_trace(self.folder / "trace.jsonl", event)

    def one(self, event: str) -> dict[str, Any]:
        """Return the last event of a kind."""
        return self.trace(event)[-1]
