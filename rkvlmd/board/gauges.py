"""What changes while a board works: the NPU's load and clock, its temperature, free CMA."""

from __future__ import annotations

from dataclasses import dataclass

from rkvlmd.board import clocks, memory, soc
from rkvlmd.board.root import Root


@dataclass(frozen=True, slots=True)
class Gauges:
    """``None`` and empty where the kernel does not say, or where there is no NPU.

    ``load`` holds the share of time (0..1) that a core was busy, by the name
    of the core (``all`` where the kernel has one figure); ``celsius`` is of
    the NPU's own thermal zone, else of the hottest one of the board.
    """

    load: tuple[tuple[str, float], ...] = ()
    hertz: int | None = None
    celsius: float | None = None
    cma_free: int | None = None


def read(root: Root, override: str = "") -> Gauges:
    """Look once; ``override`` is the setting ``npu.soc``. Reads a dozen small files."""
    reading = soc.read(root, override)
    if reading.soc is None or not soc.is_board(root, reading):
        return Gauges()
    shares = clocks.shares(root, reading.soc)
    names = ["all"] if len(shares) == 1 and reading.soc.cores > 1 else map(str, range(len(shares)))
    folder = clocks.npu_folder(root, reading.soc)
    zone = clocks.zone(root)
    return Gauges(
        load=tuple((name, share / 100) for name, share in zip(names, shares, strict=True)),
        hertz=root.number(f"{folder}/cur_freq") if folder else None,
        celsius=zone[1] / 1000 if zone else None,
        cma_free=memory.read(root).cma_free,
    )
