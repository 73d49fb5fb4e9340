"""How long a request wants its model to stay loaded: the spellings of Ollama's ``keep_alive``."""

from __future__ import annotations

import math
import re
from typing import Any

from rkvlmd.wire.openai_fields import invalid

#: Seconds of the units of Go's ParseDuration that make sense here, and a day.
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PIECE = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhd])", re.ASCII)
_NUMBER = re.compile(r"\d+(?:\.\d+)?", re.ASCII)
#: Longest text that is read, characters.
_MOST = 32
#: What is longer means for ever, seconds: 100 years.
_LONGEST = 3.2e9


def keep_alive(value: Any) -> float | None:
    """Return seconds, ``inf`` for anything below zero, ``None`` for ``null``.

    A number is seconds; so is a text of digits. ``"5m"``, ``"1h30m"`` and
    ``"-1"`` are durations.

    Raises:
      RkvlmdError: ``invalid_request`` with ``keep_alive`` in ``param``.

    """
    if value is None:
        return None
    if isinstance(value, str):
        seconds = _text(value[: _MOST + 1].strip())
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = value
    else:
        seconds = None
    if seconds is None or seconds != seconds:
        raise invalid("keep_alive", 'must be seconds, or a duration such as "5m"; -1 is for ever.')
    return math.inf if seconds < 0 or seconds > _LONGEST else float(seconds)


def _text(text: str) -> float | None:
    sign = -1.0 if text.startswith("-") else 1.0
    text = text.removeprefix("-")
    if len(text) > _MOST:
        return None
    if _NUMBER.fullmatch(text):
        return sign * float(text)
    pieces = _PIECE.findall(text)
    if not pieces or "".join(number + unit for number, unit in pieces) != text:
        return None
    total = sum(float(number) * _UNITS[unit] for number, unit in pieces)
    return -1.0 if sign < 0 else total
