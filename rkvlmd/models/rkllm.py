"""What follows for a request from a model of the RKLLM engine; known before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
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


#: More tokens than any vocabulary has: there, "off" is a limit that never bites.
ALL_TOKENS = 1 << 20
#: Temperatures below this are greedy, as on the CPU engine (``engine.sampling``).
GREEDY_BELOW = 1e-4
#: Least ``top_p``, penalty that multiplies, and scale of an adapter: the library's floats have 32
#: bits, and what is much nearer to 0 would arrive as 0, which ends the process.
LEAST = 1e-6


class Terms(NamedTuple):
    """``Asked`` in numbers that the library's fields hold: int32 and float32."""

    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float


def terms(asked: Asked) -> Terms:
    """Return what the library gets of a request; ``temperature`` 0 is greedy."""
    return Terms(
        temperature=asked.temperature if asked.temperature >= GREEDY_BELOW else 0.0,
        top_k=asked.top_k if 0 < asked.top_k < ALL_TOKENS else ALL_TOKENS,
        top_p=max(asked.top_p, LEAST),
        repetition_penalty=max(asked.repetition_penalty, LEAST),
        frequency_penalty=_signed(asked.frequency_penalty),
        presence_penalty=_signed(asked.presence_penalty),
    )


def _signed(penalty: float) -> float:
    return penalty if abs(penalty) >= LEAST else 0.0


_FILTERS = ("temperature", "top_k", "top_p")
_PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")


def differences(asked: Asked, given: Asked) -> list[str]:
    """Return the sampling parameters that would change an answer from what ``given`` makes it."""
    new, old = terms(asked), terms(given)
    greedy = (new.temperature == 0, old.temperature == 0)
    if greedy == (True, True):
        names: tuple[str, ...] = ()
    elif greedy == (False, False):
        names = _FILTERS
    else:
        names = ("temperature",)
    return [n for n in (*names, *_PENALTIES) if getattr(new, n) != getattr(old, n)]


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
    if asked.min_p > 0 and asked.temperature >= GREEDY_BELOW:
        found.append("min_p")
    versions = manifest.decoder.runtime_versions
    fixed = bool(versions) and all(v.startswith("1.2") for v in versions)
    if not info.get("sampling_per_request", not fixed):
        found += differences(asked, manifest.defaults)
    return found
