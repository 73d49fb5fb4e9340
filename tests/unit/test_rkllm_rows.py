"""The rows of a picture on their way from the memory file to the library."""

from __future__ import annotations

import os

import pytest

np = pytest.importorskip("numpy")

from rkvlmd.engine import memfd, rkllm_inputs  # noqa: E402
from rkvlmd.engine.rkllm_session import ImageTags  # noqa: E402


def stack(*rows: np.ndarray) -> rkllm_inputs.Block:
    return rkllm_inputs.stack(rows, tokens=3, row=8, width=32, height=32, tags=ImageTags())


def test_one_picture_is_not_copied() -> None:
    fd, tensor = memfd.from_array(np.arange(24, dtype=np.float32).reshape(3, 8))
    try:
        rows = memfd.map_array(fd, tensor, own=True)
        block = stack(rows)
        assert block.rows.shape == (1, 3, 8)
        assert np.shares_memory(block.rows, rows)
        # A library that writes changes neither the file nor what others read.
        block.rows[:] = -1
        assert memfd.map_array(fd, tensor)[0, 1] == 1
    finally:
        os.close(fd)


def test_what_may_not_be_written_is_copied() -> None:
    fd, tensor = memfd.from_array(np.ones((3, 8), np.float32))
    try:
        rows = memfd.map_array(fd, tensor)
        assert not np.shares_memory(stack(rows).rows, rows)
    finally:
        os.close(fd)


def test_several_pictures_lie_one_after_the_other() -> None:
    rows = [np.full((3, 8), number, np.float32) for number in (1, 2)]
    block = stack(*rows)
    assert block.rows.shape == (2, 3, 8)
    assert [part[0, 0] for part in block.rows] == [1, 2]
    assert block.rows.flags.c_contiguous
