"""Several caches of one decoder: which one a prompt gets, and which ones leave."""

from __future__ import annotations

import random

from rkvlmd.engine.conversations import MOST, Conversations
from rkvlmd.engine.kv import common_prefix


class FakeCache:
    """Holds its places itself, so that a record that is wrong shows."""

    def __init__(self, places: list[int] | None = None) -> None:
        self.places = places or []
        self.peak = len(self.places)

    @property
    def places_held(self) -> int:
        return max(self.peak, len(self.places))

    def truncate(self, length: int) -> None:
        self.peak = self.places_held
        del self.places[length:]

    def fork(self, length: int) -> FakeCache:
        return FakeCache(self.places[:length])


def make(budget: int) -> Conversations[FakeCache]:
    return Conversations(FakeCache(), bytes_per_place=10, budget=budget)


def run(
    kept: Conversations[FakeCache], prompt: list[int], answer: int = 2
) -> tuple[int, list[int]]:
    """Do what a decoder does; return how much of the prompt was cached, and who was forgotten."""
    forgot = kept.take(prompt)
    one = kept.current
    cached = min(common_prefix(one.record, prompt), len(prompt) - 1)
    one.cache.truncate(cached)
    del one.record[cached:]
    new = [*prompt[cached:], *(90 + i for i in range(answer))]
    one.cache.places += new
    one.record += new
    assert one.cache.places == one.record
    return cached, forgot


def test_without_a_budget_there_is_one() -> None:
    kept = make(0)
    assert run(kept, [1, 2, 3, 4]) == (0, [])
    assert run(kept, [7, 8, 9]) == (0, [])
    assert run(kept, [1, 2, 3, 4]) == (0, [])
    assert len(kept) == 1


def test_conversations_in_turn_keep_their_beginnings() -> None:
    kept = make(10_000)
    turns = {n: [n * 10 + i for i in range(8)] for n in (1, 2, 3)}
    for number, prompt in turns.items():
        assert run(kept, prompt) == (0, [])
        turns[number] = [*prompt, 90, 91, 5]
    for _ in range(3):
        for number, prompt in turns.items():
            # What the answer's end and the new turn added, and nothing else.
            assert run(kept, prompt)[0] == len(prompt) - 1
            turns[number] = [*prompt, 90, 91, 6]
    assert len(kept) == 3


def test_the_shared_beginning_is_copied_and_both_live_on() -> None:
    kept = make(10_000)
    run(kept, [1, 2, *range(10, 20)])
    first = kept.current
    assert run(kept, [1, 2, *range(30, 40)])[0] == 2
    assert first.record[:4] == [1, 2, 10, 11]
    assert run(kept, [1, 2, *range(10, 20), 90, 91, 3])[0] == 14
    assert kept.current is first


def test_another_answer_to_the_same_prompt_takes_the_same_cache() -> None:
    kept = make(10_000)
    run(kept, list(range(20)))
    assert run(kept, list(range(20)))[0] == 19
    assert len(kept) == 1


def test_the_least_recently_used_leaves_and_is_told() -> None:
    kept = make(250)  # 25 places besides the current one
    for n in (1, 2, 3):
        run(kept, [n * 100 + i for i in range(8)])  # 10 places each
    assert len(kept) == 3
    cached, forgot = run(kept, [400 + i for i in range(8)])
    assert (cached, forgot) == (0, [0])
    assert kept.kept_bytes <= 250
    assert run(kept, [200 + i for i in range(8)])[0] == 7
    assert run(kept, [100 + i for i in range(8)])[0] == 0


def test_one_that_is_larger_than_the_budget_is_cut_back() -> None:
    kept = make(50)
    run(kept, list(range(20)))
    assert run(kept, [*range(3), 77, 78])[0] == 3
    assert len(kept) == 1


def test_an_error_forgets_the_current_one_alone() -> None:
    kept = make(10_000)
    run(kept, [1, 2, 3, 4])
    run(kept, [7, 8, 9, 10])
    kept.clear()
    assert run(kept, [1, 2, 3, 4, 90, 91, 5])[0] == 6


def test_the_budget_and_the_number_hold_whatever_comes() -> None:
    rng = random.Random(5)
    for budget in (0, 300, 2_000, 1 << 30):
        kept = make(budget)
        alive = {0}
        for _ in range(400):
            start = rng.randrange(100)
            prompt = [start, *(rng.randrange(3) for _ in range(rng.randrange(1, 30)))]
            _, forgot = run(kept, prompt, rng.randrange(4))
            alive = (alive | {kept.current.number}) - set(forgot)
            assert kept.kept_bytes <= budget
            assert len(kept) == len(alive) <= MOST
