"""Frames: any bytes, cut anywhere."""

from __future__ import annotations

import itertools
import json
import struct
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from rkvlmd.wire import frames

scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=10,
)
messages = st.builds(
    lambda rest, kind, fds: {**rest, "type": kind, "fds": fds},
    st.dictionaries(st.text(max_size=8), values, max_size=5),
    st.text(max_size=10),
    st.integers(0, frames.MAX_FDS),
)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """Cut ``data`` at places (modulo its length)."""
    marks = sorted({0, len(data), *(p % (len(data) + 1) for p in places)})
    return [data[a:b] for a, b in itertools.pairwise(marks)]


def raw(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


@given(st.lists(messages, max_size=5), st.lists(st.integers(0, 10_000), max_size=12))
def test_whatever_the_cuts(sent: list[frames.Message], places: list[int]) -> None:
    decoder = frames.FrameDecoder()
    got: list[frames.Message] = []
    for piece in cut(b"".join(map(frames.encode, sent)), places):
        got += decoder.feed(piece)
    assert got == sent
    assert decoder.pending == 0


@given(messages)
def test_byte_by_byte(message: frames.Message) -> None:
    decoder = frames.FrameDecoder()
    data = frames.encode(message)
    for i, byte in enumerate(data[:-1], 1):
        assert decoder.feed(bytes([byte])) == []
        assert decoder.pending == i
    assert decoder.feed(memoryview(data[-1:])) == [message]


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_garbage_never_gives_more_than_messages_or_a_frame_error(
    data: bytes, places: list[int]
) -> None:
    decoder = frames.FrameDecoder(limit=100)
    try:
        for piece in cut(data, places):
            for message in decoder.feed(piece):
                assert isinstance(message["type"], str)
            assert decoder.pending < 104
    except frames.FrameError:
        pass


@given(st.binary(max_size=60))
def test_garbage_in_a_right_frame(body: bytes) -> None:
    try:
        (message,) = frames.FrameDecoder().feed(raw(body))
    except frames.FrameError:
        return
    assert isinstance(message, dict)
    assert json.loads(body)["type"] == message["type"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b'"type"', b"1", b"{}", b'{"type":1}', b'{"type":null}', b"\xff",
        b'{"type":"a","fds":-1}', b'{"type":"a","fds":254}', b'{"type":"a","fds":"1"}',
        b'{"type":"a","fds":1.0}', b'{"type":"a","fds":true}', b'{"type":"a","fds":null}',
        b'{"type":"a"} {"type":"b"}', b'{"type":"\xed\xa0\x80"}', b"[" * 100_000,
        b'{"type":"a","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=lambda body: repr(body[:24]),
)  # fmt: skip
def test_bodies_that_are_no_message(body: bytes) -> None:
    with pytest.raises(frames.FrameError):
        frames.FrameDecoder().feed(raw(body))


def test_good_frames_before_a_wrong_one_are_lost_with_it() -> None:
    # The peer is broken: nobody acts on half of what it says.
    decoder = frames.FrameDecoder()
    with pytest.raises(frames.FrameError):
        decoder.feed(frames.encode({"type": "a"}) + raw(b"{"))


@pytest.mark.parametrize(
    ("size", "fits"), [(99, True), (100, True), (101, False), (2**32 - 1, False)]
)
def test_the_limit_is_checked_before_the_body_comes(size: int, fits: bool) -> None:
    decoder = frames.FrameDecoder(limit=100)
    head = struct.pack(">I", size)
    if fits:
        assert decoder.feed(head) == []
    else:
        with pytest.raises(frames.FrameError, match=f"frame of {size} bytes"):
            decoder.feed(head)


def test_what_is_too_large_is_not_sent() -> None:
    message: dict[str, Any] = {"type": "a", "text": "x" * frames.MAX_BYTES}
    with pytest.raises(frames.FrameError):
        frames.encode(message)
