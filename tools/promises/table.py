"""Promises of the queue, caches, residency and libraries, and for each a change that breaks it."""

from __future__ import annotations

from tools.promises.change import Break
from tools.promises.kept import CACHES, RESIDENCY
from tools.promises.library import LIBRARY
from tools.promises.queueing import ADMISSION, ORDER

__all__ = ["ALL", "Break"]

ALL = (*ADMISSION, *ORDER, *CACHES, *RESIDENCY, *LIBRARY)
