"""The kernel's NPU driver: which, how old, how many cores, and behind an IOMMU or not."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rkvlmd.board.finding import Finding, Needs
from rkvlmd.board.root import Root
from rkvlmd.board.soc import Soc

# Fact sheet 5.3: 0.9.8 is required, and the libraries warn below 0.9.7.
REQUIRED = (0, 9, 8)
WARNS_BELOW = (0, 9, 7)
#: Where the driver says its version; the first is readable by everybody (fact sheet 5.3).
SOURCES = (
    "/sys/module/rknpu/version",
    "/sys/kernel/debug/rknpu/version",
    "/proc/rknpu/version",
)
LOADS = ("/sys/kernel/debug/rknpu/load", "/proc/rknpu/load")
_VERSION = re.compile(r"(\d{1,4})\.(\d{1,4})\.(\d{1,4})")
_CORE = re.compile(r"Core(\d):\s{0,8}(\d{1,3})%")
_ONE = re.compile(r"NPU load:\s{0,8}(\d{1,3})%")
_NPU = ("rknn", "rkllm")


@dataclass(frozen=True, slots=True)
class Driver:
    """``name``: ``rknpu``, ``rocket`` or empty; ``version`` empty where it is not said."""

    name: str
    version: str = ""
    rocket: bool = False

    @property
    def numbers(self) -> tuple[int, int, int] | None:
        """The version as numbers."""
        match = _VERSION.search(self.version)
        return (int(match[1]), int(match[2]), int(match[3])) if match else None


def read(root: Root) -> Driver:
    """Return which driver drives the NPU."""
    rocket = root.exists("/sys/module/rocket") or any(
        "DRIVER=rocket" in (root.text(f"/sys/class/accel/{name}/device/uevent") or "")
        for name in root.names("/sys/class/accel")
    )
    for source in SOURCES:
        # "0.9.8" in sysfs, "RKNPU driver: v0.9.8" in debugfs and procfs.
        if match := _VERSION.search(root.word(source)):
            return Driver("rknpu", match[0], rocket)
    if root.exists("/sys/module/rknpu") or root.exists("/sys/bus/platform/drivers/RKNPU"):
        return Driver("rknpu", "", rocket)
    return Driver("rocket" if rocket else "", "", rocket)


def too_old(version: str) -> str:
    """Return what to tell the owner of a driver of this version, empty where it is new enough.

    A version that is not known is new enough.
    """
    numbers = Driver("rknpu", version).numbers
    if numbers is None or numbers >= REQUIRED:
        return ""
    required = ".".join(map(str, REQUIRED))
    return (
        f"The NPU driver is version {'.'.join(map(str, numbers))}, but the libraries need"
        f" {required}; update the kernel (see rkvlmctl doctor)."
    )


def finding(root: Root, driver: Driver, needs: Needs) -> Finding:
    """Return the line about the driver."""
    kernel = root.word("/proc/sys/kernel/osrelease")
    facts = {"driver": driver.name or None, "version": driver.version or None, "kernel": kernel}
    on = f" on kernel {kernel}" if kernel else ""
    if driver.name == "rocket":
        # Fact sheet 5.3 and 7: the vendor's libraries cannot use the mainline driver.
        says = f"rocket, the mainline driver,{on}; librkllmrt.so and librknnrt.so need rknpu"
        todo = "boot the vendor's kernel, or build rknpu 0.9.8 as a DKMS module and unload rocket"
        return Finding("driver", needs.lacking(*_NPU), "NPU driver", says, todo, _NPU, facts)
    if not driver.name:
        says = f"none{on}"
        todo = "boot a vendor kernel with rknpu 0.9.8" if needs.board or needs.npu else ""
        return Finding("driver", needs.lacking(*_NPU), "NPU driver", says, todo, _NPU, facts)
    numbers = driver.numbers
    if numbers is None:
        says = f"rknpu{on}, which does not say its version"
        todo = "as root, read /sys/kernel/debug/rknpu/version: 0.9.8 is required"
        return Finding("driver", "note", "NPU driver", says, todo, facts=facts)
    says = f"rknpu {driver.version}{on}"
    if numbers >= REQUIRED:
        return Finding("driver", "ok", "NPU driver", says, facts=facts)
    says += "; 0.9.8 is required"
    if numbers < WARNS_BELOW:
        says += ", and the libraries themselves warn below 0.9.7"
    # Fact sheet 7: what old drivers look like from above.
    todo = "update the kernel; until then expect failed allocations and failed submits"
    return Finding("driver", needs.slows(), "NPU driver", says, todo, facts=facts)


def busy(root: Root) -> tuple[int, ...]:
    """Return the load of each core in percent as debugfs or procfs say it (root only)."""
    for path in LOADS:
        text = root.text(path, 4096) or ""
        if cores := tuple(int(share) for _, share in _CORE.findall(text)):
            return cores
        if match := _ONE.search(text):
            return (int(match[1]),)
    return ()


def core_finding(root: Root, soc: Soc) -> Finding:
    """Return the line about the cores: how many the SoC has, and how many the driver shows."""
    shown = len(busy(root))
    facts = {"cores": soc.cores, "shown": shown or None}
    says = f"{soc.cores} on {soc.name.upper()}"
    if shown and shown != soc.cores:
        says += f", but the driver shows {shown}"
        # Fact sheet 5.3: binned parts exist (RK3583: 2 of 3).
        todo = f"use models converted for at most {shown}, and set npu.soc to the real part"
        return Finding("cores", "warn", "NPU cores", says, todo, facts=facts)
    return Finding("cores", "ok", "NPU cores", says, facts=facts)


def domain_finding(root: Root, soc: Soc) -> Finding:
    """Return the line about the IOMMU and the domain in which an ``.rkllm`` starts."""
    group = bool(soc.devfreq) and root.exists(
        f"/sys/bus/platform/devices/{soc.devfreq}/iommu_group"
    )
    seen = bool(soc.devfreq) and root.exists(f"/sys/bus/platform/devices/{soc.devfreq}")
    facts = {"base_domain": soc.domain, "iommu": group if seen else None}
    # Fact sheet 2.8 and 5.4: 4 GiB a domain, one active at a time, .rknn in domain 0.
    says = f".rkllm from domain {soc.domain}, .rknn in domain 0, 4 GiB each, one active at a time"
    if seen and not group:
        says += "; the NPU has no IOMMU here, so its memory comes from CMA"
        return Finding("iommu", "note", "IOMMU domains", says, facts=facts)
    return Finding("iommu", "ok", "IOMMU domains", says, facts=facts)
