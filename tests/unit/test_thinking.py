"""Thoughts are told from the answer, however the text is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkvlmd.engine.stops import StopMatcher
from rkvlmd.wire.thinking import Divider, Said, Splitter, Thinking

TAGS = Thinking(start="<think>", end="</think>")
OPENED = Thinking(start="<think>", end="</think>", opened=True)
BOTH = pytest.mark.parametrize("tags", [TAGS, OPENED], ids=["plain", "opened"])
#: Answers, and what they are: where the prompt has not opened thoughts, and where it has.
CASES = [
    ("yes", ("", "yes"), ("yes", "")),
    (" \n yes ", ("", " \n yes "), ("yes", "")),
    ("", ("", ""), ("", "")),
    ("\n", ("", "\n"), ("", "")),
    ("<think>hm</think>yes", ("hm", "yes"), ("hm", "yes")),
    ("<think>\nhm\n</think>\n\nyes\n", ("hm", "yes\n"), ("hm", "yes\n")),
    ("\n <think>a b\n\nc</think> d", ("a b\n\nc", "d"), ("a b\n\nc", "d")),
    ("<think>\n\n</think>\n\nyes", ("", "yes"), ("", "yes")),
    ("<think></think>", ("", ""), ("", "")),
    ("<think>hm, what if ", ("hm, what if", ""), ("hm, what if", "")),
    ("<think>hm</thi", ("hm</thi", ""), ("hm</thi", "")),
    ("<think>hm</thinker></think>x", ("hm</thinker>", "x"), ("hm</thinker>", "x")),
    ("<think", ("", "<think"), ("<think", "")),
    ("<thinking>x", ("", "<thinking>x"), ("<thinking>x", "")),
    ("a <think>b</think> c", ("", "a <think>b</think> c"), ("a <think>b", "c")),
    ("<think>a<think>b</think>c</think>d", ("a<think>b", "c</think>d"), ("a<think>b", "c</think>d")),
    ("hm</think>yes", ("", "hm</think>yes"), ("hm", "yes")),
    ("</think>\n\nyes", ("", "</think>\n\nyes"), ("", "yes")),
    ("<think>\u00e9\u4e2d</think>\U0001f600", ("\u00e9\u4e2d", "\U0001f600"), ("\u00e9\u4e2d", "\U0001f600")),
]  # fmt: skip


def split(tags: Thinking, pieces: list[str]) -> tuple[str, str]:
    splitter = Splitter(tags)
    said = [*(splitter.feed(piece) for piece in pieces), splitter.finish()]
    return "".join(s.thought for s in said), "".join(s.text for s in said)


@pytest.mark.parametrize(("text", "plain", "opened"), CASES)
def test_every_cut_gives_the_same(
    text: str, plain: tuple[str, str], opened: tuple[str, str]
) -> None:
    for tags, wanted in ((TAGS, plain), (OPENED, opened)):
        assert split(tags, [text]) == wanted
        assert split(tags, list(text)) == wanted
        for first in range(len(text) + 1):
            for second in range(first, len(text) + 1):
                pieces = [text[:first], text[first:second], text[second:]]
                assert split(tags, pieces) == wanted, pieces


WORDS = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "/", "think>", "</", "t", "\n", " ", "yes", "\u00e9"])
).map("".join)  # fmt: skip


def cut(text: str, at: list[int]) -> list[str]:
    ends = sorted({0, len(text), *(i % (len(text) + 1) for i in at)})
    return [text[a:b] for a, b in pairwise(ends)]


@BOTH
@given(text=WORDS, at=st.lists(st.integers(0, 99)))
def test_any_text_cut_anywhere(tags: Thinking, text: str, at: list[int]) -> None:
    pieces = cut(text, at)
    begins = tags.opened or text.lstrip().startswith("<think>")
    thought, text_of = "", text
    if begins:
        inside, _, rest = text.lstrip().removeprefix("<think>").partition("</think>")
        thought, text_of = inside.strip(), rest.lstrip()
    assert split(tags, pieces) == (thought, text_of)


@BOTH
@given(text=WORDS, at=st.lists(st.integers(0, 99)))
def test_dividing_loses_nothing(tags: Thinking, text: str, at: list[int]) -> None:
    divider = Divider(tags)
    said = [*(divider.feed(piece) for piece in cut(text, at)), divider.finish()]
    assert "".join(s.thought for s in said) + "".join(s.text for s in said) == text
    # Thoughts never come after text.
    assert not any(a.text and b.thought for a, b in pairwise(said))


def test_nothing_is_held_back_for_long() -> None:
    splitter = Splitter(TAGS)
    assert splitter.feed("<think>") == Said("", "")
    assert splitter.feed("one") == Said("one", "")
    assert splitter.feed(" <") == Said("", "")
    assert splitter.feed("b") == Said(" <b", "")
    assert splitter.feed("</think>two") == Said("", "two")
    assert splitter.feed("<think>") == Said("", "<think>")


def test_tokens_of_thoughts_are_counted_with_their_tags() -> None:
    for tags, pieces, wanted in (
        (TAGS, ["<think>", "\n", "a", " b", "</think>", "\n\n", "yes"], 6),
        (TAGS, ["<think>", "a", "</think>", "\n\nyes"], 3),
        (TAGS, ["<think>", "a", "</think>\nyes"], 3),
        (TAGS, ["<th", "ink>", "a", "</", "think>", "yes"], 5),
        (OPENED, ["a", " b", "</think>", "yes"], 3),
        (OPENED, ["\n"], 1),
        (TAGS, ["\n", "yes"], 0),
        (TAGS, ["<think", "er>"], 0),
        (TAGS, ["<think>", "a", "b"], 3),
    ):
        splitter = Splitter(tags)
        for piece in pieces:
            splitter.feed(piece)
        splitter.finish()
        assert splitter.tokens == wanted, pieces
    splitter = Splitter(OPENED)
    splitter.feed("several", 3)
    splitter.feed("", 0)
    assert splitter.tokens == 3


# --- stop strings are meant for the answer -----------------------------------------------


@pytest.mark.parametrize(("text", "plain", "opened"), CASES)
def test_stop_strings_stop_no_thoughts(
    text: str, plain: tuple[str, str], opened: tuple[str, str]
) -> None:
    del plain, opened
    for tags in (TAGS, OPENED):
        for stop in ("hm", "\n", "yes", "</think>", "<", "e"):
            divider = Divider(tags)
            inside = Divider.feed(divider, text).thought + divider.finish().thought
            answer, found, _ = text.removeprefix(inside).partition(stop)
            for pieces in ([text], list(text)):
                matcher = StopMatcher([stop], tags)
                out = "".join([*(matcher.feed(p) for p in pieces), matcher.finish()])
                assert (out, matcher.stopped) == (inside + answer, bool(found)), (stop, pieces)


def test_without_thoughts_stop_strings_stop_as_ever() -> None:
    matcher = StopMatcher(["hm"])
    assert matcher.feed("<think>hm") == "<think>"
    assert matcher.stopped
