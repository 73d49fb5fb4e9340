"""``rkvlmctl top`` and ``bench`` against a real daemon whose engines follow a script."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.daemon import running
from tests.fakes.boards import trees
from tests.fakes.scripted import make_model

pytestmark = pytest.mark.process


def test_top_and_bench(tmp_path: Path) -> None:
    make_model(tmp_path / "models", context=2048)
    root = str(trees.rk3588().write(tmp_path / "board"))
    module = ("tools.benchlib.scripted_daemon", json.dumps({"rate": 400, "tokens": 9}))
    with running(tmp_path, tmp_path / "models", module=module) as daemon:
        report = daemon.ctl(
            "bench", "--repeats", "1", "--tokens", "5", "--like", "qwen3-vl-2b", "--root", root
        )
        assert report["exit"] == 0, report
        shown = daemon.ctl("top", "--interval", "0.1", "--root", root)
        assert daemon.ctl("bench", "--model", "none")["error"]["code"] == "model_not_found"
        command = [sys.executable, "-m", "rkvlmd.ctl", "--control", str(daemon.control)]
        once = [*command, "top", "--once", "--interval", "0.1"]
        text = subprocess.run(once, capture_output=True, timeout=120, check=True).stdout.decode()
    found = {row["name"]: row for row in report["figures"]}
    assert report["model"] == "scripted"
    assert found["decode"]["here"] > 0
    assert found["encode (448 pixels)"]["published"] == 2.08
    assert {"peak memory, decoder:scripted", "peak memory, encoder:scripted"} <= set(found)
    assert shown["exit"] == 0
    assert shown["tokens_per_second"] == 0
    assert shown["npu"]["celsius"] == 46.23
    assert [model["name"] for model in shown["models"]] == ["scripted"]
    assert "no requests are under way" in text
