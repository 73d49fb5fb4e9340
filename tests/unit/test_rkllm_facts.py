"""The simulator's rules and switches against the facts that they follow, and the tests of each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests" / "npusim"
SOURCES = [
    *(HERE / "src").iterdir(), *(HERE / "include").iterdir(),
    *(HERE / "python" / "rknnlite").glob("*.py"), HERE / "models.py",
]  # fmt: skip
FACT = re.compile(r"^\| (\d+\.?\d*[a-z]) \| .* \| ([VPWMCI?, ]+) \| .* \|$", re.MULTILINE)
MARKS = {m[1]: m[2] for m in FACT.finditer((HERE / "facts.md").read_text())}
README = (HERE / "README.md").read_text()
SWITCH = re.compile(r"^\| `NPUSIM_(\w+)` \| ([\w, ]+) \| .* \| ([\d.]+[a-z]) \|$", re.MULTILINE)
SWITCHES = {m[1]: (m[2].split(", "), m[3]) for m in SWITCH.finditer(README)}
CITED = re.compile(r"[Ff]act (\d+\.?\d*[a-z]?)\b|misuse\(\"(\d+\.?\d*[a-z]?)\"")
#: Facts that are open, inferred or claimed, but no behaviour of a library that could be switched.
DESCRIBED = {
    "1.6d": "how a line looks: nothing reads these",
}


def cited() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in SOURCES:
        if path.is_file():
            for match in CITED.finditer(path.read_text()):
                found.setdefault(match[1] or match[2], []).append(path.name)
    return found


def test_every_rule_names_a_fact() -> None:
    assert len(MARKS) > 70
    unknown = {fact: where for fact, where in cited().items() if fact not in MARKS}
    assert unknown == {}


def test_every_fact_is_followed_by_a_rule() -> None:
    # 2.4a is the whole of reuse, 6.1a a figure; all others are named where they are followed.
    assert set(MARKS) - set(cited()) <= {"2.4a", "2.10c"}


def test_a_wrong_caller_is_told_a_fact() -> None:
    code = "\n".join(path.read_text() for path in SOURCES if path.is_file())
    told = re.findall(r"misuse\(\s*\"([^\"]*)\"", code)
    assert len(told) > 20
    assert set(told) - set(MARKS) == set()


def test_what_is_not_certain_is_a_switch() -> None:
    switched = {fact for _, fact in SWITCHES.values()}
    uncertain = {fact for fact, marks in MARKS.items() if set(marks) & set("CI?")}
    assert uncertain - switched - set(DESCRIBED) == set()


def test_every_switch_is_one() -> None:
    code = "\n".join(path.read_text() for path in SOURCES if path.is_file())
    assert len(SWITCHES) > 20
    for name, (values, fact) in SWITCHES.items():
        assert fact in MARKS
        assert f'"NPUSIM_{name}"' in code, name
        # With two values the code may compare with either.
        assert any(f'"{value}"' in code for value in values), (name, values)
    # A second argument that is a word: what the code compares with is in the table.
    for name in re.findall(r'is\("NPUSIM_(\w+)"', code):
        assert name in SWITCHES, name


@pytest.mark.parametrize("name", sorted(SWITCHES))
def test_each_value_of_a_switch_has_a_test(name: str) -> None:
    tests = "\n".join(
        path.read_text()
        for folder in ("unit", "process")
        for path in (ROOT / "tests" / folder).glob("test_*.py")
        if path.name != Path(__file__).name
    )
    values, _ = SWITCHES[name]
    for value in values[1:]:
        # In a table of switches, through monkeypatch, or as a parameter.
        given = rf"{name}\"(:|,) \"{value}\"|{name}=\"{value}\"|{name}\", \w+\)"
        assert re.search(given, tests), (name, value)
