"""Families of models: the little that a manifest cannot say, as data and pure functions."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache

#: Every family; each is the module of the same name, with ``FAMILY`` in it.
NAMES = ("smolvlm",)


@dataclass(frozen=True, slots=True)
class Family:
    """``template`` is the Jinja chat template of models that bring none, or empty."""

    name: str
    template: str = ""


def known() -> frozenset[str]:
    """Return the names that a manifest may give as ``family``."""
    return frozenset(NAMES)


@cache
def get(name: str) -> Family:
    """Return a family.

    Raises:
      KeyError: there is no such family.

    """
    if name not in NAMES:
        raise KeyError(name)
    family: Family = importlib.import_module(f"{__name__}.{name}").FAMILY
    return family
