"""What rkvlmctl shows to people."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkvlmd.ctl import render


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_table_is_aligned_and_numbers_are_to_the_right():
    rows = [
        {"name": "demo", "state": "ready", "memory_bytes": 1_500_000},
        {"name": "a-longer-name", "state": "absent", "memory_bytes": 30},
    ]
    assert render.table(rows, ("name", "state", "memory_bytes"), colour=False).splitlines() == [
        "NAME           STATE   MEMORY",
        "demo           ready     2 MB",
        "a-longer-name  absent    30 B",
    ]


def test_colour_does_not_move_columns():
    rows = [{"state": "ready", "n": 1}, {"state": "failed", "n": 2}]
    coloured = render.table(rows, ("state", "n"), colour=True)
    assert "\x1b[32mready " in coloured
    plain = coloured
    for order in ("\x1b[32m", "\x1b[31m", "\x1b[1m", "\x1b[0m"):
        plain = plain.replace(order, "")
    assert plain == render.table(rows, ("state", "n"), colour=False)


def test_empty_and_missing_values():
    assert render.table([], ("name",), colour=False) == "NAME"
    assert render.table([{"a": None}], ("a", "b"), colour=False).splitlines()[1] == "-  -"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("memory", 340_000_000, "340 MB"),
        ("bytes", 2_500_000_000, "2.5 GB"),
        ("uptime", 2.54, "2.5 s"),
        ("age", 200, "3 min 20 s"),
        ("uptime", 18_420, "5 h 07 min"),
        ("stopping", False, "no"),
        ("engines", ["onnx", "rkllm"], "onnx, rkllm"),
        ("queue", {"jobs": 2, "bytes": 10}, "jobs 2, bytes 10 B"),
        ("rate", 0.123456, "0.123"),
        ("detail", "", "-"),
        ("detail", "two\nlines", "two lines"),
    ],
)
def test_cells(name, value, expected):
    assert render.cell(name, value) == expected


def test_status_shows_single_values_then_tables():
    report = {
        "version": "0.1.0",
        "queue": {"jobs": 1},
        "children": [{"name": "prep-0", "pid": 7}],
        "models": [],
    }
    assert render.status(report, colour=False).splitlines() == [
        "version  0.1.0",
        "queue    jobs 1",
        "models   -",
        "",
        "children",
        "NAME    PID",
        "prep-0    7",
    ]


@settings(deadline=None)
@given(st.text())
def test_nothing_steers_the_terminal(text):
    shown = render.plain(text)
    assert not set(shown) & {chr(c) for c in (*range(9), *range(11, 32), *range(127, 160))}
    assert "\n" not in render.cell("detail", text)


def test_progress_line_is_rewritten_and_cleared():
    out = Terminal()
    line = render.ProgressLine(out)
    line.show("demo", "loading", 0.5, "decoder \x1b[2J")
    line.show("demo", "loading", 7, "")
    line.clear()
    first, second, _, end = out.getvalue().split("\r")[1:]
    assert first == "loading demo [##########..........]  50% decoder [2J"
    assert second.rstrip() == "loading demo [####################] 100%"
    assert len(second) == len(first)
    assert end == ""


def test_progress_line_is_silent_without_a_terminal():
    out = io.StringIO()
    line = render.ProgressLine(out)
    line.show("demo", "loading", 0.5, "")
    line.clear()
    assert out.getvalue() == ""


def test_colour_is_for_terminals_that_want_it(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert render.wants_colour(Terminal())
    assert not render.wants_colour(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not render.wants_colour(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not render.wants_colour(Terminal())
