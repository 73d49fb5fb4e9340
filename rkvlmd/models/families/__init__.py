"""Families of models: the little that a manifest cannot say, as data and pure functions."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rkvlmd.models.geometry import Cuts
    from rkvlmd.models.manifest import Tags

#: Every family; each is the module of the same name, with ``FAMILY`` in it.
NAMES = (
    "clip",
    "deepseek_ocr",
    "fastvlm",
    "gemma3",
    "gemma3n",
    "gemma4",
    "idefics3",
    "internvl",
    "janus",
    "llava",
    "minicpmv",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3",
    "qwen3_5",
    "qwen3_vl",
    "smolvlm",
)

Layout = Callable[["Tags", "Cuts"], Sequence[str | int]]
#: ``run``: one run of tokens, with a time axis in its positions; the pixel budget is that of one
#: frame. ``timed``: tags around each patch in time, and its time in words before them; the budget
#: is that of all frames.
Film = Literal["run", "timed"]


def one_run(tags: Tags, cuts: Cuts) -> list[str | int]:
    """Return the tags of a picture around all its views, one after the other."""
    return [tags.start, *range(len(cuts.cuts)), tags.end]


@dataclass(frozen=True, slots=True)
class Family:
    """``template`` is the Jinja chat template of models that bring none, or empty.

    ``layout`` says what stands at a picture's place: strings, and indices of
    its views. ``film`` says how a video is laid out whose frames become patches
    together (``models.films``).
    """

    name: str
    template: str = ""
    layout: Layout = one_run
    film: Film | None = None


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
