"""The way from nothing to a model folder, in fifty steps: draw, train, write, export."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rkvlmd.models import manifest

pytestmark = [pytest.mark.torch, pytest.mark.process]

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_fifty_steps_make_a_model_that_can_be_exported(tmp_path: Path) -> None:
    hf, work, model = (str(tmp_path / name) for name in ("hf", "work", "model"))
    said = run(
        "tools/train_demo_model", "--out", hf, "--work", work, "--steps", "50", "--batch", "2",
        "--threads", "2",
    )  # fmt: skip
    assert "50 steps" in said
    run("tools/export_onnx", hf, model, "--name", "fifty")
    made = manifest.parse((tmp_path / "model" / "rkvlm.json").read_bytes())
    assert made.name == "fifty"
    assert not manifest.file_problems(made, tmp_path / "model")
    assert sum(f.stat().st_size for f in (tmp_path / "model").iterdir()) <= 12 << 20
