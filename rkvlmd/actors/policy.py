"""Who gets the lease next: a pure function over those who wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Waiting:
    """One who waits for the lease.

    ``model`` is empty for maintenance (a load or an unload by the owner).
    ``since`` is the loop's clock, seconds.
    """

    client: str
    model: str
    since: float


Policy = Callable[[Sequence[Waiting], str], int]


def first_come(waiting: Sequence[Waiting], loaded: str) -> int:
    """Return the index of the next one: first come, first served.

    ``waiting`` is in order of arrival and never empty; ``loaded`` is the model
    that is loaded now. Every wait is bounded by the work of those before.
    """
    del waiting, loaded
    return 0
