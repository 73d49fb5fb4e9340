"""What is written for people is what the program does."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
from functools import cache
from pathlib import Path

import pytest

from rkvlmd import settings
from rkvlmd.ctl.__main__ import parser
from rkvlmd.errors import CODES
from rkvlmd.models import manifest
from tests.house.tree import PACKAGE, ROOT, listed, python_files

KEYS = [f"{s}.{f.name}" for s, cls in settings.SECTIONS.items() for f in dataclasses.fields(cls)]


@cache
def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_the_settings_file_is_rendered_from_the_code() -> None:
    written = (ROOT / "etc" / "rkvlmd.toml").read_text()
    assert written == settings.render(), "python -m rkvlmd.settings > etc/rkvlmd.toml"


def test_the_schema_is_made_from_the_code() -> None:
    written = (PACKAGE / "data" / "rkvlm.schema.json").read_bytes()
    assert written == manifest.json_schema(), (
        "python -m rkvlmd.models.manifest > rkvlmd/data/rkvlm.schema.json"
    )


@cache
def attributes() -> frozenset[str]:
    """Return the name of every attribute that the package reads, outside the settings."""
    found = set()
    for path in python_files("rkvlmd"):
        if path.name == "settings.py":
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
    return frozenset(found)


#: Read by functions of ``settings.py`` itself.
ELSEWHERE = {"models.dir", "state.dir", "control.path", "http.allow_unauthenticated"}


def test_every_setting_is_used() -> None:
    unused = {k for k in KEYS if k.partition(".")[2] not in attributes()}
    assert not unused - ELSEWHERE


def test_every_error_code_is_documented() -> None:
    assert not [code for code in CODES if f"`{code}`" not in readme()]


def raised_codes() -> set[str]:
    """Return every first argument of ``RkvlmdError(...)`` that is a string."""
    found = set()
    for path in python_files("rkvlmd"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name | ast.Attribute)
                and ast.unparse(node.func).endswith("RkvlmdError")
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                found.add(node.args[0].value)
    return found


def test_every_code_that_is_raised_is_in_the_table() -> None:
    assert raised_codes() <= set(CODES)


def verbs() -> list[str]:
    for action in parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return list(action.choices)
    raise AssertionError("rkvlmctl has no commands")


def test_every_verb_is_documented() -> None:
    assert not [v for v in verbs() if not re.search(rf"rkvlmctl( --?\S+)* {v}\b", readme())]


def test_the_verbs_are_all_there() -> None:
    assert {"status", "models", "load", "unload", "jobs", "cancel", "ask"} <= set(verbs())


@pytest.mark.parametrize(
    "path", [p for p in listed() if p.suffix == ".md"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if "://" not in target and not target.startswith("mailto:"):
            assert (path.parent / target).exists(), target


def ci_command() -> str:
    (line,) = re.findall(r"^command='(.+)'$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    return line.replace("'\\''", "'")


def test_ci_runs_what_the_readme_says() -> None:
    assert ci_command() in readme()
