"""Turns the sampling of a request into the terms of ``librkllmrt.so``."""

from __future__ import annotations

from rkvlmd.engine.rkllm_session import Sampling
from rkvlmd.models.rkllm import Asked, terms


def convert(asked: Asked) -> Sampling:
    """Return the library's sampling, within the ranges of its fields.

    ``top_k`` 1 is deterministic whatever the runtime makes of a temperature
    of 0, so greedy is that, with the other filters off.
    """
    found = terms(asked)
    greedy = found.temperature == 0
    return Sampling(
        top_k=1 if greedy else found.top_k,
        top_p=1.0 if greedy else found.top_p,
        temperature=1.0 if greedy else found.temperature,
        repeat_penalty=found.repetition_penalty,
        frequency_penalty=found.frequency_penalty,
        presence_penalty=found.presence_penalty,
    )
