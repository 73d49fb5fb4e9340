"""The bytes of ``/v1/embeddings``."""

from __future__ import annotations

import base64
import json
import struct
from dataclasses import replace
from typing import Any

import pytest

from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import EmbeddingsRequest, PicturePart, TextPart, Turn, Usage, VideoPart
from rkvlmd.settings import Settings
from rkvlmd.wire import openai_embeddings as wire

SETTINGS = Settings()
PNG = "iVBORw0KGgo" + "A" * 80
TEXT = {"type": "text", "text": "a cat"}
PICTURE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
VIDEO = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}


def parse(given: Any, settings: Settings = SETTINGS, **more: Any) -> EmbeddingsRequest:
    return wire.parse_embeddings(json.dumps({"input": given, **more}).encode(), settings)


def user(*parts: Any) -> Turn:
    return Turn("user", parts)


@pytest.mark.parametrize(
    ("given", "turns"),
    [
        ("a", (user(TextPart("a")),)),
        (["a"], (user(TextPart("a")),)),
        (["a", "b"], (user(TextPart("a")), user(TextPart("b")))),
        ([TEXT, PICTURE], (user(TextPart("a cat"), PicturePart(0)),)),
        ([PICTURE, VIDEO], (user(PicturePart(0), VideoPart(0)),)),
        ([[PICTURE], "b", [TEXT]], (user(PicturePart(0)), user(TextPart("b")), user(TextPart("a cat")))),
    ],
)  # fmt: skip
def test_each_input_is_a_turn(given: Any, turns: tuple[Turn, ...]) -> None:
    assert parse(given).turns == turns


def test_all_fields_are_read() -> None:
    found = parse("a", model="m", encoding_format="base64", dimensions=7, timeout=3, user="u",
                  priority="batch", keep_alive="5m", what=1, nothing=None)  # fmt: skip
    assert (found.model, found.encoding, found.dimensions) == ("m", "base64", 7)
    assert (found.timeout, found.priority, found.keep_alive) == (3.0, "batch", 300.0)
    assert found.unknown == ("what",)
    assert not found.stream
    plain = parse("a", encoding_format=None, dimensions=None, model=None)
    assert (plain.encoding, plain.dimensions, plain.model) == ("float", None, None)


@pytest.mark.parametrize(
    ("given", "code", "param"),
    [
        (None, "invalid_request", "input"),
        ("", "invalid_request", "input"),
        ([], "invalid_request", "input"),
        (7, "invalid_request", "input"),
        (["a", ""], "invalid_request", "input[1]"),
        ([[]], "invalid_request", "input[0]"),
        (["a", None], "invalid_request", "input[1]"),
        (["a", TEXT], "invalid_request", "input[1]"),
        ([[TEXT, "a"]], "invalid_request", "input[0][1]"),
        ([TEXT, {"type": "sound"}], "invalid_request", "input[1].type"),
        ([1, 2, 3], "unsupported_parameter", "input[0]"),
        ([[1, 2], [3]], "unsupported_parameter", "input[0]"),
        ([True], "invalid_request", "input[0]"),
        ([{"type": "image_url", "image_url": "https://example.com/a.png"}],
         "invalid_image_url", "input[0].image_url"),
    ],
)  # fmt: skip
def test_an_input_that_is_none(given: Any, code: str, param: str) -> None:
    with pytest.raises(RkvlmdError) as error:
        parse(given)
    assert (error.value.code, error.value.param, error.value.status) == (code, param, 400)


@pytest.mark.parametrize(
    ("name", "value"),
    [("encoding_format", "int8"), ("encoding_format", 1), ("dimensions", 0), ("dimensions", "9"),
     ("model", 3), ("timeout", 0), ("priority", "vip")],
)  # fmt: skip
def test_a_field_that_is_wrong(name: str, value: Any) -> None:
    with pytest.raises(RkvlmdError) as error:
        parse("a", **{name: value})
    assert (error.value.status, error.value.param) == (400, name)


def test_the_number_of_inputs_has_a_bound() -> None:
    few = replace(SETTINGS, http=replace(SETTINGS.http, max_parts=3))
    assert len(parse(["a"] * 3, few).turns) == 3
    with pytest.raises(RkvlmdError, match=r"http\.max_parts") as error:
        parse(["a"] * 4, few)
    assert error.value.param == "input"


@pytest.mark.parametrize("body", [b"[]", b'"a"', b"{", b""])
def test_a_body_that_is_no_object(body: bytes) -> None:
    with pytest.raises(RkvlmdError) as error:
        wire.parse_embeddings(body, SETTINGS)
    assert error.value.status == 400


def test_the_answer_has_openai_s_shape() -> None:
    floats = [0.5, -2.0, 0.0]
    vector = base64.b64encode(struct.pack("<3f", *floats)).decode()
    items = [wire.item(vector, 0, "float"), wire.item(vector, 1, "base64")]
    body = json.loads(wire.answer(items, "m", Usage(prompt_tokens=9, image_tokens=4)))
    assert body == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": floats},
            {"object": "embedding", "index": 1, "embedding": vector},
        ],
        "model": "m",
        "usage": {
            "prompt_tokens": 9,
            "total_tokens": 9,
            "prompt_tokens_details": {"image_tokens": 4},
        },
    }
    guessed = json.loads(wire.answer([], "m", Usage(estimated=True)))
    assert guessed["usage"]["estimated"] is True
