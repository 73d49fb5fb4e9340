"""Which frames of a video are taken, and how their times are told: integers and words."""

from __future__ import annotations

from collections.abc import Sequence


def evenly(count: int, most: int) -> list[int]:
    """Return at most ``most`` of the indices 0 to ``count - 1``, first and last among them.

    Of one frame alone it is the middle.
    """
    if most >= count:
        return list(range(count))
    if most == 1:
        return [count // 2]
    return [(2 * i * (count - 1) + most - 1) // (2 * (most - 1)) for i in range(most)]


def line(count: int, times: Sequence[float]) -> str:
    """Return the line that stands before ``count`` frames, taken at ``times`` (seconds)."""
    frames = "A frame" if count == 1 else f"{count} frames"
    if not times:
        return f"{frames} of a video, in order:\n"
    said = [f"{time:.1f}" for time in times]
    listed = said[0] if count == 1 else f"{', '.join(said[:-1])} and {said[-1]}"
    return f"{frames} of a video, at {listed} seconds:\n"
