from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkvlmd.engine import sampling
from rkvlmd.errors import RkvlmdError
from rkvlmd.wire.child import Generate


def order(**fields: Any) -> Generate:
    return Generate(id=1, tokens=[0], max_tokens=1, **fields)


def logits(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def shape(values: np.ndarray, **fields: Any) -> tuple[list[int], list[float]]:
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | fields
    ids, weights = sampling.candidates(values, **plain)
    return ids.tolist(), weights.tolist()


def test_greedy_takes_the_best_and_the_first_of_equals() -> None:
    assert sampling.Sampler(order(), []).pick(logits(1, 5, 5, 2)) == 1


def test_temperature_zero_ignores_the_seed_and_top_k_one_is_greedy() -> None:
    for seed in range(20):
        assert sampling.Sampler(order(seed=seed), []).pick(logits(1, 2, 1.9)) == 1
        hot = order(seed=seed, temperature=2.0, top_k=1)
        assert sampling.Sampler(hot, []).pick(logits(1, 2, 1.9)) == 1


@pytest.mark.parametrize("bad", [[np.nan, 1.0], [np.inf, 1.0], [-np.inf, -np.inf]])
def test_logits_that_are_no_numbers_are_an_engine_error(bad: list[float]) -> None:
    with pytest.raises(RkvlmdError) as caught:
        sampling.Sampler(order(), []).pick(logits(*bad))
    assert caught.value.code == "engine_error"


def test_same_seed_same_tokens_and_other_seeds_differ() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(30, 50)).astype(np.float32)

    def tokens(seed: int | None) -> list[int]:
        sampler = sampling.Sampler(order(seed=seed, temperature=1.0), [])
        return [sampler.pick(row) for row in rows]

    assert tokens(3) == tokens(3)
    assert len({tuple(tokens(s)) for s in (0, 1, 2, -1, 2**70, None)}) == 6


def test_without_a_seed_two_answers_differ() -> None:
    flat = np.zeros(1000, np.float32)
    picks = [
        [sampler.pick(flat) for _ in range(8)]
        for sampler in (sampling.Sampler(order(temperature=1.0), []) for _ in range(2))
    ]
    assert picks[0] != picks[1]


def test_repetition_penalty_counts_prompt_and_answer_as_transformers_does() -> None:
    out = sampling.penalise(
        logits(2, -2, 4), {0, 1, 99}, {}, repetition=2.0, frequency=0, presence=0
    )
    assert out.tolist() == [1, -4, 4]


@pytest.mark.parametrize("penalty", [1e-300, 1e-40])
def test_a_penalty_of_nearly_nothing_leaves_numbers(penalty: float) -> None:
    seen = [1, 2]
    values = logits(30.0, 1.0, 2.0, -4.0)
    for temperature in (0.0, 1.0):
        asked = Generate(
            id=1, tokens=seen, max_tokens=9, repetition_penalty=penalty, temperature=temperature
        )
        sampler = sampling.Sampler(asked, seen)
        assert [sampler.pick(values) for _ in range(4)] == [2] * 4


def test_frequency_and_presence_count_the_answer_alone() -> None:
    out = sampling.penalise(
        logits(2, 2, 2), {0, 1, 2}, {1: 3, 2: 1}, repetition=1.0, frequency=0.5, presence=0.25
    )
    assert out.tolist() == [2, 0.25, 1.25]


def test_penalties_do_not_change_the_logits_that_they_get() -> None:
    values = logits(2, 1)
    sampler = sampling.Sampler(order(frequency_penalty=2.0, presence_penalty=1.0), [])
    assert [sampler.pick(values) for _ in range(3)] == [0, 1, 0]
    assert values.tolist() == [2, 1]


def test_temperature_divides() -> None:
    _, cold = shape(logits(1, 0), temperature=0.5)
    assert cold[0] == pytest.approx(1 / (1 + np.exp(-2)))


def test_top_k_keeps_the_smaller_ids_of_equals() -> None:
    assert shape(logits(1, 3, 1, 1, 2), top_k=3)[0] == [1, 4, 0]
    assert shape(logits(0, 0, 0, 0), top_k=2)[0] == [0, 1]
    assert shape(logits(0, 1), top_k=9)[0] == [0, 1]


def test_top_p_keeps_up_to_the_token_that_reaches_it() -> None:
    values = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    assert shape(values, top_p=0.5)[0] == [1]
    assert shape(values, top_p=0.6)[0] == [1, 3]
    assert shape(values, top_p=0.76)[0] == [1, 3, 2]
    assert shape(values, top_p=1e-9)[0] == [1]


def test_min_p_is_a_share_of_the_best() -> None:
    values = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    assert sorted(shape(values, min_p=0.4)[0]) == [1, 3]
    assert shape(values, min_p=1.0)[0] == [1]


@given(
    # Steps of 1/64: what is not the same differs by more than rounding.
    st.lists(st.integers(-1920, 1920).map(lambda n: n / 64), min_size=1, max_size=40),
    st.floats(0.05, 2),
    st.integers(0, 45),
    st.floats(0.01, 1),
    st.floats(0, 1),
)
def test_candidates_are_the_plain_definition(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    array = np.array(values, np.float32)
    ids, weights = shape(array, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    scaled = array.astype(np.float64) / temperature
    rank = sorted(range(array.size), key=lambda i: (-scaled[i], i))
    kept = rank[:top_k] if top_k else rank
    share = np.exp(scaled[kept] - scaled[kept].max())
    share /= share.sum()
    if top_p < 1:
        sums = np.cumsum(share)
        kept = kept[: int(np.searchsorted(sums, top_p)) + 1]
        share = share[: len(kept)]
    kept = [i for i, w in zip(kept, share, strict=True) if w >= min_p * share[0]]
    # Sums of floats in another order may put the border one token further.
    assert set(ids) ^ set(kept) <= {*kept[-1:], *ids[-1:]}
    assert rank[0] in ids
    assert sum(weights) == pytest.approx(1)
    assert len(set(ids)) == len(ids)


def test_draw_follows_the_probabilities_and_stays_inside() -> None:
    ids, weights = np.array([7, 8, 9]), np.array([0.2, 0.5, 0.3])
    assert [sampling.draw(ids, weights, at) for at in (0.0, 0.19, 0.21, 0.69, 0.71)] == [
        7,
        7,
        8,
        8,
        9,
    ]
    assert sampling.draw(ids, weights, 1.0 - 2**-53) == 9


def test_sampling_follows_the_distribution() -> None:
    sampler = sampling.Sampler(order(seed=1, temperature=1.0), [])
    row = np.log(np.array([0.1, 0.6, 0.3], np.float32))
    counts = np.bincount([sampler.pick(row) for _ in range(4000)], minlength=3) / 4000
    assert np.abs(counts - [0.1, 0.6, 0.3]).max() < 0.03
