"""How much memory a load may take: what the kernel and our cgroup leave."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rkvlmd.errors import RkvlmdError

#: What a child needs besides files and cache: interpreter, library, buffers (design: 150 MB).
OVERHEAD_BYTES = 150_000_000


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
    """Read MemAvailable and what is left of our cgroup (version 2); ``root`` is for tests."""
    available = 0
    for line in (root / "proc/meminfo").read_text().splitlines():
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


def admit(name: str, *, need: int, freed: int, reserve: int, now: Room) -> None:
    """Refuse a load of ``need`` bytes that does not fit.

    ``freed`` is what the swap gives back before.

    Raises:
      RkvlmdError: ``insufficient_memory``, with the figures in MB.

    """
    have = now.bytes + freed - reserve
    if need > have:
        raise RkvlmdError(
            "insufficient_memory",
            f"The model '{name}' needs {need // 1_000_000} MB of memory, but only"
            f" {max(0, have) // 1_000_000} MB may be used.",
            retry_after=60,
        )
