"""Rotary positions of a prompt with pictures in it: integers alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

#: Frames, rows and columns, in tokens.
Grid = tuple[int, int, int]


class Seen(NamedTuple):
    """Where rows of pictures go in a prompt, and what they are rows of.

    A ``grid`` of ``None`` counts on like text. ``video``: several of one number
    without anything between them are one video, and lie over each other;
    ``time`` is the position on its time axis, from its first one.
    """

    start: int
    places: int
    grid: Grid | None
    video: int | None = None
    time: int = 0


@dataclass(frozen=True, slots=True)
class Positions:
    """Time, row and column of every place of a prompt; ``offset`` is what follows it.

    A text token's three are equal. The token at place ``p`` after the prompt
    has the position ``p + offset``.
    """

    time: tuple[int, ...]
    row: tuple[int, ...]
    column: tuple[int, ...]
    offset: int

    def rows(self, start: int, end: int) -> tuple[list[int], list[int], list[int]]:
        """Return the positions of places ``start`` to ``end``, past the prompt too."""
        count = len(self.time)
        after = [place + self.offset for place in range(max(start, count), end)]
        time, row, column = (
            [*axis[start : min(end, count)], *after] for axis in (self.time, self.row, self.column)
        )
        return time, row, column


def mrope(count: int, spans: Iterable[Seen | tuple[int, int, Grid | None]]) -> Positions:
    """Return the positions of ``count`` places with pictures in them, as Qwen-VL has them.

    ``spans`` are in the order of the prompt. A picture's places have the
    position where it starts plus their frame, row and column; those of a video
    the position where the video starts plus their time, row and column. What
    follows starts after the larger of rows and columns (transformers 5,
    ``get_rope_index`` of Qwen2-VL and Qwen2.5-VL; before 5.3 frames and times
    counted too: the same for one frame).

    Raises:
      ValueError: spans overlap, leave the prompt, or differ from their grid.

    """
    axes: tuple[list[int], list[int], list[int]] = ([], [], [])
    following = begin = 0
    before: Seen | None = None

    def text(until: int) -> None:
        nonlocal following
        places = range(following, following + until - len(axes[0]))
        for axis in axes:
            axis.extend(places)
        following += len(places)

    for span in (Seen(*span) for span in spans):
        start, places, grid, video, time = span
        if start < len(axes[0]) or start + places > count:
            raise ValueError("a picture's places overlap another's or leave the prompt")
        goes_on = (
            video is not None
            and before is not None
            and before.video == video
            and before.start + before.places == start
        )
        text(start)
        before = span
        if not goes_on:
            begin = following
        if grid is None:
            text(start + places)
            continue
        frames, rows, columns = grid
        if frames * rows * columns != places or min(grid) < 1:
            raise ValueError("a picture's grid differs from its places")
        for frame in range(frames):
            for row in range(rows):
                axes[0].extend([begin + time + frame] * columns)
                axes[1].extend([begin + row] * columns)
                axes[2].extend(range(begin, begin + columns))
        following = begin + max(rows, columns)
    text(count)
    time_axis, row_axis, column_axis = (tuple(axis) for axis in axes)
    return Positions(time_axis, row_axis, column_axis, following - count)
