"""Clocks and their governors, the NPU's load, and how hot it is."""

from __future__ import annotations

import re
from typing import Any

from rkvlmd.board import driver
from rkvlmd.board.finding import Finding, Needs
from rkvlmd.board.root import Root
from rkvlmd.board.soc import Soc

DEVFREQ = "/sys/class/devfreq"
CPUFREQ = "/sys/devices/system/cpu/cpufreq"
THERMAL = "/sys/class/thermal"
#: With these a clock does not follow the load.
_FIXED = {"performance", "userspace"}
_LOAD = re.compile(r"(\d{1,3})@(\d{1,12})Hz")
#: A zone without trip points is called hot from here, millidegrees Celsius: below where
#: Rockchip's device trees begin to throttle (85 degrees).
_HOT = 80_000


def findings(root: Root, soc: Soc, needs: Needs) -> list[Finding]:
    """Return the lines about clocks, load and temperature."""
    found = [_cpu(root, soc, needs), _ddr(root, needs), _npu(root, soc)]
    found += [line for line in (_load(root, soc), _heat(root)) if line is not None]
    return found


def npu_folder(root: Root, soc: Soc) -> str | None:
    """Return the NPU's folder of devfreq: the one known for the SoC, else any that ends so."""
    names = root.names(DEVFREQ)
    if soc.devfreq in names:
        return f"{DEVFREQ}/{soc.devfreq}"
    return next((f"{DEVFREQ}/{name}" for name in names if name.endswith(".npu")), None)


def _cpu(root: Root, soc: Soc, needs: Needs) -> Finding:
    """The clocks of the fast CPUs, which run a part of every token."""
    policies: list[dict[str, Any]] = []
    for name in root.names(CPUFREQ):
        folder = f"{CPUFREQ}/{name}"
        cpus = [int(cpu) for cpu in root.word(f"{folder}/related_cpus").split() if cpu.isdecimal()]
        if not cpus or (soc.big and not any(soc.big >> cpu & 1 for cpu in cpus)):
            continue
        policies.append(
            {
                "cpus": cpus,
                "governor": root.word(f"{folder}/scaling_governor"),
                "khz": root.number(f"{folder}/scaling_cur_freq"),
                "max_khz": root.number(f"{folder}/scaling_max_freq"),
            }
        )
    facts = {"policies": policies}
    if not policies:
        says = "their clocks are not shown by this kernel"
        return Finding("clock-cpu", "note", "CPU clocks", says, facts=facts)
    first, last = policies[0]["cpus"][0], policies[-1]["cpus"][-1]
    governors = sorted({policy["governor"] for policy in policies})
    most = max((policy["max_khz"] or 0 for policy in policies), default=0)
    says = f"CPU {first}-{last}: {', '.join(governors)}, up to {most // 1000} MHz"
    if set(governors) <= _FIXED:
        return Finding("clock-cpu", "ok", "CPU clocks", says, facts=facts)
    # Fact sheet 0.2 (10) and 6.3: 9.8 -> 13.0 tokens/s on an RK3588.
    says += "; performance was measured to decode up to 32 % faster on RK3588"
    todo = f"echo performance | sudo tee {CPUFREQ}/policy*/scaling_governor"
    return Finding("clock-cpu", needs.slows(), "CPU clocks", says, todo, facts=facts)


def _ddr(root: Root, needs: Needs) -> Finding:
    """The memory's clock, which bounds decoding."""
    folder = f"{DEVFREQ}/dmc"
    governor, now, most = _devfreq(root, folder)
    facts = {"governor": governor or None, "hz": now, "max_hz": most}
    if not governor:
        says = "the memory's clock is not shown by this kernel"
        return Finding("clock-ddr", "note", "DDR clock", says, facts=facts)
    says = f"{governor}, {_mhz(now)} of {_mhz(most)}"
    if governor in _FIXED and (now is None or most is None or now >= most):
        return Finding("clock-ddr", "ok", "DDR clock", says, facts=facts)
    # Fact sheet 6.4: the vendor's figures were taken with DDR fixed at 2112 MHz.
    says += "; decoding is bound by memory, so a fixed clock pays most"
    todo = f"echo performance | sudo tee {folder}/governor"
    return Finding("clock-ddr", needs.slows(), "DDR clock", says, todo, facts=facts)


