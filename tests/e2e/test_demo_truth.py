"""``rkvlmd demo`` as a newcomer runs it: the model of the package says what is true."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]


def test_the_demo_answers_truly(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rkvlmd", "demo"], cwd=ROOT, capture_output=True, text=True,
        timeout=120, check=False, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shows = json.loads((ROOT / "rkvlmd/data/demo/index.json").read_bytes())
    said = [line[4:] for line in done.stdout.splitlines() if line.startswith("  > ")]
    assert said == [answer for show in shows for answer in show["answers"]]
    assert len(said) == sum(len(show["questions"]) for show in shows)
