"""Chooses the next token from logits: penalties, temperature, top_k, top_p, min_p, seed."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rkvlmd.errors import RkvlmdError
from rkvlmd.wire.child import Generate

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
#: Temperatures below this choose the best token: dividing by less overflows float32.
GREEDY_BELOW = 1e-4
#: Least repetition penalty: dividing by less overflows float32, too.
LEAST = 1e-6


class Sampler:
    """The choices of one answer.

    ``logits`` are float32 of shape (vocabulary,). The order of the steps is
    penalties, temperature, top_k, top_p, min_p; among equals the smaller id is
    the better one, so the same logits and seed give the same tokens.
    """

    def __init__(self, order: Generate, prompt: Sequence[int]) -> None:
        self._order = order
        self._counts: dict[int, int] = {}
        self._seen = set(prompt)
        seed = order.seed
        self._random = np.random.Generator(
            np.random.PCG64(int.from_bytes(os.urandom(16)) if seed is None else seed % 2**128)
        )

    def pick(self, logits: Floats) -> int:
        """Return the next token and remember it for the penalties.

        Raises:
          RkvlmdError: ``engine_error`` when the best logit is not a finite number.

        """
        if not np.isfinite(logits.max()):
            raise RkvlmdError("engine_error", "The model's output is not a number.")
        order = self._order
        logits = penalise(
            logits,
            self._seen,
            self._counts,
            repetition=order.repetition_penalty,
            frequency=order.frequency_penalty,
            presence=order.presence_penalty,
        )
        if order.temperature < GREEDY_BELOW or order.top_k == 1:
            token = int(np.argmax(logits))
        else:
            ids, weights = candidates(
                logits,
                temperature=order.temperature,
                top_k=order.top_k,
                top_p=order.top_p,
                min_p=order.min_p,
            )
            token = draw(ids, weights, self._random.random())
        self._seen.add(token)
        self._counts[token] = self._counts.get(token, 0) + 1
        return token


def penalise(
    logits: Floats,
    seen: set[int],
    counts: dict[int, int],
    *,
    repetition: float,
    frequency: float,
    presence: float,
) -> Floats:
    """Return logits with the penalties; the same array where there are none.

    ``repetition`` divides the positive and multiplies the negative logits of
    every token of prompt and answer (``seen``), as transformers does it.
    ``frequency`` is taken once per time that the answer has the token,
    ``presence`` once (``counts``), as the OpenAI API does it.
    """
    repeats = repetition != 1.0 and seen
    if not repeats and not (counts and (frequency or presence)):
        return logits
    out = logits.copy()
    if repeats:
        repetition = max(repetition, LEAST)
        ids = np.fromiter(seen, np.int64, len(seen))
        ids = ids[ids < out.size]
        values = out[ids]
        out[ids] = np.where(values > 0, values / repetition, values * repetition)
    if counts and (frequency or presence):
        ids = np.fromiter(counts.keys(), np.int64, len(counts))
        times = np.fromiter(counts.values(), np.float32, len(counts))
        out[ids] -= frequency * times + presence
    return out


def candidates(
    logits: Floats, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Ids, Doubles]:
    """Return the tokens that may be chosen and their probabilities (sum 1), best first.

    ``top_k`` 0 keeps all. ``top_p`` keeps the best tokens up to the first that
    reaches it in sum. ``min_p`` keeps tokens of at least this share of the best
    one's probability. The best token always stays. Where nothing is left out,
    the order is by id.
    """
    ids: Ids = np.arange(logits.size, dtype=np.int64)
    scaled = logits.astype(np.float64) / temperature
    if 0 < top_k < scaled.size:
        # Fewer to sort: all tokens that are at least as good as the k-th.
        least = np.partition(scaled, scaled.size - top_k)[scaled.size - top_k]
        ids = np.flatnonzero(scaled >= least)
        ids = ids[_best_first(scaled[ids])][:top_k]
        scaled = scaled[ids]
    weights = np.exp(scaled - scaled.max())
    weights /= weights.sum()
    if top_p < 1.0:
        # Tokens below this share have less than 1 - top_p in sum: the kept ones are above it.
        above = weights > (1.0 - top_p) / (2 * weights.size)
        ids, weights = ids[above], weights[above]
        rank = _best_first(weights)
        ids, weights = ids[rank], weights[rank]
        keep = int(np.searchsorted(np.cumsum(weights), top_p)) + 1
        ids, weights = ids[:keep], weights[:keep]
        weights /= weights.sum()
    if min_p > 0.0:
        above = weights >= min_p * weights.max()
        ids, weights = ids[above], weights[above]
        weights /= weights.sum()
    return ids, weights


def draw(ids: Ids, weights: Doubles, at: float) -> int:
    """Return the token at ``at`` (0 <= at < 1) of the summed probabilities."""
    sums = np.cumsum(weights)
    place = int(np.searchsorted(sums, at * sums[-1], side="right"))
    return int(ids[min(place, ids.size - 1)])


def _best_first(values: Doubles) -> Ids:
    return np.argsort(-values, kind="stable")
