"""Arrays as the library takes them."""

from __future__ import annotations

import ctypes
import gc

import pytest

np = pytest.importorskip("numpy")

from rkvlmd.engine import rkllm_types as types  # noqa: E402


def test_a_pointer_leaves_nothing_for_the_collector() -> None:
    """One is made for each run: nobody collects what refers to itself for a long time."""
    array = np.arange(8, dtype=np.float32)
    types.pointer(array, types.Floats)
    gc.collect()
    gc.disable()
    try:
        found = [types.pointer(array, types.Floats) for _ in range(10)][-1]
        assert ctypes.addressof(found.contents) == array.ctypes.data
        assert found[7] == 7.0
        del found
        assert gc.collect() == 0
    finally:
        gc.enable()
