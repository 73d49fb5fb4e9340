"""What a client may say about urgency, and which class its request gets."""

from __future__ import annotations

from typing import Any

import pytest

from rkvlmd.actors.clients import Classes
from rkvlmd.errors import RkvlmdError, SettingsError
from rkvlmd.messages import PRIORITIES
from rkvlmd.settings import QueueSettings, parse
from rkvlmd.wire.urgency import deadline_header, priority, priority_header


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("interactive", "interactive"), ("normal", "normal"), ("batch", "batch"), (None, None),
        (0, "normal"), (-1, "interactive"), (-(1 << 70), "interactive"), (5, "batch"),
    ],
)  # fmt: skip
def test_priority_is_a_name_or_an_integer_of_which_lower_is_more_urgent(
    value: Any, wanted: str | None
) -> None:
    assert priority(value) == wanted


@pytest.mark.parametrize("value", ["", "high", "Interactive", True, 1.5, [], {}, [1]])
def test_other_priorities_are_refused_by_name(value: Any) -> None:
    with pytest.raises(RkvlmdError) as info:
        priority(value)
    assert (info.value.code, info.value.param) == ("invalid_request", "priority")


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(None, None), (b"batch", "batch"), (b" Interactive ", "interactive"), (b"-3", "interactive"),
     (b"0", "normal"), (b"+1", "batch")],
)  # fmt: skip
def test_priority_header(value: bytes | None, wanted: str | None) -> None:
    assert priority_header(value) == wanted


@pytest.mark.parametrize("value", [b"", b"urgent", b"1.5", b"\xff", b"1" * 400, b"--1"])
def test_priority_headers_that_are_wrong(value: bytes) -> None:
    with pytest.raises(RkvlmdError) as info:
        priority_header(value)
    assert info.value.param == "x-priority"


@pytest.mark.parametrize(
    ("value", "wanted"), [(None, None), (b"30", 30.0), (b" 0.25 ", 0.25), (b"86400", 86400.0)]
)
def test_deadline_header(value: bytes | None, wanted: float | None) -> None:
    assert deadline_header(value) == wanted


@pytest.mark.parametrize(
    "value",
    [b"", b"0", b"-1", b"1e3", b"nan", b"inf", b"86401", b"2026-11-20T22:00:00Z", b"1.", b"9" * 99],
)
def test_deadline_headers_that_are_wrong(value: bytes) -> None:
    with pytest.raises(RkvlmdError) as info:
        deadline_header(value)
    assert (info.value.code, info.value.param) == ("invalid_request", "x-request-deadline")


def test_the_class_of_a_client() -> None:
    classes = Classes(
        QueueSettings(
            interactive_clients=("10.0.0.0/24", "fd00::/8", "local"), batch_clients=("10.0.0.9",)
        )
    )

    def name(client: str, asked: Any = None) -> str:
        return PRIORITIES[classes.rank(client, asked)]

    assert name("192.168.1.1") == "normal"
    assert name("192.168.1.1", "interactive") == "interactive"
    assert name("10.0.0.5") == name("::ffff:10.0.0.5") == name("fd00::1") == "interactive"
    assert name("local") == "interactive"
    assert name("10.0.0.5", "batch") == "batch"
    # The owner's word for batch stands.
    assert name("10.0.0.9") == name("10.0.0.9", "interactive") == "batch"


@pytest.mark.parametrize("name", ["interactive_clients", "batch_clients"])
@pytest.mark.parametrize("entry", ["camera.lan", "10.0.0.1/8", "10.0.0.1:80", "", "*"])
def test_lists_of_clients_that_are_wrong(name: str, entry: str) -> None:
    with pytest.raises(SettingsError, match=rf"queue\.{name}: .* must be an address"):
        parse(f'[queue]\n{name} = ["{entry}"]')
