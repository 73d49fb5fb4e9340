"""The whole look at a machine: every line, in the order in which things depend on each other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rkvlmd.board import (
    clocks,
    driver,
    fits,
    libraries,
    memory,
    nodes,
    service,
    soc,
    toolkit,
)
from rkvlmd.board.finding import Finding, Needs, worst
from rkvlmd.board.root import Here, Root

_RANGE = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?$")


@dataclass(frozen=True, slots=True)
class Question:
    """What the settings and the model folders say; ``broken`` are lines about those."""

    soc: str = ""
    library: str = ""
    layout: str = ""
    reserve_bytes: int = 0
    models: Sequence[fits.Model] = ()
    broken: Sequence[Finding] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class Report:
    """Every line; ``loads``: nothing stops an installed model."""

    findings: tuple[Finding, ...]

    @property
    def loads(self) -> bool:
        """Whether no line is a ``stop``."""
        return worst(self.findings) != "stop"

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; keys may be added, none changes its meaning."""
        lines = [
            {
                "id": f.id,
                "status": f.status,
                "what": f.what,
                "says": f.says,
                "todo": f.todo or None,
                "facts": f.facts,
            }
            for f in self.findings
        ]
        return {"loads": self.loads, "worst": worst(self.findings), "findings": lines}


def look(root: Root, here: Here, question: Question) -> Report:
    """Look at the machine below ``root`` with the eyes of ``here``."""
    reading = soc.read(root, question.soc)
    engines = frozenset(engine for model in question.models for engine in model.engines)
    needs = Needs(engines, soc.is_board(root, reading))
    room = memory.read(root)
    runner = service.read(root, here)
    lines = [soc.finding(root, reading, needs)]
    if needs.board:
        lines += _npu(root, here, reading, runner, needs)
    rkllm = libraries.copies(root, libraries.RKLLM, here, question.library)
    rknn = libraries.copies(root, libraries.RKNN, here)
    lines += libraries.findings(
        libraries.RKLLM, rkllm, here, needs, question.library, question.layout
    )
    lines += libraries.findings(libraries.RKNN, rknn, here, needs)
    lines += toolkit.findings(root, here, needs)
    lines += memory.findings(root, room, runner, needs)
    lines += question.broken
    machine = fits.Machine(
        soc=reading.soc,
        memory=room,
        rkllm=libraries.offered(rkllm),
        rknn=_version(rknn),
        cpus=_cpus(root),
        reserve=question.reserve_bytes,
    )
    above = tuple(lines)
    for model in question.models:
        lines += fits.findings(model, machine, above)
    return Report(tuple(lines))


def _npu(
    root: Root, here: Here, reading: soc.Reading, runner: service.Service, needs: Needs
) -> list[Finding]:
    """Return the lines that only a board has."""
    its_driver = driver.read(root)
    lines = [driver.finding(root, its_driver, needs)]
    if reading.soc is not None:
        lines.append(driver.core_finding(root, reading.soc))
        if its_driver.name == "rknpu":
            lines.append(driver.domain_finding(root, reading.soc))
    if its_driver.name != "rocket":
        lines += nodes.findings(root, here, runner, nodes.read(root), needs)
    if reading.soc is not None:
        lines += clocks.findings(root, reading.soc, needs)
    return lines


def _version(found: list[libraries.Copy]) -> str | None:
    used = libraries.in_use(found)
    return used.version if used else None


def _cpus(root: Root) -> int | None:
    """Return the number of CPUs, from ``0-7`` or ``0-3,6``."""
    match = _RANGE.search(root.word("/sys/devices/system/cpu/present"))
    return int(match[2] or match[1]) + 1 if match else None
