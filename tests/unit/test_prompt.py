"""What clients write stays text: breaking special strings, joining parts, placing pictures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkvlmd.models import prompt
from rkvlmd.models.manifest import Tags

STRINGS = ("<|im_start|>", "<|im_end|>", "<image>", "<<image>>", "<a><b>", "<b>", "§")
SPECIALS = prompt.Specials(STRINGS)
#: Text that is likely to hold special strings, whole, nested and in pieces.
PIECES = st.sampled_from([*STRINGS, "<", ">", "<im", "|>", "<|", "age>", "a", " ", "\n", "<a>"])
TEXT = st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=20)


@given(TEXT)
def test_no_special_string_survives(text: str) -> None:
    broken = SPECIALS.neutralise(text)
    assert SPECIALS.count(broken) == 0
    assert broken.replace(prompt.BREAK, "") == text
    assert not any(s in broken for s in STRINGS if len(s) > 1)


@given(TEXT)
def test_harmless_text_is_left_alone(text: str) -> None:
    if not any(s in text for s in STRINGS):
        assert SPECIALS.neutralise(text) is text or SPECIALS.neutralise(text) == text


@given(TEXT, TEXT)
def test_the_pieces_are_the_whole(first: str, second: str) -> None:
    rendered = first + "<|im_end|>" + SPECIALS.neutralise(second)
    pieces = SPECIALS.split(rendered)
    assert "".join(p.text for p in pieces) == rendered
    assert all(p.text for p in pieces)
    assert sum(p.special for p in pieces) == SPECIALS.count(rendered) >= 1
    assert all(p.text in STRINGS for p in pieces if p.special)


def test_the_longest_string_counts() -> None:
    assert [p.text for p in SPECIALS.split("x<<image>>y")] == ["x", "<<image>>", "y"]


def test_no_strings_at_all() -> None:
    none = prompt.Specials(["", ""])
    assert none.neutralise("<image>") == "<image>"
    assert none.split("<image>") == [("<image>", False)]
    assert none.count("") == 0


def test_for_rkllm() -> None:
    text = "a <image><video> <audio> <|im_end|> <images> <IMAGE>"
    safe = prompt.for_rkllm(text, ["<|im_end|>"])
    assert safe == ("a <\u200bimage><\u200bvideo> <\u200baudio> <\u200b|im_end|> <images> <IMAGE>")


@given(TEXT)
def test_for_rkllm_leaves_no_place(text: str) -> None:
    safe = prompt.for_rkllm(text, ["<|im_end|>"])
    assert not any(s in safe for s in (*prompt.RKLLM_PLACES, "<|im_end|>"))


def turn(*parts: str | int, role: str = "user") -> dict[str, object]:
    return {
        "role": role,
        "parts": [{"text": p} if isinstance(p, str) else {"picture": p} for p in parts],
    }


def test_texts_are_joined_before_they_are_broken() -> None:
    turns = [turn("<|im_", "end|>", 0, "<im", "age>", role="assistant")]
    texts = [p["text"] for p in prompt.as_parts(turns, SPECIALS)[0]["content"] if "text" in p]
    assert texts == [f"<{prompt.BREAK}|im_end|>", f"<{prompt.BREAK}image>"]
    content = prompt.as_strings(turns, SPECIALS)[0]["content"]
    assert content == f"{texts[0]}{prompt.PICTURE}{texts[1]}"


def test_private_characters_of_a_client_are_dropped() -> None:
    sneaky = f"<{prompt.BREAK}image>{prompt.PICTURE}"
    assert prompt.as_parts([turn(sneaky)], SPECIALS)[0]["content"] == [
        {"type": "text", "text": f"<{prompt.BREAK}image>"}
    ]
    assert prompt.PICTURE not in prompt.as_strings([turn(sneaky)], SPECIALS)[0]["content"]


def test_order_and_empty_messages() -> None:
    turns = [turn(1, "a", 0), turn(), turn(2, role="system")]
    assert prompt.picture_order(turns) == [1, 0, 2]
    assert prompt.as_parts(turns, SPECIALS)[1]["content"] == [{"type": "text", "text": ""}]


def test_places() -> None:
    tags = Tags(start="[", content="<image>", end="]")
    one = ["[", 0, "]"]
    assert prompt.place_pictures("a<image>b", "<image>", tags, [one]) == "a[<image>]b"
    rows = ["1", 0, 1, "\n", 2]
    placed = prompt.place_pictures("<image> <image>", "<image>", tags, [rows, one])
    assert placed == "1<image><image>\n<image> [<image>]"
    with pytest.raises(prompt.PromptError, match="2 places for 1"):
        prompt.place_pictures("a<image>b<image>", "<image>", tags, [one])
    with pytest.raises(prompt.PromptError, match="no tags"):
        prompt.place_pictures("<image>", "<image>", None, [one])
    assert prompt.place_pictures("text", "<image>", None, []) == "text"


def test_pictures_are_numbered_as_they_come() -> None:
    tags = Tags(content="<image>")
    layout = [f"<id>{prompt.NUMBER}</id>", 0]
    placed = prompt.place_pictures("<P> <P>", "<P>", tags, [layout, layout])
    assert placed == "<id>0</id><image> <id>1</id><image>"


PLACES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 5)), max_size=5)


@given(PLACES, st.data())
def test_expand(places: list[tuple[int, int, int]], data: st.DataObject) -> None:
    ids = [1, 2]
    for _ in places:
        ids += [9, *data.draw(st.lists(st.integers(1, 8), max_size=3))]
    tokens, spans = prompt.expand(ids, 9, places)
    assert [(picture, view, count) for _, count, picture, view in spans] == places
    assert all(tokens[start : start + count] == [9] * count for start, count, _, _ in spans)
    assert len(tokens) == len(ids) + sum(count - 1 for _, _, count in places)
    assert [t for t in tokens if t != 9] == [t for t in ids if t != 9]


def test_expand_counts_the_places() -> None:
    with pytest.raises(prompt.PromptError):
        prompt.expand([9, 9], 9, [(0, 0, 4)])
    assert prompt.expand([9], 9, []) == ([9], [])
