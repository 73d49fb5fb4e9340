"""Memory, CMA and the limit of open descriptors."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rkvlmd.board.finding import Finding, Needs
from rkvlmd.board.root import Root
from rkvlmd.board.service import Service

#: Fact sheet 7: each buffer of the NPU is a descriptor; the vendor's server sets this.
DESCRIPTORS = 102_400
_LINE = re.compile(r"^(\w+):\s+(\d+) kB", re.MULTILINE)
_LIMIT = re.compile(r"^Max open files\s+(\d+|unlimited)", re.MULTILINE)
#: What systemd gives a service that says nothing (systemd-system.conf(5)), and most shells.
_USUAL = 1024


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes; ``None`` where the kernel does not say. ``limit`` is that of our control group."""

    total: int | None
    available: int | None
    cma: int | None
    cma_free: int | None
    limit: int | None


def read(root: Root) -> Memory:
    """Read /proc/meminfo and the limit of a container."""
    text = root.text("/proc/meminfo") or ""
    kib = {name: int(count) for name, count in _LINE.findall(text)}
    found = {name: count * 1024 for name, count in kib.items()}
    return Memory(
        total=found.get("MemTotal"),
        available=found.get("MemAvailable"),
        cma=found.get("CmaTotal"),
        cma_free=found.get("CmaFree"),
        limit=root.number("/sys/fs/cgroup/memory.max"),
    )


def findings(root: Root, memory: Memory, service: Service, needs: Needs) -> list[Finding]:
    """Return the lines about memory, CMA and descriptors."""
    found = [_memory(memory)]
    if memory.cma is not None and needs.board:
        says = f"{_mb(memory.cma_free)} of {_mb(memory.cma)} free"
        facts = {"cma_bytes": memory.cma, "cma_free_bytes": memory.cma_free}
        todo = ""
        if memory.cma_free is not None and memory.cma_free * 10 < memory.cma:
            # Fact sheet 5.4 and 7: boards whose NPU allocations failed for want of CMA.
            todo = 'if "failed to malloc npu memory" appears, raise cma= on the kernel command line'
        found.append(Finding("cma", "note" if todo else "ok", "CMA", says, todo, facts=facts))
    found.append(_descriptors(root, service, needs))
    return found


def _memory(memory: Memory) -> Finding:
    facts = {
        "total_bytes": memory.total,
        "available_bytes": memory.available,
        "limit_bytes": memory.limit,
    }
    says = f"{_mb(memory.available)} of {_mb(memory.total)} available"
    if memory.limit is not None:
        says += f", {_mb(memory.limit)} for this control group"
    return Finding("memory", "ok", "memory", says, facts=facts)


def _descriptors(root: Root, service: Service, needs: Needs) -> Finding:
    match = _LIMIT.search(root.text("/proc/self/limits") or "")
    mine = None if match is None else 1 << 30 if match[1] == "unlimited" else int(match[1])
    counts = service.descriptors or _USUAL if service.installed else mine
    facts = {"shell": mine, "service": counts if service.installed else None}
    who = "the service" if service.installed else "this shell"
    if counts is None:
        return Finding("descriptors", "note", "open files", "the limit is not shown", facts=facts)
    says = f"{counts if counts < 1 << 30 else 'unlimited'} for {who}"
    if counts >= DESCRIPTORS:
        return Finding("descriptors", "ok", "open files", says, facts=facts)
    if not needs.npu and not needs.board:
        return Finding("descriptors", "ok", "open files", says, facts=facts)
    says += f"; the NPU takes one a buffer, and {DESCRIPTORS} are advised"
    todo = (
        f"set LimitNOFILE={DESCRIPTORS} in rkvlmd.service"
        if service.installed
        else f"ulimit -n {DESCRIPTORS} before rkvlmd, or use systemd/rkvlmd.service"
    )
    return Finding("descriptors", needs.slows(), "open files", says, todo, facts=facts)


def _mb(count: int | None) -> str:
    return "?" if count is None else f"{count // 1_000_000} MB"
