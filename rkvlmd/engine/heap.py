"""Freed memory that the C library keeps, given back to the system."""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Callable
from typing import cast


def give_back() -> None:
    """Return freed memory after much garbage: imports, a model's load.

    They leave some 0.5 MB in each process, and cycles that wait for the
    collector. Takes some 10 ms. What is left stays for good, so the collector
    need not look at it again: that would take 3 ms, whenever it likes.
    """
    gc.collect()
    gc.freeze()
    # The collector comes for old garbage when there is a quarter as much of it as of what was left
    # the last time, so it is told that nothing was: else some 0.5 MB would gather in an hour.
    gc.collect()
    trim()


def trim() -> None:
    """Return freed memory after some work; takes 0.1 ms, more where more is freed.

    Scratch memory of a picture is 0.5 MB, that of reading a vocabulary of
    150,000 tokens 9 MB. Nothing happens where the C library is not glibc.
    """
    _malloc_trim()(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int]:
    # malloc_trim(3): also gives back pages in the middle of each arena.
    found = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return cast("Callable[[int], int]", found) if found is not None else (lambda _pad: 0)
