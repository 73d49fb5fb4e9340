"""The table of ``tools/break_promises`` fits the code, and the tool tells the outcomes apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.promises import cli
from tools.promises.table import ALL, Break

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("change", ALL, ids=lambda change: change.promise)
def test_each_break_can_be_made_and_its_tests_exist(change: Break) -> None:
    text = (ROOT / "rkvlmd" / change.file).read_text()
    found = cli.broken(text, change)
    assert found is not None, f"{change.old!r} does not stand once in {change.file}"
    assert found != text
    compile(found, change.file, "exec")
    assert all((ROOT / test).is_file() for test in change.tests.split())


def test_each_promise_is_named_once() -> None:
    assert len({change.promise for change in ALL}) == len(ALL)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "rkvlmd").mkdir()
    (tmp_path / "rkvlmd/__init__.py").touch()
    (tmp_path / "rkvlmd/sum.py").write_text("def add(a, b):\n    return a + b\n")
    (tmp_path / "test_sum.py").write_text(
        "from rkvlmd.sum import add\n\ndef test_it():\n    assert add(2, 3) == 5\n"
    )
    (tmp_path / "test_nothing.py").write_text("def test_it():\n    pass\n")
    return tmp_path


@pytest.mark.parametrize(
    ("old", "new", "tests", "outcome"),
    [
        ("a + b", "a - b", "test_sum.py", "caught"),
        ("a + b", "a - b", "test_nothing.py", "SURVIVED"),
        ("a * b", "a - b", "test_sum.py", "no longer applies"),
        ("a", "b", "test_sum.py", "no longer applies"),
        ("a + b", "a - b", "test_gone.py", "tests could not run"),
        ("def add", "def plus", "test_sum.py", "tests could not run"),
    ],
)
def test_outcomes(tree: Path, old: str, new: str, tests: str, outcome: str) -> None:
    before = (tree / "rkvlmd/sum.py").read_text()
    assert cli.attempt(tree, Break("sums", "sum.py", old, new, tests)) == outcome
    assert (tree / "rkvlmd/sum.py").read_text() == before