def _npu(root: Root, soc: Soc) -> Finding:
    folder = npu_folder(root, soc)
    governor, now, most = _devfreq(root, folder) if folder else ("", None, None)
    facts = {"governor": governor or None, "hz": now, "max_hz": most}
    if not governor:
        says = "the NPU's clock is not shown by this kernel"
        return Finding("clock-npu", "note", "NPU clock", says, facts=facts)
    says = f"{governor}, {_mhz(now)} of {_mhz(most)}"
    if governor in _FIXED:
        return Finding("clock-npu", "ok", "NPU clock", says, facts=facts)
    # Fact sheet 6.4: the vendor's scripts fix it at 1.0 GHz.
    todo = f"to compare figures, fix it: echo performance | sudo tee {folder}/governor"
    return Finding("clock-npu", "note", "NPU clock", says, todo, facts=facts)


def _devfreq(root: Root, folder: str) -> tuple[str, int | None, int | None]:
    """Return governor, clock now and highest clock (hertz)."""
    listed = [int(f) for f in root.word(f"{folder}/available_frequencies").split() if f.isdecimal()]
    # Some kernels say 0 for "no limit set".
    most = root.number(f"{folder}/max_freq") or max(listed, default=None)
    return root.word(f"{folder}/governor"), root.number(f"{folder}/cur_freq"), most


def _mhz(hertz: int | None) -> str:
    return "? MHz" if hertz is None else f"{hertz // 1_000_000} MHz"


def shares(root: Root, soc: Soc) -> tuple[int, ...]:
    """Return how busy the NPU is, percent: per core as root, else one figure (fact sheet 5.3)."""
    found = driver.busy(root)
    folder = npu_folder(root, soc)
    if not found and folder and (match := _LOAD.match(root.word(f"{folder}/load"))):
        found = (int(match[1]),)
    return found


def _load(root: Root, soc: Soc) -> Finding | None:
    busy = shares(root, soc)
    if not busy:
        return None
    says = ", ".join(f"{share} %" for share in busy)
    facts = {"percent": list(busy)}
    if max(busy) == 0:
        return Finding("load", "ok", "NPU load", says, facts=facts)
    # Fact sheet 5.4: two users of the NPU slow each other down by half and more.
    todo = "if rkvlmd is idle, another program uses the NPU: stop it, or expect half the speed"
    return Finding("load", "note", "NPU load", says, todo, facts=facts)


def zone(root: Root) -> tuple[str, int, int | None] | None:
    """Return the NPU's own thermal zone where there is one, else the hottest.

    Its name, temperature and where it begins to throttle, millidegrees Celsius.
    """
    zones = []
    for name in root.names(THERMAL):
        folder = f"{THERMAL}/{name}"
        now = root.number(f"{folder}/temp") if name.startswith("thermal_zone") else None
        if now is not None:
            zones.append((root.word(f"{folder}/type") or name, now, _trip(root, folder)))
    own = [one for one in zones if "npu" in one[0]]
    return max(own or zones, key=lambda one: one[1], default=None)


def _heat(root: Root) -> Finding | None:
    found = zone(root)
    if found is None:
        return None
    name, now, trip = found
    says = f"{name} {now / 1000:.0f} °C"
    facts = {"zone": name, "millidegrees": now, "trip_millidegrees": trip}
    if now < (trip or _HOT):
        return Finding("heat", "ok", "temperature", says, facts=facts)
    return Finding(
        "heat", "warn", "temperature", f"{says}; the clocks go down", "improve cooling", facts=facts
    )


def _trip(root: Root, folder: str) -> int | None:
    """Return where the zone begins to throttle."""
    for index in range(8):
        if root.word(f"{folder}/trip_point_{index}_type") == "passive":
            return root.number(f"{folder}/trip_point_{index}_temp")
    return None
