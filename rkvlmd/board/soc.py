"""Which SoC this is, and what is known of each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from rkvlmd.board.finding import Finding, Needs, Status
from rkvlmd.board.root import Root

COMPATIBLE = "/proc/device-tree/compatible"


@dataclass(frozen=True, slots=True)
class Soc:
    """What is known of an SoC.

    ``platform`` is what models are converted for, ``cores`` counts NPU cores,
    ``devfreq`` names the NPU below /sys/class/devfreq (empty: not known),
    ``big`` is the mask of the fast CPUs (0: all are alike), ``domain`` the
    first IOMMU domain of an ``.rkllm``, ``rkllm`` whether those exist for it.
    """

    name: str
    platform: str
    cores: int
    devfreq: str
    big: int
    domain: int
    rkllm: bool = True


# Cores, nodes and CPUs: fact sheet 5.3. Domains: fact sheet 2.8. Platforms of .rkllm: fact sheet 4.3.
_ALL = (
    Soc("rk3588", "rk3588", 3, "fdab0000.npu", 0xF0, 1),
    Soc("rk3588s", "rk3588", 3, "fdab0000.npu", 0xF0, 1),
    Soc("rk3583", "rk3588", 2, "fdab0000.npu", 0xF0, 1),
    Soc("rk3576", "rk3576", 2, "27700000.npu", 0xF0, 1),
    Soc("rk3562", "rk3562", 1, "", 0, 0),
    Soc("rv1126b", "rv1126b", 1, "", 0, 0),
    Soc("rk3566", "rk3566", 1, "fde40000.npu", 0, 0, rkllm=False),
    Soc("rk3568", "rk3568", 1, "fde40000.npu", 0, 0, rkllm=False),
)
SOCS = {soc.name: soc for soc in _ALL}
_NAMES = ", ".join(SOCS)
_OF_COMPATIBLE = re.compile(r"^OF_COMPATIBLE_\d+=rockchip,(\w+)-rk(?:npu|nn)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Reading:
    """``soc`` (or not known), where that is from, and the strings of the device tree."""

    soc: Soc | None
    source: str
    compatible: tuple[str, ...] = ()


def of_compatible(compatible: tuple[str, ...]) -> Soc | None:
    """Return the SoC that the strings of a device tree name.

    ``rockchip,rk3588s-orangepi-5`` tells more than the ``rockchip,rk3588``
    behind it, so the longest name counts.
    """
    found = []
    for entry in compatible:
        maker, _, name = entry.partition(",")
        if maker == "rockchip":
            found += [SOCS[n] for n in (name, name.partition("-")[0]) if n in SOCS]
    return max(found, key=lambda soc: len(soc.name), default=None)


def read(root: Root, override: str = "") -> Reading:
    """Return the SoC: that of the setting, of the device tree, or of the driver's entries."""
    strings = tuple(s for s in (root.text(COMPATIBLE) or "").split("\0") if s)
    if override:
        return Reading(SOCS.get(override.lower()), "npu.soc", strings)
    if strings:
        return Reading(of_compatible(strings), "device tree", strings)
    soc = _of_driver(root)
    return Reading(soc, "driver" if soc else "", strings)


def _of_driver(root: Root) -> Soc | None:
    """Guess from sysfs, which containers show where they hide the device tree."""
    for name in root.names("/sys/class/drm"):
        text = root.text(f"/sys/class/drm/{name}/device/uevent") or ""
        if (match := _OF_COMPATIBLE.search(text)) and match[1] in SOCS:
            return SOCS[match[1]]
    known = {soc.devfreq: soc for soc in reversed(_ALL) if soc.devfreq}
    for name in root.names("/sys/class/devfreq"):
        if name in known:
            return known[name]
    return None


def is_board(root: Root, reading: Reading) -> bool:
    """Whether this is a Rockchip machine, whatever is known of it."""
    return (
        reading.soc is not None
        or any(entry.startswith("rockchip,") for entry in reading.compatible)
        or root.exists("/sys/module/rknpu")
    )


def finding(root: Root, reading: Reading, needs: Needs) -> Finding:
    """Return the line about the SoC."""
    soc, strings = reading.soc, reading.compatible
    board = strings[0] if strings else None
    facts = {
        "soc": soc.name if soc else None,
        "platform": soc.platform if soc else None,
        "source": reading.source or None,
        "compatible": list(strings),
    }
    both = ("rknn", "rkllm")
    if reading.source == "npu.soc":
        if soc is None:
            says, todo = "npu.soc names none that is known", f"set npu.soc to one of {_NAMES}"
            return Finding("soc", needs.lacking(*both), "SoC", says, todo, both, facts)
        if not strings and root.exists("/sys/module/rknpu"):
            return _hidden(f"{soc.name.upper()}, as npu.soc says", needs, facts)
        says = f"{soc.name.upper()}, as npu.soc says"
        seen = of_compatible(strings)
        if seen is not None and seen.platform != soc.platform:
            says += f"; the device tree says {seen.name.upper()}"
            todo = "remove npu.soc: the libraries go by the device tree"
            return Finding("soc", "warn", "SoC", says, todo, facts=facts)
        return Finding("soc", "note", "SoC", says, facts=facts)
    if reading.source == "driver" and soc is not None:
        return _hidden(f"{soc.name.upper()} by the driver's entries", needs, facts)
    if soc is not None:
        says = f"{soc.name.upper()} ({board})"
        if soc.rkllm:
            return Finding("soc", "ok", "SoC", says, facts=facts)
        says += "; it runs .rknn files, but no .rkllm files"
        status: Status = "stop" if "rkllm" in needs.engines else "note"
        return Finding("soc", status, "SoC", says, engines=("rkllm",), facts=facts)
    if strings:
        says, todo = f"{board}: no SoC with an NPU that is known", f"known are {_NAMES}"
        return Finding("soc", needs.lacking(*both), "SoC", says, todo, both, facts)
    if needs.board:
        says = f"a Rockchip machine, but {COMPATIBLE} cannot be read"
        todo = "in a container, run it with --security-opt systempaths=unconfined; or set npu.soc"
        return Finding("soc", needs.lacking(*both), "SoC", says, todo, both, facts)
    says = "this is no Rockchip board; models of the onnx engine run on the CPU"
    todo = "convert the models for the onnx engine, or run them on a board" if needs.npu else ""
    return Finding("soc", needs.lacking(*both), "SoC", says, todo, both, facts)


def _hidden(says: str, needs: Needs, facts: dict[str, Any]) -> Finding:
    """The SoC is known to us, but not to the libraries.

    Fact sheet 5.3: they read the device tree themselves; rknn-toolkit-lite2
    refuses without it, and librkllmrt.so 1.3.0 may ("Your platform is unknown").
    """
    says += f"; {COMPATIBLE}, by which the libraries go, cannot be read here"
    todo = "in a container, run it with --security-opt systempaths=unconfined, or mount that file"
    return Finding("soc", needs.lacking("rknn"), "SoC", says, todo, ("rknn",), facts)
