"""Event-stream text, cut at every place."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkvlmd.messages import Timings, Usage
from rkvlmd.wire import sse
from rkvlmd.wire.openai_answer import Answer, encode_text

TEXTS = st.lists(st.text(st.characters(codec="utf-8")), max_size=8)


def feed(data: bytes, cuts: list[int]) -> list[bytes]:
    decoder = sse.Decoder()
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    return [
        event
        for start, end in itertools.pairwise(places)
        for event in decoder.feed(data[start:end])
    ]


@given(TEXTS, st.lists(st.integers(0, 2000)), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_what_is_written_is_read_back_wherever_it_is_cut(
    texts: list[str], cuts: list[int], end: bytes
) -> None:
    written = [encode_text(text) for text in texts]
    data = b"".join(sse.PING + sse.event(line) for line in written) + sse.DONE
    read = feed(data.replace(b"\n", end), cuts)
    assert read == [*written, b"[DONE]"]
    assert [json.loads(line) for line in read[:-1]] == texts


@given(TEXTS, st.booleans())
def test_a_stream_survives_clients_that_split_decoded_text(texts: list[str], usage: bool) -> None:
    answer = Answer(job="1", model="m", digest="", created=1, include_usage=usage)
    pieces = [answer.role(), *map(answer.text, texts), answer.finish("stop", Usage(), Timings())]
    data = b"".join(pieces)
    assert sse.Decoder().feed(data) == [
        line.removeprefix("data: ").encode() for line in data.decode().splitlines() if line
    ]
    assert "".join(texts) == "".join(
        json.loads(e)["choices"][0]["delta"]["content"]
        for e in sse.Decoder().feed(b"".join(pieces[1:-1]))
    )


@given(st.binary(), st.lists(st.integers(0, 200)))
def test_any_bytes_read_the_same_whole_and_cut(data: bytes, cuts: list[int]) -> None:
    assert feed(data, cuts) == feed(data, [])


def test_fields_and_comments() -> None:
    text = b": hi\n\nevent: x\ndata: a\ndata:b\ndata:  c\nid: 1\n\nretry: 5\n\ndata\n\ndata: d"
    assert sse.Decoder().feed(text) == [b"a\nb\n c", b""]


def test_a_line_break_in_an_event_is_refused() -> None:
    for data in (b"a\nb", b"a\r"):
        with pytest.raises(ValueError, match="one line"):
            sse.event(data)


@pytest.mark.parametrize(
    "data", [b"x" * 200, b"data: " + b"x" * 200 + b"\n", b"data: xxxxxxxx\n" * 20]
)
def test_an_event_without_end_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="too long"):
        sse.Decoder(max_event_bytes=100).feed(data)


def test_half_a_surrogate_pair_is_replaced() -> None:
    assert json.loads(encode_text("a\ud800b")) == "a?b"
