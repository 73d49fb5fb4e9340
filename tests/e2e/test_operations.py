"""The owner at work on a real daemon: drain, reload, pins, memory and time."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.daemon import PATIENCE, Daemon, question, running

pytestmark = pytest.mark.process


def ask(daemon: Daemon, model: str, **more: Any) -> httpx.Response:
    body = {"model": model, "messages": question("x"), "max_tokens": 2, **more}
    return httpx.post(daemon.url + "/v1/chat/completions", json=body, timeout=PATIENCE)


def state(daemon: Daemon, model: str) -> dict[str, Any]:
    (found,) = [m for m in daemon.ctl("models")["models"] if m["name"] == model]
    return found  # type: ignore[no-any-return]


def until(true: Callable[[], bool]) -> None:
    """Ask the daemon until it is so."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end


def test_a_drained_server_says_so_and_resumes(daemon: Daemon) -> None:
    assert ask(daemon, "tiny").status_code == 200
    assert daemon.ctl("drain") == {"draining": True, "jobs": 0, "exit": 0}
    assert daemon.ctl("status")["state"] == "draining"
    refused = ask(daemon, "tiny")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "draining"
    assert refused.headers["retry-after"] == "30"
    ready = httpx.get(daemon.url + "/readyz", timeout=120)
    assert ready.status_code == 503
    assert ready.json()["error"]["code"] == "draining"
    assert httpx.get(daemon.url + "/livez", timeout=120).status_code == 200
    # The owner goes on working meanwhile.
    assert daemon.ctl("load", "other")["model"]["state"] == "ready"
    assert daemon.ctl("resume")["draining"] is False
    assert httpx.get(daemon.url + "/readyz", timeout=120).status_code == 200
    assert ask(daemon, "tiny").status_code == 200


def test_reload_by_rkvlmctl_and_by_signal(tmp_path: Path, models: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(models / "tiny", folder / "tiny")
    file = tmp_path / "rkvlmd.toml"
    with running(tmp_path, folder, config="[models]\nmax_tokens = 3\n") as daemon:
        body = {"model": "tiny", "messages": question("x")}
        url = daemon.url + "/v1/chat/completions"

        def tokens() -> int:
            answer = httpx.post(url, json=body, timeout=PATIENCE)
            return answer.json()["usage"]["completion_tokens"]  # type: ignore[no-any-return]

        assert tokens() == 3
        file.write_text('[models]\nmax_tokens = 5\n[npu]\nsoc = "rk3588"\n')
        said = daemon.ctl("reload")
        assert (said["applied"], said["needs_restart"]) == (["models.max_tokens"], ["npu.soc"])
        assert tokens() == 5
        file.write_text("[models]\nmax_tokens = 0\nmax_token = 7\n")
        said = daemon.ctl("reload")
        assert said["exit"] == 1
        assert [line.partition(":")[0] for line in said["rejected"]] == [
            "models.max_tokens", "models.max_token",
        ]  # fmt: skip
        assert tokens() == 5
        # What the command line said stays said, and the signal does the same.
        file.write_text('[http]\nbind = "127.0.0.1:1"\n[models]\nmax_tokens = 7\n')
        shutil.copytree(models / "other", folder / "other")
        daemon.process.send_signal(signal.SIGHUP)
        until(lambda: len(daemon.ctl("models")["models"]) == 3)
        assert tokens() == 7
        assert ask(daemon, "other").status_code == 200
        assert daemon.stop() == 0
    assert "rejected" not in daemon.log
    assert "models added other" in daemon.log


def test_a_pin_is_stronger_than_a_request_and_a_restart(tmp_path: Path, models: Path) -> None:
    with running(tmp_path, models) as daemon:
        assert daemon.ctl("pin", "tiny")["model"]["pinned"] is True
        refused = ask(daemon, "other")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_pinned")
        assert daemon.ctl("load", "other")["error"]["code"] == "model_pinned"
        assert daemon.ctl("unload", "tiny")["error"]["code"] == "model_pinned"
        daemon.process.send_signal(signal.SIGKILL)
        daemon.process.wait(PATIENCE)
    with running(tmp_path, models) as daemon:
        until(lambda: state(daemon, "tiny")["state"] == "ready")
        assert state(daemon, "tiny")["pinned"] is True
        assert ask(daemon, "other").json()["error"]["code"] == "model_pinned"
        assert daemon.ctl("unpin", "tiny")["model"]["pinned"] is False
        assert ask(daemon, "other").status_code == 200


def test_the_encoder_process_stays_over_a_swap(daemon: Daemon) -> None:
    assert ask(daemon, "tiny").status_code == 200
    before = daemon.children()
    assert ask(daemon, "other").status_code == 200
    after = daemon.children()
    assert after["encoder:tiny"] == before["encoder:tiny"]
    assert "decoder:tiny" not in after
    kept = state(daemon, "tiny")
    assert (kept["state"], kept["encoders_kept"]) == ("absent", 1)
    assert kept["memory_bytes"] > 1_000_000
    assert ask(daemon, "tiny").status_code == 200
    assert daemon.children()["encoder:tiny"] == before["encoder:tiny"]


def test_an_idle_model_leaves_and_comes_back(tmp_path: Path, models: Path) -> None:
    config = "[models]\nkeep_alive_min_seconds = 0\n"
    with running(tmp_path, models, config=config) as daemon:
        assert ask(daemon, "tiny").status_code == 200
        assert state(daemon, "tiny")["idle_seconds"] is None  # never, by default
        assert ask(daemon, "tiny", keep_alive="1h").status_code == 200
        assert 3500 < state(daemon, "tiny")["idle_seconds"] <= 3600
        assert ask(daemon, "tiny", keep_alive=0).status_code == 200
        until(lambda: state(daemon, "tiny")["state"] == "absent")
        until(lambda: not [name for name in daemon.children() if name.endswith(":tiny")])
        assert ask(daemon, "tiny", keep_alive=-1).status_code == 200
        assert state(daemon, "tiny")["idle_seconds"] is None
        bad = ask(daemon, "tiny", keep_alive="soon")
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, "keep_alive")


def test_what_a_load_took_is_remembered(tmp_path: Path, models: Path) -> None:
    with running(tmp_path, models) as daemon:
        assert daemon.ctl("load", "tiny")["exit"] == 0
        assert daemon.stop() == 0
    memo = json.loads((tmp_path / "state" / "models.json").read_text())["tiny"]
    assert memo["load_seconds"]["decoder.0+encoder.0"] > 0
    assert memo["peak_bytes"]["decoder.0"] > 1_000_000


def test_a_load_above_the_budget_leaves_what_works(tmp_path: Path, models: Path) -> None:
    # One model alone is admitted; nothing has been measured of the other.
    config = "[memory]\nreserve_bytes = 0\nmodels_bytes = 400_000_000\n"
    with running(tmp_path, models, config=config) as daemon:
        assert ask(daemon, "tiny").status_code == 200
        (tmp_path / "rkvlmd.toml").write_text(config.replace("400_000_000", "1_000_000"))
        assert daemon.ctl("reload")["applied"] == ["memory.models_bytes"]
        refused = ask(daemon, "other")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "insufficient_memory"
        assert daemon.ctl("load", "other")["error"]["code"] == "insufficient_memory"
        assert ask(daemon, "tiny").status_code == 200
