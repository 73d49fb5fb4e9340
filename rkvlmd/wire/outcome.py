"""How a job's end reaches its client: one table, reason x what was sent -> status, finish, code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rkvlmd.errors import CODES, RkvlmdError
from rkvlmd.messages import GOOD_ENDS, Ended, EndReason

#: What the client has when the job ends. A whole answer (no streaming) is sent at the end, so
#: there it is always ``nothing``.
Sent = Literal["nothing", "headers", "text"]

#: ``Retry-After`` in seconds where nobody knows better; clients give up above 120.
RETRY_AFTER = 5
RETRY_AFTER_MOST = 120


@dataclass(frozen=True, slots=True)
class Outcome:
    """What to send.

    ``status`` is the HTTP status, or ``None`` when it has left already;
    ``finish_reason`` is set for a whole answer, ``error`` for everything else.
    Neither is set when nobody is there to read.
    """

    status: int | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None
    error: RkvlmdError | None = None


@dataclass(frozen=True, slots=True)
class _Failure:
    """The error of a reason whose job brought none along."""

    code: str
    message: str
    should_retry: bool | None
    after_text: str = ""


# should_retry is a plain no where the same request would cost the same time again, and where only
# the owner of the board can change something; None leaves it to the client's own rules.
FAILURES: dict[EndReason, _Failure] = {
    "deadline": _Failure(
        "deadline_exceeded",
        "The request was not done before its deadline.",
        False,
        "The answer was not finished before the deadline of the request.",
    ),
    "client_gone": _Failure("client_gone", "The client has left.", False),
    "cancelled": _Failure("cancelled", "The request was cancelled by the operator.", False),
    "engine_died": _Failure(
        "engine_died",
        "The process that runs the model died.",
        None,
        "The process that runs the model died in the middle of the answer.",
    ),
    "engine_wedged": _Failure("engine_wedged", "The model stopped responding.", None),
    "model_unloaded": _Failure("model_unloaded", "The model was unloaded by the operator.", False),
    "shutdown": _Failure("shutting_down", "The server is stopping.", True),
    "error": _Failure("server_error", "The request failed inside the server.", None),
}


def outcome(ended: Ended, sent: Sent) -> Outcome:
    """Say what a client gets that has ``sent`` when its job ends like ``ended``."""
    status_is_open = sent == "nothing"
    if ended.reason in GOOD_ENDS:
        finish = ended.reason
        return Outcome(200 if status_is_open else None, finish)  # type: ignore[arg-type]
    failure = FAILURES[ended.reason]
    if ended.reason == "client_gone":
        return Outcome(CODES[failure.code][0] if status_is_open else None)
    error = ended.error
    if error is None:
        error = RkvlmdError(
            failure.code,
            failure.after_text if sent == "text" and failure.after_text else failure.message,
            should_retry=failure.should_retry,
        )
    elif error.should_retry is None and failure.should_retry is not None:
        error = RkvlmdError(
            error.code,
            error.message,
            param=error.param,
            retry_after=error.retry_after,
            should_retry=failure.should_retry,
        )
    return Outcome(error.status if status_is_open else None, error=error)


def retry_after(error: RkvlmdError) -> int | None:
    """Return the ``Retry-After`` of an error in seconds (1 to 120), or ``None``.

    Every 429 and 503 has one, except where a retry makes no sense.
    """
    if error.retry_after is not None:
        return min(max(error.retry_after, 1), RETRY_AFTER_MOST)
    if error.status in {429, 503} and error.should_retry is not False:
        return RETRY_AFTER
    return None
