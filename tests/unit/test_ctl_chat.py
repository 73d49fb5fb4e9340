"""The parts of ``ask`` that need no server."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkvlmd.ctl import chat
from rkvlmd.ctl.client import CtlError


def test_events_skip_comments_and_join_data_lines():
    lines = [": ping", "", "data: a", "", "event: x", "data:b", "data:  c", "", "data: cut"]
    assert list(chat.events(lines)) == ["a", "b\n c"]


texts = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"))


@settings(deadline=None)
@given(st.lists(st.lists(texts, min_size=1, max_size=3), max_size=5))
def test_events_come_back(events):
    lines = []
    for event in events:
        lines += [": ping", "", *(f"data: {line}" for line in event), ""]
    assert list(chat.events(lines)) == ["\n".join(event) for event in events]


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\x89PNG\r\n", "image/png"),
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"GIF89a", "image/gif"),
        (b"RIFF....WEBP", "image/webp"),
        (b"?", "application/octet-stream"),
        (b"", "application/octet-stream"),
    ],
)
def test_picture(tmp_path, head, kind):
    file = tmp_path / "p"
    file.write_bytes(head)
    uri = chat.picture(file, 100)
    assert uri == f"data:{kind};base64,{base64.b64encode(head).decode()}"


def test_picture_that_is_too_large_is_not_read_whole(tmp_path):
    with pytest.raises(CtlError, match="larger than 10 bytes"):
        chat.picture(chat.Path("/dev/zero"), 10)


def test_picture_that_is_not_there(tmp_path):
    with pytest.raises(CtlError, match="No such file"):
        chat.picture(tmp_path / "none", 10)
    with pytest.raises(CtlError, match="directory"):
        chat.picture(tmp_path, 10)


def test_user_turn_puts_pictures_first():
    assert chat.user_turn("hello", []) == {"role": "user", "content": "hello"}
    turn = chat.user_turn("which?", ["data:a", "data:b"])
    assert [part["type"] for part in turn["content"]] == ["image_url", "image_url", "text"]


@pytest.mark.parametrize(
    ("chunk", "text"),
    [
        ({"choices": [{"delta": {"content": "a"}}]}, "a"),
        ({"choices": [{"delta": {"role": "assistant", "content": None}}]}, ""),
        ({"choices": []}, ""),
        ({"choices": [{}]}, ""),
        ({}, ""),
    ],
)
def test_text_of(chunk, text):
    assert chat.text_of(chunk) == text


def test_answer_of():
    assert chat.answer_of({"choices": [{"message": {"content": "a"}}]}) == "a"
    with pytest.raises(CtlError):
        chat.answer_of({"choices": []})
