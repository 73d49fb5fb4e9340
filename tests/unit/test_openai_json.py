"""JSON from strangers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkvlmd.errors import RkvlmdError
from rkvlmd.wire import strict_json

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
)


def decode(body: bytes, max_depth: int = 64, max_values: int = 1000) -> Any:
    return strict_json.decode(body, max_depth=max_depth, max_values=max_values)


def refused(body: bytes, **bounds: int) -> str:
    with pytest.raises(RkvlmdError) as caught:
        decode(body, **bounds)
    assert caught.value.code == "invalid_json"
    return caught.value.message


@given(JSON)
def test_json_is_json(value: Any) -> None:
    assert decode(json.dumps(value).encode(), max_values=10_000) == value


@pytest.mark.parametrize(
    "body",
    [
        b"", b"  \n", b"{", b"nonsense", b'{"a":}', b"[1,]", b"NaN", b"[Infinity]", b"1e999",
        b'"\xff"', b'"\xed\xa0\x80"', b'"\\ud800"', b'"\x01"', b"{}{}", b"'a'", b"\xef\xbb\xbf{}",
        b"1" * 5000, b'{"a":1' + b" " * 1000,
    ],
)  # fmt: skip
def test_what_is_not_json(body: bytes) -> None:
    message = refused(body)
    assert "byte" not in message  # nothing of the library's text


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_depth(opening: bytes, closing: bytes) -> None:
    decode(opening * 10 + b"1" + closing * 10, max_depth=10)
    assert "10 levels" in refused(opening * 11 + b"1" + closing * 11, max_depth=10)
    deep = opening * 400_000 + b"1" + closing * 400_000
    assert "levels" in refused(deep, max_values=1_000_000)
    assert "values" in refused(deep)
    refused(opening * 400_000, max_values=1_000_000)


def test_values() -> None:
    bounds = {"max_values": 1000}
    assert "1000 JSON values" in refused(b"[" + b"[]," * 5000 + b"[]]", **bounds)
    assert "1000 JSON values" in refused(b"[" + b'"",' * 5000 + b'""]', **bounds)
    refused(b'"' * 5000, **bounds)
    refused(b'["' + b"\\" * 5000 + b"," * 5000, **bounds)
    # text may hold as many commas and brackets as it likes
    text = ",[{" * 5000 + '\\" ,\\\\'
    assert decode(b'["' + text.encode() + b'",1]', **bounds)[1] == 1


def test_the_last_of_equal_keys_stays() -> None:
    assert decode(b'{"a":1,"a":2}') == {"a": 2}
