"""The README's table of families is the one that the tests carry."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.house import families
from tests.house.tree import ROOT


def test_the_table_is_in_the_readme() -> None:
    assert families.table() in (ROOT / "README.md").read_text(), "python -m tests.house.families"


def test_every_family_has_a_row() -> None:
    from rkvlmd.models import templates

    found, _ = templates.load([ROOT / "etc" / "models.d"])
    rows = {found[row.npu].family for row in families.ROWS}
    assert {template.family for template in found.values()} == rows


@pytest.mark.process
@pytest.mark.torch
def test_every_test_of_the_table_is_there() -> None:
    named = sorted({test for row in families.ROWS for test in row.tests()})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *named],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    collected = {line for line in done.stdout.splitlines() if "::" in line}
    assert set(named) <= collected


def test_the_example_of_a_model_is_one() -> None:
    from rkvlmd.models import templates

    text = (ROOT / "rkvlmd" / "README.md").read_text()
    (example,) = re.findall(r"```json\n(.+?)```", text, re.DOTALL)
    assert templates.parse(example.encode(), "example").model == "example-vl-1b"
