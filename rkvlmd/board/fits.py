"""Whether a model fits the machine, as far as that can be known before loading it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rkvlmd.board import rknn
from rkvlmd.board.finding import Finding, Status, worst
from rkvlmd.board.memory import Memory
from rkvlmd.board.soc import SOCS, Soc

#: Fact sheet 2.4: what ``max_context_len`` is a multiple of.
CONTEXT_STEP = 32
#: What a child needs besides files and cache, bytes, as the daemon counts it.
OVERHEAD_BYTES = 150_000_000
_PLATFORMS = sorted({soc.platform for soc in SOCS.values()}, key=len, reverse=True)
#: One NPU under two names.
_ALIKE = {"rk3566", "rk3568"}
_NUMBERS = re.compile(r"(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?")


@dataclass(frozen=True, slots=True)
class Encoder:
    """A vision encoder of a model; ``key`` is where the manifest has it."""

    key: str
    engine: str
    file: Path
    outputs: int


@dataclass(frozen=True, slots=True)
class Model:
    """What the manifest of a model says; ``decoder`` is the engine, ``file`` its ``.rkllm``."""

    name: str
    encoders: tuple[Encoder, ...]
    decoder: str
    file: Path | None
    context: int
    bytes: int
    kv_bytes: int = 0
    npu_cores: int = 0
    runtime_versions: tuple[str, ...] = ()
    iommu_domain: int | None = None
    cpu_mask: int | None = None

    @property
    def engines(self) -> frozenset[str]:
        """Every engine that it needs."""
        return frozenset({self.decoder, *(encoder.engine for encoder in self.encoders)})


@dataclass(frozen=True, slots=True)
class Machine:
    """What models are held against; versions are those of the libraries in use.

    ``rkllm``: of several the first that a model works with is taken.
    """

    soc: Soc | None
    memory: Memory
    rkllm: tuple[str, ...] = ()
    rknn: str | None = None
    cpus: int | None = None
    reserve: int = 0


class _Lines:
    """The lines about one model."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.found: list[Finding] = []

    def add(self, key: str, status: Status, says: str, todo: str = "") -> None:
        what = f"model {self._name}"
        self.found.append(
            Finding(f"model.{key}", status, what, says, todo, facts={"model": self._name})
        )


def findings(model: Model, machine: Machine, above: Iterable[Finding]) -> list[Finding]:
    """Return the lines about a model; ``above`` are those about the machine."""
    lines = _Lines(model.name)
    why = [f.what for f in above if f.status == "stop" and model.engines.intersection(f.engines)]
    if why:
        lines.add("machine", "stop", f"cannot load here; see above: {', '.join(why)}")
    for encoder in model.encoders:
        if encoder.engine == "rknn":
            _encoder(encoder, machine, lines)
    if model.decoder == "rkllm":
        _decoder(model, machine, lines)
    _memory(model, machine, lines)
    if worst(lines.found) == "ok":
        lines.add("ok", "ok", f"fits: {', '.join(sorted(model.engines))}, {_mb(_need(model))}")
    return lines.found


def _encoder(encoder: Encoder, machine: Machine, lines: _Lines) -> None:
    """Hold the end of an ``.rknn`` file against SoC, library and manifest."""
    trailer = rknn.read(encoder.file)
    name = f"{encoder.key}.file: {encoder.file.name}"
    if trailer.state == "unreadable":
        lines.add("file", "stop", f"{name} cannot be read", "check the rights of the file")
    elif trailer.state == "other":
        lines.add("file", "warn", f"{name} does not look like an .rknn file", "copy it again")
    elif trailer.state == "short":
        todo = "copy it again and compare the hash with the manifest"
        lines.add("file", "warn", f"{name} is shorter than it says", todo)
    elif trailer.state == "unknown":
        says = f"{name} does not say for which SoC it is, as files of rknn-toolkit2 2.5.0 do"
        lines.add("file", "note", says)
    soc = machine.soc
    if soc is not None and trailer.platforms and not _made_for(soc, trailer.platforms):
        theirs = ", ".join(trailer.platforms)
        todo = f"convert it with target_platform='{soc.platform}'"
        lines.add("soc", "stop", f"{name} is for {theirs}, this is {soc.name}", todo)
    _toolkit(name, trailer.toolkit, machine.rknn, lines)
    if trailer.outputs is not None and trailer.outputs != encoder.outputs:
        says = f"{name} has {trailer.outputs} outputs, {encoder.key}.outputs says {encoder.outputs}"
        lines.add("outputs", "warn", says, "correct the manifest, or take the right file")


