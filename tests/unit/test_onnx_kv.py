"""What of a cache a new prompt keeps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rkvlmd.engine import kv
from rkvlmd.wire.child import Span

TOKENS = st.lists(st.integers(0, 2), max_size=12)


def places(tokens: list[int], **keys: int) -> list[kv.Place]:
    """Two image tokens a picture, from the place that its key names."""
    return kv.places(tokens, [Span(start=at, count=2, key=k) for k, at in keys.items()])


@given(TOKENS, TOKENS)
def test_common_prefix_is_the_plain_definition(first: list[int], second: list[int]) -> None:
    count = 0
    while count < min(len(first), len(second)) and first[count] == second[count]:
        count += 1
    assert kv.common_prefix(first, second) == count


def test_pictures_with_the_same_tokens_are_told_apart_by_their_key() -> None:
    one, other = places([1, 9, 9, 2], a=1), places([1, 9, 9, 2], b=1)
    assert kv.common_prefix(one, one) == 4
    assert kv.common_prefix(one, other) == 1


def test_the_second_picture_may_differ() -> None:
    one = places([9, 9, 5, 9, 9, 6], a=0, b=3)
    assert kv.common_prefix(one, places([9, 9, 5, 9, 9, 6], a=0, c=3)) == 3
    assert kv.common_prefix(one, places([9, 9, 5, 9, 9, 6], b=0, a=3)) == 0


def test_a_picture_that_begins_elsewhere_is_not_the_same_rows() -> None:
    assert kv.common_prefix(places([9, 9, 9], a=0), places([9, 9, 9], a=1)) == 0


def test_the_last_place_is_always_computed_again() -> None:
    assert kv.reusable([1, 2, 3], [1, 2, 3]) == 2
    assert kv.reusable([1, 2, 3, 4], [1, 2, 3]) == 2
    assert kv.reusable([1, 2, 3], [1, 2, 3, 4]) == 3
    assert kv.reusable([], [1]) == 0
    assert kv.reusable([1], [1]) == 0
