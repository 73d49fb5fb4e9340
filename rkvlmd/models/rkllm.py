"""What follows for a request from a model of the RKLLM engine; known before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from rkvlmd.models.manifest import Manifest


class Asked(Protocol):
    """The sampling fields of ``wire.child.Generate`` and of a manifest's defaults."""

    @property
    def temperature(self) -> float:
        """0 is greedy."""

    @property
    def top_k(self) -> int:
        """0 is off."""

    @property
    def top_p(self) -> float:
        """1 is off."""

    @property
    def min_p(self) -> float:
        """0 is off; the library has no such thing."""

    @property
    def repetition_penalty(self) -> float:
        """1 is off."""

    @property
    def frequency_penalty(self) -> float:
        """0 is off."""

    @property
    def presence_penalty(self) -> float:
        """0 is off."""


_FILTERS = ("temperature", "top_k", "top_p")
_PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")


def differences(asked: Asked, given: Asked) -> list[str]:
    """Return the sampling parameters that would change an answer from what ``given`` makes it."""
    greedy = (asked.temperature <= 0, given.temperature <= 0)
    if greedy == (True, True):
        names: tuple[str, ...] = ()
    elif greedy == (False, False):
        names = _FILTERS
    else:
        names = ("temperature",)
    return [n for n in (*names, *_PENALTIES) if getattr(asked, n) != getattr(given, n)]


def without_effect(
    manifest: Manifest, asked: Asked, seed: int | None, info: Mapping[str, Any]
) -> list[str]:
    """Return the parameters of a request that this model's engine will not follow.

    The library takes no seed and no ``min_p``; before 1.3.0 it samples in one
    way alone. ``info`` is what the decoder said when it was loaded, empty
    while that is not known: then the manifest's versions count.
    """
    if manifest.decoder.engine != "rkllm":
        return []
    found = [] if seed is None else ["seed"]
    if asked.min_p > 0 and asked.temperature > 0:
        found.append("min_p")
    versions = manifest.decoder.runtime_versions
    fixed = bool(versions) and all(v.startswith("1.2") for v in versions)
    if not info.get("sampling_per_request", not fixed):
        found += differences(asked, manifest.defaults)
    return found
