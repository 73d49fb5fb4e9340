"""The spellings of ``keep_alive``."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from rkvlmd.errors import RkvlmdError
from rkvlmd.settings import Settings
from rkvlmd.wire.keep_alive import keep_alive
from rkvlmd.wire.openai import parse_chat


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        (0, 0.0),
        (300, 300.0),
        (1.5, 1.5),
        (-1, math.inf),
        (-0.5, math.inf),
        (10**400, math.inf),
        (1e300, math.inf),
        ("0", 0.0),
        ("300", 300.0),
        (" 300 ", 300.0),
        ("-1", math.inf),
        ("-1m", math.inf),
        ("-0", 0.0),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("1.5h", 5400.0),
        ("100ms", 0.1),
        ("2d", 172800.0),
        ("0s", 0.0),
        ("99999999999h", math.inf),
    ],
)
def test_what_is_understood(value: Any, seconds: float | None) -> None:
    found = keep_alive(value)
    assert found == seconds
    assert found is None or isinstance(found, float)


@pytest.mark.parametrize(
    "value",
    [True, [], {}, "", " ", "five", "5 m", "5x", "m", "5m5", "--1", "1e3", "nan", "inf",
     "\u0665m", "1" * 33, math.nan],
)  # fmt: skip
def test_what_is_not(value: Any) -> None:
    with pytest.raises(RkvlmdError) as info:
        keep_alive(value)
    assert (info.value.code, info.value.param) == ("invalid_request", "keep_alive")


def test_a_request_says_it() -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "keep_alive": "5m"}
    request = parse_chat(json.dumps(body).encode(), Settings())
    assert request.keep_alive == 300.0
    assert request.ignored == request.unknown == ()
