"""What a client may say about the urgency of its request: a class and a deadline."""

from __future__ import annotations

import re
from typing import Any

from rkvlmd.messages import PRIORITIES, Priority
from rkvlmd.wire.openai_fields import invalid

#: No deadline of a client may reach further than a day (seconds).
LONGEST_TIMEOUT = 86400.0

PRIORITY_HEADER = "x-priority"
DEADLINE_HEADER = "x-request-deadline"

_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


def priority(value: Any, path: str = "priority") -> Priority | None:
    """Return the class that ``value`` asks for; ``None`` asks for none.

    A name, or an integer as other servers take it: lower is more urgent, so
    below 0 is interactive, 0 normal and above 0 batch.

    Raises:
      RkvlmdError: a 400 that names ``path``.

    """
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return "interactive" if value < 0 else "batch" if value > 0 else "normal"
    for name in PRIORITIES:
        if value == name:
            return name
    raise invalid(path, f"must be {', '.join(PRIORITIES)} or an integer.")


def priority_header(value: bytes | None) -> Priority | None:
    """Parse ``X-Priority``; what it says goes before ``priority`` in the body."""
    if value is None:
        return None
    text = value.decode("latin-1").strip().lower()
    return priority(int(text) if _WHOLE.fullmatch(text) else text, PRIORITY_HEADER)


def deadline_header(value: bytes | None) -> float | None:
    """Parse ``X-Request-Deadline``: seconds, counted from the arrival of the headers.

    A time of day would need two clocks that agree, and many boards have none
    that survives a power cut.

    Raises:
      RkvlmdError: a 400 that names the header.

    """
    if value is None:
        return None
    text = value.decode("latin-1").strip()
    seconds = float(text) if _SECONDS.fullmatch(text) else 0.0
    if not 0.0 < seconds <= LONGEST_TIMEOUT:
        raise invalid(DEADLINE_HEADER, f"must be seconds, above 0 to {LONGEST_TIMEOUT:g}.")
    return seconds