def _made_for(soc: Soc, platforms: tuple[str, ...]) -> bool:
    alike = _ALIKE if soc.platform in _ALIKE else {soc.platform}
    return bool(alike.intersection(platforms))


def _toolkit(name: str, toolkit: str | None, library: str | None, lines: _Lines) -> None:
    """Fact sheet 7: a runtime older than the toolkit may refuse the file (error -6)."""
    made, have = _numbers(toolkit), _numbers(library)
    if made is None or have is None or made <= have:
        return
    says = f"{name} was made by rknn-toolkit2 {toolkit}, librknnrt.so is {library}"
    status: Status = "stop" if made[:2] > have[:2] else "warn"
    lines.add("toolkit", status, says, f"install librknnrt.so {toolkit} or newer")


def _numbers(version: str | None) -> tuple[int, int, int] | None:
    match = _NUMBERS.match(version or "")
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None


def _decoder(model: Model, machine: Machine, lines: _Lines) -> None:
    """Say of an ``.rkllm`` what its manifest and its name tell; the file itself says nothing."""
    soc = machine.soc
    if soc is not None:
        file = model.file.name if model.file is not None else ""
        named = next((p for p in _PLATFORMS if p in file.lower()), soc.platform)
        if not _made_for(soc, (named,)):
            says = f"decoder.files.model: {file} is named for"
            todo = f"convert it with target_platform='{soc.platform}'"
            lines.add("name", "warn", f"{says} {named}, this is {soc.name}", todo)
        if model.npu_cores > soc.cores:
            says = f"decoder.npu_cores: {model.npu_cores}, {soc.name} has {soc.cores}"
            todo = f"convert it with num_npu_core={soc.cores}"
            lines.add("cores", "stop", says, todo)
        if model.iommu_domain is not None and model.iommu_domain != soc.domain:
            # Fact sheet 2.8: what the vendor's demo takes.
            says = f"decoder.iommu_domain: {model.iommu_domain}; usual on {soc.name} is"
            lines.add("domain", "note", f"{says} {soc.domain}")
    there, listed = machine.rkllm, model.runtime_versions
    if there and listed and not any(_same(version, v) for version in there for v in listed):
        says = f"decoder.runtime_versions: {', '.join(listed)}; librkllmrt.so is"
        todo = "set npu.library to a library of one of these versions, or to a folder of several"
        lines.add("runtime", "stop", f"{says} {', '.join(there)}", todo)
    _cpus(model, machine, lines)
    if step := model.context % CONTEXT_STEP:
        says = f"decoder.context: {model.context} is no multiple of {CONTEXT_STEP}"
        lines.add("context", "warn", says, f"make it {model.context - step}")


def _same(version: str, listed: str) -> bool:
    """Whether ``1.2.3`` is what ``1.2.3`` or ``1.2`` means."""
    return version == listed or version.startswith(listed + ".")


def _cpus(model: Model, machine: Machine, lines: _Lines) -> None:
    mask, cpus = model.cpu_mask, machine.cpus
    if mask is not None and cpus is not None and mask >> cpus:
        # Fact sheet 2.8: the library says "set affinity failed" and goes on.
        says = f"decoder.cpu_mask: {mask:#x}, but there are {cpus} CPUs"
        lines.add("cpus", "warn", says, "name CPUs that there are")


def _memory(model: Model, machine: Machine, lines: _Lines) -> None:
    need, memory = _need(model), machine.memory
    whole = [count for count in (memory.total, memory.limit) if count is not None]
    if whole and need + machine.reserve > min(whole):
        says = f"needs about {_mb(need)} of memory, there are {_mb(min(whole))}"
        todo = "take a smaller model, a shorter decoder.context, or lower memory.reserve_bytes"
        lines.add("memory", "stop", says, todo)
    elif memory.available is not None and need + machine.reserve > memory.available:
        says = f"needs about {_mb(need)} of memory, {_mb(memory.available)} are available now"
        lines.add("memory", "warn", says, "end what takes memory, unless it is this model itself")


def _need(model: Model) -> int:
    return model.bytes + model.kv_bytes + OVERHEAD_BYTES


def _mb(count: int) -> str:
    return f"{count // 1_000_000} MB"
