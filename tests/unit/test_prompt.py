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
    assert prompt.place_pictures("a<image>b", "<image>", 1, tags) == "a[<image>]b"
    with pytest.raises(prompt.PromptError, match="2 places for 1"):
        prompt.place_pictures("a<image>b<image>", "<image>", 1, tags)
    with pytest.raises(prompt.PromptError, match="no tags"):
        prompt.place_pictures("<image>", "<image>", 1, None)
    assert prompt.place_pictures("text", "<image>", 0, None) == "text"


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_expand(counts: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(counts))))
    ids = [1, 2]
    for _ in order:
        ids += [9, *data.draw(st.lists(st.integers(1, 8), max_size=3))]
    tokens, spans = prompt.expand(ids, 9, order, counts)
    assert [index for _, _, index in spans] == order
    assert all(tokens[s : s + n] == [9] * counts[i] and n == counts[i] for s, n, i in spans)
    assert len(tokens) == len(ids) - len(order) + sum(counts)
    assert [t for t in tokens if t != 9] == [t for t in ids if t != 9]


def test_expand_counts_the_places() -> None:
    with pytest.raises(prompt.PromptError):
        prompt.expand([9, 9], 9, [0], [4])
    assert prompt.expand([9], 9, [], []) == ([9], [])
