"""``rkvlmctl doctor`` on the trees of seven machines, for people and for scripts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rkvlmd.board.finding import ORDER
from rkvlmd.ctl.__main__ import main
from tests.fakes.boards.maker import MODELS, model_files, onnx_files
from tests.fakes.boards.trees import TREES, container, rk3588, x86

#: What each machine's report must hold: id to status. ``id MODEL`` is about one model.
EXPECTED: dict[str, dict[str, str]] = {
    "rk3588": {
        "soc": "ok", "driver": "ok", "cores": "ok", "iommu": "ok", "nodes": "ok", "access": "ok",
        "access-daemon": "ok", "clock-cpu": "warn", "clock-ddr": "warn", "clock-npu": "note",
        "load": "ok", "heat": "ok", "librkllmrt": "ok", "librknnrt": "ok",
        "rknn-toolkit-lite2": "ok", "onnxruntime": "ok", "memory": "ok", "cma": "ok",
        "descriptors": "ok", "model.ok qwen3-vl-2b": "ok",
    },
    "rk3588s": {
        "soc": "ok", "driver": "warn", "cores": "ok", "iommu": "ok", "nodes": "ok",
        "access": "stop", "clock-cpu": "ok", "clock-ddr": "ok", "clock-npu": "note", "load": "ok",
        "librkllmrt": "ok", "librkllmrt.copies": "warn", "librkllmrt.needs": "warn",
        "librknnrt": "stop", "rknn-toolkit-lite2": "stop", "onnxruntime": "ok", "memory": "ok",
        "cma": "ok", "descriptors": "warn", "model.machine qwen2-vl-2b": "stop",
    },
    "rk3576": {
        "soc": "ok", "driver": "ok", "cores": "ok", "iommu": "ok", "nodes": "ok", "access": "ok",
        "access-daemon": "ok", "clock-cpu": "ok", "clock-ddr": "ok", "clock-npu": "note",
        "load": "note", "heat": "warn", "librkllmrt": "ok", "librknnrt": "ok",
        "rknn-toolkit-lite2": "ok", "onnxruntime": "ok", "memory": "ok", "cma": "ok",
        "descriptors": "warn", "model.toolkit by-newer-toolkit": "stop",
        "model.cores for-rk3588": "stop", "model.soc for-rk3588": "stop",
        "model.name for-rk3588": "warn",
    },
    "rk3562": {
        "soc": "ok", "driver": "ok", "cores": "ok", "iommu": "ok", "nodes": "ok", "access": "ok",
        "access-daemon": "ok", "clock-cpu": "warn", "clock-ddr": "note", "clock-npu": "note",
        "load": "ok", "librkllmrt": "stop", "librknnrt": "ok", "rknn-toolkit-lite2": "ok",
        "onnxruntime": "ok", "memory": "ok", "cma": "ok", "descriptors": "warn",
        "model.machine qwen3-0.6b": "stop",
    },
    "rocket": {
        "soc": "ok", "driver": "stop", "cores": "ok", "clock-cpu": "warn", "clock-ddr": "note",
        "clock-npu": "note", "librkllmrt": "ok", "librknnrt": "ok", "rknn-toolkit-lite2": "ok",
        "onnxruntime": "ok", "memory": "ok", "cma": "ok", "descriptors": "warn",
        "model.machine qwen3-vl-2b": "stop",
    },
    "container": {
        "soc": "stop", "driver": "ok", "cores": "ok", "iommu": "ok", "nodes": "stop",
        "rknpu-link": "stop", "clock-cpu": "warn", "clock-ddr": "warn", "clock-npu": "note",
        "load": "ok", "heat": "ok", "librkllmrt": "ok", "librknnrt": "ok",
        "rknn-toolkit-lite2": "ok", "onnxruntime": "ok", "memory": "ok", "cma": "ok",
        "descriptors": "warn", "model.machine qwen3-vl-2b": "stop",
    },
    "x86": {
        "soc": "note", "onnxruntime": "ok", "memory": "ok", "descriptors": "ok",
        "model.ok small": "ok",
    },
}  # fmt: skip


def report(
    root: Path, capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[int, dict[str, Any]]:
    """Return the exit status and the report, which must say the same."""
    status = main(["doctor", "--root", str(root), "--json", *options])
    whole = json.loads(capsys.readouterr().out)
    assert whole["loads"] == (status == 0)
    assert whole["worst"] == max((f["status"] for f in whole["findings"]), key=ORDER.index)
    return status, whole


def statuses(whole: dict[str, Any]) -> dict[str, str]:
    found = {}
    for line in whole["findings"]:
        model = line["facts"].get("model")
        found[f"{line['id']} {model}" if model else line["id"]] = line["status"]
    return found


@pytest.mark.parametrize("name", TREES)
def test_each_machine(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, whole = report(TREES[name]().write(tmp_path), capsys)
    assert statuses(whole) == EXPECTED[name]
    assert status == (1 if "stop" in EXPECTED[name].values() else 0)
    assert whole.keys() == {"version", "root", "loads", "worst", "findings"}
    for line in whole["findings"]:
        assert line.keys() == {"id", "status", "what", "says", "todo", "facts"}
        # What is not well is followed by what to do; a model's line may point above.
        if line["status"] in {"warn", "stop"}:
            assert line["todo"] or "see above" in line["says"]


@pytest.mark.parametrize("name", TREES)
def test_people_get_one_line_each(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = TREES[name]().write(tmp_path)
    _, whole = report(root, capsys)
    main(["doctor", "--root", str(root)])
    *lines, empty, summary = capsys.readouterr().out.splitlines()
    assert empty == ""
    assert [line.split()[0] for line in lines] == [f["status"] for f in whole["findings"]]
    stops = list(statuses(whole).values()).count("stop")
    said = f"{stops} of these lines keep a model from loading" if stops else "nothing here stops"
    assert summary.startswith(said)
    assert all(line.isprintable() for line in lines)


def test_a_board_without_models_is_warned_and_not_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board = container().without(MODELS, "/usr/lib/librk")
    status, whole = report(board.write(tmp_path), capsys)
    assert status == 0
    found = statuses(whole)
    assert found["models"] == "note"
    assert found["librkllmrt"] == found["librknnrt"] == found["nodes"] == "warn"


def test_an_npu_model_on_a_pc_is_stopped_and_told_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board = x86()
    board.model("qwen")
    status, whole = report(board.write(tmp_path), capsys)
    assert status == 1
    (line,) = [f for f in whole["findings"] if f["id"] == "model.machine"]
    assert line["facts"] == {"model": "qwen"}
    assert line["says"].endswith("SoC, librkllmrt.so, librknnrt.so, rknn-toolkit-lite2")
    assert statuses(whole)["model.ok small"] == "ok"


def test_settings_reach_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    board = rk3588()
    for name, content in onnx_files("other").items():
        board.files[f"/data/models/other/{name}"] = content
    board.files["/etc/rkvlmd/rkvlmd.toml"] = (
        '[npu]\nsoc = "rk3588s"\nlibrary = "/data/none.so"\n[models]\ndir = "/data/models"\n'
        "[memory]\nreserve_bytes = 90000000000\n"
    )
    _, whole = report(board.write(tmp_path), capsys)
    found = statuses(whole)
    assert found["soc"] == "note"
    assert found["librkllmrt"] == "warn"  # no installed model needs it
    assert found["model.memory other"] == "stop"
    assert "model.ok qwen3-vl-2b" not in found


def test_options_reach_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = rk3588().write(tmp_path / "root")
    config = tmp_path / "my.toml"
    config.write_text('[npu]\nsoc = "rk3576"\n')
    models = tmp_path / "models"
    folder = models / "mine"
    folder.mkdir(parents=True)
    for name, content in model_files("mine").items():
        (folder / name).write_bytes(content)
    _, whole = report(root, capsys, "--config", str(config), "--models", str(models))
    found = statuses(whole)
    assert found["soc"] == "warn"
    assert found["model.soc mine"] == "stop"


def test_wrong_settings_stop_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    board = rk3588()
    board.files["/etc/rkvlmd/rkvlmd.toml"] = "[npu]\nsocks = 1\n"
    status, whole = report(board.write(tmp_path), capsys)
    assert status == 1
    assert statuses(whole)["settings"] == "stop"
    assert statuses(whole)["model.machine qwen3-vl-2b"] == "stop"


def test_a_wrong_model_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    board = x86()
    board.files[f"{MODELS}/bad/rkvlm.json"] = "{}"
    status, whole = report(board.write(tmp_path), capsys)
    assert status == 1
    assert statuses(whole)["model.manifest bad"] == "stop"


def test_text_of_a_tree_cannot_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board = rk3588()
    board.files["/sys/firmware/devicetree/base/compatible"] = "a\x1b[2Jb\n,c\0rockchip,rk3588\0"
    main(["doctor", "--root", str(board.write(tmp_path))])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.startswith("ok    SoC")


@pytest.mark.parametrize(
    "options",
    [("--root", "none"), ("--config", "none"), ("--root", "broken")],
    ids=" ".join,
)
def test_wrong_usage(
    options: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "recorded.json").write_text("{")
    assert main(["doctor", "--json", *options]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["param"] == options[0]


def test_an_empty_folder_is_a_machine_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, whole = report(tmp_path, capsys)
    assert status == 0
    assert statuses(whole)["soc"] == "note"


@pytest.mark.process
def test_this_machine_without_a_daemon(tmp_path: Path) -> None:
    """A process of its own, on the real root, whatever machine that is."""
    config = tmp_path / "rkvlmd.toml"
    config.write_text("[models]\ndemo = false\n")
    command = [sys.executable, "-m", "rkvlmd.ctl.__main__", "doctor", "--json"]
    options = ["--config", str(config), "--models", str(tmp_path), "--control", "/none"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 0
    whole = json.loads(done.stdout)
    assert whole["root"] == "/"
    assert {"soc", "memory", "descriptors"} <= {line["id"] for line in whole["findings"]}


def test_every_status_is_seen() -> None:
    assert {s for lines in EXPECTED.values() for s in lines.values()} == set(ORDER)
