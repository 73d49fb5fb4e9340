"""A change that breaks a promise, and the tests that must notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Break:
    """``old`` stands once in ``file`` (below ``rkvlmd/``); with ``new`` ``tests`` must fail."""

    promise: str
    file: str
    old: str
    new: str
    tests: str
