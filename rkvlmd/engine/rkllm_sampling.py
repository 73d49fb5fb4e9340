"""Turns the sampling of a request into the terms of ``librkllmrt.so``."""

from __future__ import annotations

from rkvlmd.engine.rkllm_session import Sampling
from rkvlmd.models.rkllm import Asked

#: More tokens than any vocabulary has: there, "off" is a limit that never bites.
ALL_TOKENS = 1 << 20


def convert(asked: Asked) -> Sampling:
    """Return the library's sampling.

    ``top_k`` 1 is deterministic whatever the runtime makes of a temperature
    of 0, so greedy is that, with the other filters off.
    """
    greedy = asked.temperature <= 0
    return Sampling(
        top_k=1 if greedy else asked.top_k or ALL_TOKENS,
        top_p=1.0 if greedy else asked.top_p,
        temperature=1.0 if greedy else asked.temperature,
        repeat_penalty=asked.repetition_penalty,
        frequency_penalty=asked.frequency_penalty,
        presence_penalty=asked.presence_penalty,
    )
