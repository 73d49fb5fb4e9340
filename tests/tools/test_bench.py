"""``tools/bench``: the shape of what it prints. What it measured is nobody's business here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

for needed in ("numpy", "onnx", "onnxruntime", "tokenizers"):
    pytest.importorskip(needed)

from tests.fakes.tiny_model import make_model  # noqa: E402
from tools.benchlib import cli, figures, jpeg  # noqa: E402

pytestmark = pytest.mark.process


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main([*arguments, "--machine", "a test", "--note", "busy"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert report["machine"]["name"] == "a test"
    assert report["note"] == "busy"
    assert report["versions"]["rkvlmd"]
    assert report["missing"] == {}
    for figure in report["figures"]:
        assert set(figure) == {"name", "value", "unit", "target", "met", "detail"}
        assert figure["value"] > 0
        assert (figure["met"] is None) == (figure["target"] is None)
    return report


def test_idle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(tmp_path / "models" / "tiny", name="tiny")
    models = str(tmp_path / "models")
    report = run(capsys, "idle", "--runs", "1", "--models", models, "--model", "tiny")
    assert len(report["figures"]) == 4
    load = report["figures"][-1]
    assert set(load["detail"]["memory_after"]) == {"daemon", "encoder:tiny", "decoder:tiny"}
    table = figures.table(report)
    assert "| exec to listening | " in table


def test_token_latency(capsys: pytest.CaptureFixture[str]) -> None:
    report = run(capsys, "token-latency", "--tokens", "20", "--waiting", "3", "--runs", "1")
    assert [figure["unit"] for figure in report["figures"]] == ["ms"] * 4
    assert report["figures"][0]["detail"]["tokens"] == 20


def test_first_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(tmp_path / "models" / "tiny", name="tiny")
    report = run(capsys, "first-token", "--repeats", "2", "--models", str(tmp_path / "models"))
    assert report["figures"][0]["detail"]["runs"] == 2


def test_jpeg(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(jpeg, "WIDTH", 1000)
    monkeypatch.setattr(jpeg, "HEIGHT", 750)
    monkeypatch.setattr(jpeg, "SIDES", (224,))
    speed, mean, largest = run(capsys, "jpeg", "--repeats", "1")["figures"]
    assert (speed["target"], mean["target"], largest["target"]) == ("at least 3 x", None, None)
    # Decoded at half the size: nearly the same pixels, and not the very same.
    assert mean["unit"] == largest["unit"] == "of 255"
    assert 0 < mean["value"] < 2 < largest["value"] < 60


def test_what_cannot_be_measured_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["first-token", "--repeats", "1", "--models", str(tmp_path), "--model", "none"]
    assert cli.main(arguments) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["figures"] == []
    assert "none" in report["missing"]["first-token"]
    assert "not measured" in figures.table(report)


def test_percentile() -> None:
    assert figures.percentile([3, 1, 2], 0.5) == 2
    assert figures.percentile(list(range(1, 101)), 0.99) == 99
    assert figures.percentile([5], 0.99) == 5
