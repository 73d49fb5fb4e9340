"""Figures: what was measured, the target, whether it was met; as JSON and as a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


class BenchError(Exception):
    """Why something could not be measured; one sentence."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value.

    ``most`` or ``least`` is the target, in ``unit``; neither: a value that is
    printed beside the others. ``detail`` holds what the value was made of.
    """

    name: str
    value: float
    unit: str
    most: float | None = None
    least: float | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> str:
        """The target in words; empty where there is none."""
        if self.most is not None:
            return f"at most {self.most:g} {self.unit}"
        return "" if self.least is None else f"at least {self.least:g} {self.unit}"

    @property
    def met(self) -> bool | None:
        """Whether the target was met; ``None`` where there is none."""
        if self.most is not None:
            return self.value <= self.most
        return None if self.least is None else self.value >= self.least

    def as_json(self) -> dict[str, Any]:
        """Return the figure as JSON shows it."""
        return {
            "name": self.name,
            "value": significant(self.value),
            "unit": self.unit,
            "target": self.target or None,
            "met": self.met,
            "detail": self.detail,
        }


def significant(value: float, digits: int = 4) -> float:
    """Return ``value`` rounded to so many significant digits."""
    if value == 0 or not math.isfinite(value):
        return value
    return round(value, digits - 1 - math.floor(math.log10(abs(value))))


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that ``share`` (0..1) of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def spread(values: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """Return how the values of several runs lie."""
    return {
        "runs": len(values),
        "min": significant(min(values), digits),
        "median": significant(statistics.median(values), digits),
        "p90": significant(percentile(values, 0.9), digits),
        "max": significant(max(values), digits),
    }


def table(report: dict[str, Any]) -> str:
    """Return a report (``cli.report``) as Markdown."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"{machine['name']}; {report['date']}; {versions}.",
        f"Other programs used {machine['busy_before']:.0%} of the cores before the start."
        + (f" {report['note']}" if report["note"] else ""),
        "",
    ]
    if report["figures"] or report["missing"]:
        lines += ["| figure | value | target | met |", "|---|---:|---|---|"]
    words = {True: "yes", False: "no", None: ""}
    for figure in report["figures"]:
        value = f"{figure['value']:g} {figure['unit']}".strip()
        row = (figure["name"], value, figure["target"] or "", words[figure["met"]])
        lines.append("| " + " | ".join(row) + " |")
    lines += [f"| {name} | not measured: {why} | | |" for name, why in report["missing"].items()]
    return "\n".join(lines).rstrip("\n") + "\n"
