"""How much memory a load may take: what the kernel and our cgroup leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rkvlmd.errors import RkvlmdError

#: What a child needs besides files and cache: interpreter, library, buffers (design: 150 MB).
OVERHEAD_BYTES = 150_000_000
#: Addresses of one IOMMU domain of the NPU (driver 0.9.8); every vision encoder is in domain 0.
DOMAIN_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes available to us now; ``cgroup`` is ``None`` where no limit is set."""

    available: int
    cgroup: int | None

    @property
    def bytes(self) -> int:
        """The smaller of both."""
        return self.available if self.cgroup is None else min(self.available, self.cgroup)


def room(root: Path = Path("/")) -> Room:
    """Read MemAvailable and what is left of our cgroup (version 2); ``root`` is for tests.

    Raises:
      RkvlmdError: ``insufficient_memory``, where nobody can tell, as without a free descriptor.

    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        raise RkvlmdError(
            "insufficient_memory", "The free memory cannot be told now.", retry_after=5
        ) from None
    available = 0
    for line in lines:
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    return Room(available, _cgroup(root))


def _cgroup(root: Path) -> int | None:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    path = next((line[3:] for line in lines if line.startswith("0::")), None)
    if path is None:
        return None
    least: int | None = None
    folder = root / "sys/fs/cgroup" / path.lstrip("/")
    base = root / "sys/fs/cgroup"
    while True:
        try:
            limit = (folder / "memory.max").read_text().strip()
            used = int((folder / "memory.current").read_text())
        except (OSError, ValueError):
            limit, used = "max", 0
        if limit.isdigit():
            left = max(0, int(limit) - used)
            least = left if least is None else min(least, left)
        if folder == base or base not in folder.parents:
            return least
        folder = folder.parent


def resident(pid: int, root: Path = Path("/")) -> int:
    """Return the resident bytes of a process, 0 when it is gone."""
    try:
        for line in (root / f"proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return 0


def crowd(own: int, kept: Sequence[tuple[str, int]]) -> list[str]:
    """Say which models must give up kept encoders that would not fit beside ``own`` bytes.

    Both count what lies in the NPU's domain of the encoders; ``kept`` as for ``admit``.
    """
    left = sum(size for _, size in kept) + own
    leaving = []
    for other, size in kept:
        if left <= DOMAIN_BYTES:
            break
        if size:
            leaving.append(other)
            left -= size
    return leaving


def admit(
    name: str,
    *,
    need: int,
    freed: int,
    reserve: int,
    now: Room,
    kept: Sequence[tuple[str, int]] = (),
    budget: int = 0,
    used: int = 0,
) -> list[str]:
    """Say which models must give up their kept encoders for a load of ``need`` bytes.

    ``freed`` is what the swap gives back before. ``kept`` are the models that
    keep encoders, and their bytes, the least recently used first: they leave
    in that order, as few as will do. ``budget`` bounds all models together (0:
    no bound); ``used`` is what they hold now.

    Raises:
      RkvlmdError: ``insufficient_memory``, with the figures in MB, where even
        all of them leaving would not do; then none need leave.

    """
    have = now.bytes - reserve
    if budget:
        have = min(have, budget - used)
    have += freed
    leaving = []
    for other, size in kept:
        if need <= have:
            break
        leaving.append(other)
        have += size
    if need > have:
        raise RkvlmdError(
            "insufficient_memory",
            f"The model '{name}' needs {need // 1_000_000} MB of memory, but only"
            f" {max(0, have) // 1_000_000} MB may be used.",
            retry_after=60,
        )
    return leaving
