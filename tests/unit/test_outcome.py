"""Every reason, in every state of the response, and every code."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from rkvlmd.errors import CODES, RkvlmdError
from rkvlmd.messages import GOOD_ENDS, Ended, EndReason
from rkvlmd.wire.outcome import FAILURES, RETRY_AFTER, Sent, outcome, retry_after

REASONS = get_args(EndReason)
SENT = get_args(Sent)

#: Reason to status, code, and what ``x-should-retry`` says.
TABLE: dict[str, tuple[int, str, bool | None]] = {
    "deadline": (504, "deadline_exceeded", False),
    "cancelled": (499, "cancelled", False),
    "engine_died": (500, "engine_died", None),
    "engine_wedged": (500, "engine_wedged", None),
    "model_unloaded": (503, "model_unloaded", False),
    "shutdown": (503, "shutting_down", True),
    "error": (500, "server_error", None),
}


@pytest.mark.parametrize("sent", SENT)
@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_has_exactly_one_outcome(reason: Any, sent: Sent) -> None:
    result = outcome(Ended(reason), sent)
    assert (result.status is None) == (sent != "nothing")
    if reason in GOOD_ENDS:
        assert (result.finish_reason, result.error) == (reason, None)
        assert result.status in {200, None}
    elif reason == "client_gone":
        assert (result.finish_reason, result.error) == (None, None)
        assert result.status in {499, None}
    else:
        status, code, retry = TABLE[reason]
        assert result.finish_reason is None
        assert result.error is not None
        assert (result.error.code, result.error.should_retry) == (code, retry)
        assert result.status in {status, None}
        assert result.error.message.endswith(".")


def test_the_tables_know_the_same_reasons() -> None:
    assert set(FAILURES) == set(REASONS) - GOOD_ENDS
    assert set(TABLE) | GOOD_ENDS | {"client_gone"} == set(REASONS)
    assert {f.code for f in FAILURES.values()} <= set(CODES)


@pytest.mark.parametrize("sent", SENT)
@pytest.mark.parametrize("code", CODES)
def test_an_error_that_a_job_brings_along_goes_through(code: str, sent: Sent) -> None:
    error = RkvlmdError(code, "Why.", param="messages", retry_after=7)
    result = outcome(Ended("error", error=error), sent)
    assert result.error is error
    assert result.status == (CODES[code][0] if sent == "nothing" else None)


def test_an_error_keeps_its_own_word_on_retries() -> None:
    crash = RkvlmdError("engine_crash", "Twice.", should_retry=False)
    assert outcome(Ended("engine_died", error=crash), "nothing").error is crash
    late = RkvlmdError("deadline_exceeded", "Late.", param="timeout", retry_after=3)
    result = outcome(Ended("deadline", error=late), "nothing").error
    assert result is not None
    assert (result.code, result.message, result.param) == ("deadline_exceeded", "Late.", "timeout")
    assert (result.should_retry, result.retry_after) == (False, 3)


def test_a_death_in_the_middle_says_so() -> None:
    before = outcome(Ended("engine_died"), "headers").error
    after = outcome(Ended("engine_died"), "text").error
    assert before is not None
    assert after is not None
    assert "middle" in after.message
    assert "middle" not in before.message


@pytest.mark.parametrize("code", CODES)
def test_retry_after_is_between_1_and_120_and_only_where_a_retry_makes_sense(code: str) -> None:
    plain = retry_after(RkvlmdError(code, "x"))
    assert plain == (RETRY_AFTER if CODES[code][0] in {429, 503} else None)
    assert retry_after(RkvlmdError(code, "x", should_retry=False)) is None
    assert retry_after(RkvlmdError(code, "x", retry_after=-3)) == 1
    assert retry_after(RkvlmdError(code, "x", retry_after=100_000)) == 120


def test_statuses_are_those_that_clients_understand() -> None:
    for status, kind in CODES.values():
        assert 400 <= status <= 504
        assert kind.endswith("_error")
