"""What a look at the machine found: one line with a status and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "note", "warn", "stop"]
#: From harmless to what keeps a model from loading.
ORDER: tuple[Status, ...] = ("ok", "note", "warn", "stop")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    ``id`` is stable and for scripts, ``what`` is for people. ``engines`` names
    the engines of models that cannot run while this is a ``stop``. ``facts``
    holds JSON values.
    """

    id: str
    status: Status
    what: str
    says: str
    todo: str = ""
    engines: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Needs:
    """What the installed models need: their ``engines``; ``board``: this is a Rockchip machine."""

    engines: frozenset[str]
    board: bool

    @property
    def npu(self) -> bool:
        """Whether an installed model runs on the NPU."""
        return bool(self.engines & {"rknn", "rkllm"})

    def lacking(self, *engines: str) -> Status:
        """Return how bad it is when none of ``engines`` can run.

        It stops what is installed; on a board it is still worth a warning,
        and elsewhere nobody misses it.
        """
        if self.engines.intersection(engines):
            return "stop"
        return "warn" if self.board else "note"

    def slows(self) -> Status:
        """Return how bad it is when the NPU works, but not as well as it could."""
        return "warn" if self.board or self.npu else "note"


def worst(findings: Iterable[Finding]) -> Status:
    """Return the worst status, ``ok`` of none."""
    return max((f.status for f in findings), key=ORDER.index, default="ok")
