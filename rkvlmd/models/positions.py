"""Rotary positions of a prompt with pictures in it: integers alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

#: Frames, rows and columns, in tokens.
Grid = tuple[int, int, int]


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


def mrope(count: int, spans: Iterable[tuple[int, int, Grid | None]]) -> Positions:
    """Return the positions of ``count`` places with pictures in them, as Qwen-VL has them.

    ``spans`` are (start, places, grid) in the order of the prompt; a grid of
    ``None`` counts on like text. A picture's places have the position where it
    starts plus their frame, row and column; what follows starts after the
    larger of rows and columns (transformers 5, ``Qwen2VLModel.get_rope_index``;
    before version 5 frames counted too: the same for one frame).

    Raises:
      ValueError: spans overlap, leave the prompt, or differ from their grid.

    """
    axes: tuple[list[int], list[int], list[int]] = ([], [], [])
    following = 0

    def text(until: int) -> None:
        nonlocal following
        places = range(following, following + until - len(axes[0]))
        for axis in axes:
            axis.extend(places)
        following += len(places)

    for start, places, grid in spans:
        if start < len(axes[0]) or start + places > count:
            raise ValueError("a picture's places overlap another's or leave the prompt")
        text(start)
        if grid is None:
            text(start + places)
            continue
        frames, rows, columns = grid
        if frames * rows * columns != places or min(grid) < 1:
            raise ValueError("a picture's grid differs from its places")
        for frame in range(frames):
            for row in range(rows):
                axes[0].extend([following + frame] * columns)
                axes[1].extend([following + row] * columns)
                axes[2].extend(range(following, following + columns))
        following += max(rows, columns)
    text(count)
    time, row_axis, column_axis = (tuple(axis) for axis in axes)
    return Positions(time, row_axis, column_axis, following - count)
