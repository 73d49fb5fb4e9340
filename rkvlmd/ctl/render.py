"""What people see: tables, a progress line, and text that cannot steer their terminal."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

_BOLD, _PLAIN = "\x1b[1m", "\x1b[0m"
_COLOURS = {
    "ready": "\x1b[32m", "idle": "\x1b[32m", "loading": "\x1b[33m", "unloading": "\x1b[33m",
    "failed": "\x1b[31m", "dead": "\x1b[31m",
}  # fmt: skip
_BAR = 20
#: C0 controls but tab and newline, DEL, and C1 controls: what a terminal takes as an order.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if code not in {9, 10}}


def plain(text: str) -> str:
    """Return ``text`` without the control characters that a terminal would obey."""
    return text.translate(_CONTROLS)


def wants_colour(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal and nobody asked for no colour (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def size(count: float) -> str:
    """Return bytes for people: ``340 MB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def seconds(count: float) -> str:
    """Return a duration for people: ``2.5 s``, ``3 min 20 s``, ``5 h 07 min``."""
    if count < 60:
        return f"{count:.1f} s"
    minutes, rest = divmod(int(count), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def cell(name: str, value: Any) -> str:
    """Return one value for people; ``name`` tells its unit."""
    if value is None or value in ("", [], {}):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    number = isinstance(value, int | float)
    if number and (name in {"memory", "bytes"} or name.endswith("_bytes")):
        return size(value)
    if number and (name in {"age", "phase_age", "uptime"} or name.endswith("_seconds")):
        return seconds(value)
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{_title(key)} {cell(key, item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(cell(name, item) for item in value)
    return plain(str(value)).replace("\n", " ").replace("\t", " ")


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str], *, colour: bool) -> str:
    """Return a table; every column as wide as its widest value, numbers to the right."""
    titles = [_title(column).upper() for column in columns]
    body = [[cell(column, row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(titles, *body, strict=True)]
    right = [
        bool(rows) and all(isinstance(row.get(c), int | float) for row in rows) for c in columns
    ]
    lines = [_line(titles, widths, right, [_BOLD] * len(columns) if colour else [])]
    lines += [_line(values, widths, right, _inks(values) if colour else []) for values in body]
    return "\n".join(lines)


def _inks(values: Iterable[str]) -> list[str]:
    return [_COLOURS.get(value, "") for value in values]


def _line(
    values: Sequence[str], widths: Sequence[int], right: Sequence[bool], inks: Sequence[str]
) -> str:
    padded = [
        value.rjust(width) if to_right else value.ljust(width)
        for value, width, to_right in zip(values, widths, right, strict=True)
    ]
    padded[-1] = padded[-1].rstrip()
    if inks:
        padded = [
            f"{ink}{text}{_PLAIN}" if ink else text for ink, text in zip(inks, padded, strict=True)
        ]
    return "  ".join(padded).rstrip()


def status(report: dict[str, Any], *, colour: bool) -> str:
    """Return the whole status: single values first, then each list as a table."""
    single = {k: v for k, v in report.items() if not _is_table(v)}
    width = max((len(_title(key)) for key in single), default=0)
    lines = [f"{_title(key).ljust(width)}  {cell(key, value)}" for key, value in single.items()]
    for key, rows in report.items():
        if _is_table(rows):
            columns = list(dict.fromkeys(name for row in rows for name in row))
            title = f"{_BOLD}{_title(key)}{_PLAIN}" if colour else _title(key)
            lines += ["", title, table(rows, columns, colour=colour)]
    return "\n".join(lines)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _title(name: str) -> str:
    """Return a key as people read it; ``cell`` writes the unit beside the value."""
    for unit in ("_bytes", "_seconds"):
        name = name.removesuffix(unit)
    return plain(name).replace("_", " ")


class ProgressLine:
    """One line that is rewritten in place; nothing where ``stream`` is no terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._width = 0

    def show(self, name: str, state: str, share: float, detail: str) -> None:
        """Rewrite the line; ``share`` is 0..1."""
        if not self._live:
            return
        share = min(max(share, 0.0), 1.0)
        bar = "#" * round(share * _BAR)
        text = f"{state} {name} [{bar:.<{_BAR}}] {share:4.0%} {detail}"
        text = plain(text).replace("\n", " ").replace("\t", " ").rstrip()
        text = text[: max(window(self._stream)[0] - 1, 20)]
        self._stream.write("\r" + text.ljust(self._width))
        self._stream.flush()
        self._width = len(text)

    def clear(self) -> None:
        """Take the line away, so that what follows starts on an empty one."""
        if self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
            self._width = 0


def window(stream: TextIO) -> tuple[int, int]:
    """Return the columns and lines of a terminal; 80 and 24 where it does not say."""
    try:
        size = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        return 80, 24
    return size.columns or 80, size.lines or 24
