"""Text out of tokens, for byte-level and other tokenizers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from rkvlmd.engine.detok import Detokenizer, Vocabulary
from tests.fakes import tiny_model

TEXTS = ["plain words", "größer, naïve", "你好世界", "🙂🙃 ok 🙂", " lead", "a\n\nb", "\ufffd x"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return Vocabulary(
        tiny_model.make_hf(tmp_path_factory.mktemp("hf"), layers=1) / "tokenizer.json"
    )


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """A tokenizer as Llama 2's: words start with U+2581, other characters are bytes."""
    words = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdelnoprsw"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={w: i for i, w in enumerate(words)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    path = tmp_path_factory.mktemp("sp") / "tokenizer.json"
    tokenizer.save(str(path))
    return Vocabulary(path)


@pytest.mark.parametrize("byte_level", [True, False])
def test_special_tokens_that_are_shown(
    byte_level: bool, tmp_path: Path, sentence_piece: Vocabulary
) -> None:
    # Tags of thoughts: some tokenizers call them special, and only they tell thoughts apart.
    if byte_level:
        path = tiny_model.make_hf(tmp_path, layers=1) / "tokenizer.json"
        tokenizer = Tokenizer.from_file(str(path))
    else:
        tokenizer = Tokenizer.from_str(sentence_piece.tokenizer.to_str())
    tokenizer.add_special_tokens([AddedToken("<think>", special=True, normalized=False)])
    tokenizer.save(str(tmp_path / "t.json"))
    ids = tokenizer.encode("b", add_special_tokens=False).ids
    ids = [*ids, tokenizer.token_to_id("<think>"), *ids]
    hidden, shown = (
        "".join(pieces(Vocabulary(tmp_path / "t.json", tags), ids))
        for tags in ((), ("<think>", "</think>"))
    )
    assert hidden.replace(" ", "") == "bb"
    assert shown.replace(" ", "") == "b<think>b"


def pieces(vocabulary: Vocabulary, ids: list[int]) -> list[str]:
    detok = Detokenizer(vocabulary)
    return [*(detok.step(i) for i in ids), detok.finish()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece"])
def test_pieces_join_to_the_text_and_no_character_is_split(
    text: str, kind: str, request: pytest.FixtureRequest
) -> None:
    vocabulary: Vocabulary = request.getfixturevalue(kind)
    assert vocabulary.byte_level == (kind == "byte_level")
    found = pieces(vocabulary, vocabulary.tokenizer.encode(text).ids)
    wanted = vocabulary.tokenizer.decode(vocabulary.tokenizer.encode(text).ids)
    assert "".join(found) == wanted
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in found)


@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece"])
def test_an_answer_that_ends_inside_a_character_ends_in_one_replacement(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """Neither tokenizer has merges, so that the character is four tokens: three cuts are inside."""
    vocabulary: Vocabulary = request.getfixturevalue(kind)
    whole = vocabulary.tokenizer.encode("a🙂").ids
    cuts = [n for n in range(len(whole)) if "\ufffd" in vocabulary.tokenizer.decode(whole[:n])]
    assert len(cuts) == 3
    for cut in cuts:
        found = pieces(vocabulary, whole[:cut])
        assert "".join(found) == "a\ufffd"
        assert not any("\ufffd" in piece for piece in found[:-1])


@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece"])
def test_special_tokens_are_left_out(kind: str, request: pytest.FixtureRequest) -> None:
    vocabulary: Vocabulary = request.getfixturevalue(kind)
    ids = vocabulary.tokenizer.encode("no").ids
    special = min(vocabulary.special)
    assert "".join(pieces(vocabulary, [special, *ids, special])) == "no"


def test_bytes_that_are_no_text_do_not_hold_back_what_follows(byte_level: Vocabulary) -> None:
    broken = [byte_level.tokenizer.token_to_id("ÿ")] * 5
    after = byte_level.tokenizer.encode("ok").ids
    assert "".join(pieces(byte_level, broken + after)) == "\ufffd" * 5 + "ok"


def test_broken_bytes_of_a_generic_tokenizer_are_held_back_a_bounded_number_of_tokens(
    sentence_piece: Vocabulary,
) -> None:
    detok = Detokenizer(sentence_piece)
    broken = sentence_piece.tokenizer.token_to_id("<0xFF>")
    assert any(detok.step(broken) for _ in range(6))


@given(st.lists(st.integers(0, tiny_model.VOCABULARY + 5), max_size=40))
def test_any_tokens_give_the_text_of_their_bytes(byte_level: Vocabulary, ids: list[int]) -> None:
    raw = b"".join(byte_level.bytes_of(i) for i in ids if i not in byte_level.special)
    assert "".join(pieces(byte_level, ids)) == raw.decode("utf-8", errors="replace")


def test_a_file_that_is_no_tokenizer_is_a_value_error(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"{}")
    with pytest.raises(ValueError):  # noqa: PT011 - the text is the library's
        Vocabulary(path)
