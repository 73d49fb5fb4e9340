"""JSON from strangers: bounded in depth and in the number of values before it costs memory."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from rkvlmd.errors import RkvlmdError

# A string (counted once, closed or not), or one token that adds a value. Possessive: no backtracking.
_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{,]', re.DOTALL)


def decode(body: bytes, *, max_depth: int, max_values: int) -> Any:
    """Decode one JSON document.

    Of a key that comes twice the last one stays. NaN and infinity are not JSON.

    Raises:
      RkvlmdError: ``invalid_json``.

    """
    if not body.strip():
        raise RkvlmdError("invalid_json", "The request body is empty.")
    # Base64 holds none of these bytes, so a body of pictures is judged by three fast counts.
    if body.count(b",") + body.count(b"[") + body.count(b"{") > max_values:
        _count(body, max_values)
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise _too_deep(max_depth) from None
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise RkvlmdError("invalid_json", "The request body is not valid JSON in UTF-8.") from None
    if _depth_above(value, max_depth):
        raise _too_deep(max_depth)
    return value


def _count(body: bytes, max_values: int) -> None:
    for values, _ in enumerate(_TOKENS.finditer(body)):
        # keys and the strings themselves count too, hence twice the bound
        if values > 2 * max_values:
            raise RkvlmdError(
                "invalid_json", f"The request body holds more than {max_values} JSON values."
            )


def _depth_above(value: Any, most: int) -> bool:
    level = [value] if isinstance(value, (dict, list)) else []
    depth = 0
    while level:
        depth += 1
        if depth > most:
            return True
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
    return False


def _too_deep(most: int) -> RkvlmdError:
    return RkvlmdError("invalid_json", f"The request body is nested deeper than {most} levels.")
