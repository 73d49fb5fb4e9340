"""Checked access to the fields of a JSON object; errors carry the JSON path."""

from __future__ import annotations

from typing import Any

from rkvlmd.errors import RkvlmdError
from rkvlmd.settings import Settings
from rkvlmd.wire import strict_json

INT64 = 1 << 63


def invalid(path: str, message: str) -> RkvlmdError:
    """Return the error for a field that is wrong."""
    return RkvlmdError("invalid_request", f"{path}: {message}", param=path)


def unsupported(path: str, message: str) -> RkvlmdError:
    """Return the error for a known field that would change the answer and is not supported."""
    return RkvlmdError("unsupported_parameter", f"{path}: {message}", param=path)


class Fields:
    """One JSON object with its path. ``null`` equals absent everywhere."""

    def __init__(self, values: dict[str, Any], path: str = "") -> None:
        self.values = values
        self._prefix = f"{path}." if path else ""

    def path(self, name: str) -> str:
        """Return the JSON path of a field."""
        return self._prefix + name

    def get(self, name: str) -> Any:
        """Return the raw value, ``None`` when absent."""
        return self.values.get(name)

    def text(self, name: str, *, most: int | None = None) -> str | None:
        """Return a string of at most ``most`` characters."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise invalid(self.path(name), "must be a string.")
        if most is not None and len(value) > most:
            raise invalid(self.path(name), f"must not be longer than {most} characters.")
        return value

    def flag(self, name: str) -> bool:
        """Return a boolean, ``False`` when absent."""
        value = self.values.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise invalid(self.path(name), "must be true or false.")
        return value

    def integer(self, name: str, *, least: int, most: int = INT64 - 1) -> int | None:
        """Return an integer from ``least`` to ``most``; a boolean is none."""
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise invalid(self.path(name), "must be an integer.")
        if not least <= value <= most:
            raise invalid(self.path(name), _range(value, least, most))
        return value

    def number(self, name: str, *, least: float, most: float, above: bool = False) -> float | None:
        """Return a finite number from ``least`` (not equal to it if ``above``) to ``most``."""
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise invalid(self.path(name), "must be a number.")
        # the comparison is false for NaN, and exact for integers of any length
        if not least <= value <= most or (above and value == least):
            start = f"above {least:g}" if above else f"from {least:g}"
            raise invalid(self.path(name), f"must be {start} to {most:g}.")
        return float(value)


def _range(value: int, least: int, most: int) -> str:
    """Return what ``value`` violates: a bound of 64 bits is no news to those who are below ``least``."""
    if most == INT64 - 1:
        low = value < least and least > -INT64
        return f"must be at least {least}." if low else "must fit in 64 bits."
    return f"must be from {least} to {most}."


def of_body(body: bytes, settings: Settings) -> Fields:
    """Return the fields of a request body, within ``http.max_json_depth`` and ``_values``.

    Raises:
      RkvlmdError: ``invalid_json``, or it is no object.

    """
    tree = strict_json.decode(
        body, max_depth=settings.http.max_json_depth, max_values=settings.http.max_json_values
    )
    if not isinstance(tree, dict):
        raise RkvlmdError("invalid_request", "The request body must be a JSON object.")
    return Fields(tree)
