from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from rkvlmd.engine.stops import StopMatcher

LETTERS = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", max_size=5), max_size=4)


def cut(stops: list[str], pieces: list[str]) -> tuple[str, bool, list[str]]:
    matcher = StopMatcher(stops)
    parts = [matcher.feed(piece) for piece in pieces]
    parts.append(matcher.finish())
    return "".join(parts), matcher.stopped, parts


@given(STOPS, st.lists(st.text("abc", max_size=4), max_size=12))
@example(["abc", "b"], ["a", "b", "c"])
@example(["abc", "b"], ["a", "b", "d"])
@example(["aab"], ["aa", "aab"])
def test_any_cut_gives_the_text_before_the_earliest_stop_string(
    stops: list[str], pieces: list[str]
) -> None:
    text = "".join(pieces)
    places = [text.find(s) for s in stops if s and s in text]
    found, stopped, _ = cut(stops, pieces)
    assert found == (text[: min(places)] if places else text)
    assert stopped == bool(places)


@given(STOPS, LETTERS)
def test_only_what_may_begin_a_stop_string_is_held_back(stops: list[str], text: str) -> None:
    matcher = StopMatcher(stops)
    given_out = ""
    for i, letter in enumerate(text):
        given_out += matcher.feed(letter)
        if matcher.stopped:
            return
        held = text[len(given_out) : i + 1]
        # No letter more, no letter less: the longest end that begins a stop string.
        ends = [text[at : i + 1] for at in range(i + 2)]
        assert held == next(end for end in ends if any(s.startswith(end) for s in [*stops, ""]))


def test_stops_in_the_middle_of_a_piece_and_says_nothing_more() -> None:
    matcher = StopMatcher(["STOP"])
    assert matcher.feed("one ST") == "one "
    assert not matcher.stopped
    assert matcher.feed("OP two") == ""
    assert matcher.stopped
    assert matcher.feed("three") == ""
    assert matcher.finish() == ""


def test_empty_stop_strings_are_ignored() -> None:
    assert cut(["", ""], ["a", "b"]) == ("ab", False, ["a", "b", ""])


def test_held_text_comes_out_at_the_end() -> None:
    assert cut(["\n\n"], ["a\n"]) == ("a\n", False, ["a", "\n"])


def test_a_match_that_waited_for_an_earlier_one_counts_at_the_end() -> None:
    assert cut(["abcd", "b"], ["abc"]) == ("a", True, ["", "a"])
