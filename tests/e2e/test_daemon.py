"""The real daemon, its real children, and the real ``openai`` client."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest

from tests.e2e.daemon import Daemon, gone, png, question, running
from tests.fakes.tiny_model import make_model

pytestmark = pytest.mark.process


def client(daemon: Daemon, **more: object) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=daemon.url + "/v1", api_key="x", max_retries=0, timeout=120, **more
    )  # type: ignore[arg-type]


def test_openai_client_streams_what_it_would_get_whole(daemon: Daemon) -> None:
    with client(daemon) as api:
        assert {m.id for m in api.models.list()} == {"demo", "other", "tiny"}
        messages = question("What?", png())
        whole = api.chat.completions.create(model="tiny", messages=messages, max_tokens=12)
        with api.chat.completions.create(
            model="tiny", messages=messages, max_tokens=12, stream=True,
            stream_options={"include_usage": True},
        ) as stream:  # fmt: skip
            chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert whole.usage.prompt_tokens_details.image_tokens == 4
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1
    assert whole.choices[0].finish_reason == "length"


def test_same_seed_same_text(daemon: Daemon) -> None:
    def ask(seed: int) -> str | None:
        return (
            api.chat.completions.create(
                model="tiny",
                messages=question("Go", png()),
                max_tokens=16,
                temperature=1.5,
                seed=seed,
            )
            .choices[0]
            .message.content
        )

    with client(daemon) as api:
        ask(1)  # the cache holds the prompt from here on
        assert ask(1) == ask(1)
        assert len({ask(seed) for seed in range(5)}) > 1


def test_errors_reach_the_client_with_their_codes(daemon: Daemon) -> None:
    with client(daemon) as api:
        with pytest.raises(openai.NotFoundError) as missing:
            api.chat.completions.create(model="nope", messages=question("x"))
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            api.chat.completions.create(
                model="tiny", messages=question("x", png(), "data:image/png;base64,AAAA")
            )
        assert bad.value.code == "invalid_image_format"
        assert bad.value.param == "messages[0].content[1].image_url"
        with pytest.raises(openai.BadRequestError) as long:
            api.chat.completions.create(model="tiny", messages=question("word " * 2000))
        assert long.value.code == "context_length_exceeded"
        api.chat.completions.create(model="tiny", messages=question("x", png()), max_tokens=1)


def test_killing_a_child_costs_nothing_else(daemon: Daemon) -> None:
    with client(daemon) as api:
        ask = {"model": "tiny", "messages": question("x", png()), "max_tokens": 4}
        first = api.chat.completions.create(**ask).choices[0].message.content  # type: ignore[call-overload]
        children = daemon.children()
        assert {"encoder:tiny", "decoder:tiny"} < set(children)
        assert any(name.startswith("prep") for name in children)
        for name, pid in children.items():
            os.kill(pid, signal.SIGKILL)
            assert gone(pid), name
            again = api.chat.completions.create(**ask).choices[0].message.content  # type: ignore[call-overload]
            assert again == first, name


def test_rkvlmctl_load_unload_status_cancel(daemon: Daemon) -> None:
    assert daemon.ctl("load", "tiny")["model"]["state"] == "ready"
    assert daemon.ctl("load", "other")["model"]["state"] == "ready"
    states = {m["name"]: m["state"] for m in daemon.ctl("models")["models"]}
    assert states["tiny"] == "absent"
    assert states["other"] == "ready"
    assert daemon.ctl("unload", "other")["model"]["held"] is True
    with client(daemon) as api, pytest.raises(openai.InternalServerError) as info:
        api.chat.completions.create(model="other", messages=question("x"))
    assert info.value.code == "model_unloaded"
    assert daemon.ctl("load", "nope")["exit"] == 1
    assert daemon.ctl("cancel", "nothing")["exit"] == 1
    assert daemon.ctl("status")["state"] == "serving"


def test_rkvlmctl_ask(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(base64.b64decode(png().partition(",")[2]))
    answer = daemon.ctl(
        "ask", "--image", str(tmp_path / "p.png"), "--model", "tiny", "--max-tokens", "5", "What?"
    )
    assert answer["exit"] == 0
    assert answer["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_is_clean(daemon: Daemon, number: int) -> None:
    with client(daemon) as api:
        api.chat.completions.create(model="tiny", messages=question("x", png()), max_tokens=2)
    pids = daemon.children().values()
    assert len(pids) == 3
    assert daemon.stop(number) == 0
    assert all(gone(pid) for pid in pids)
    assert not daemon.control.exists()
    with pytest.raises(OSError, match="refused"), socket.socket() as probe:
        host, port = daemon.url.removeprefix("http://").split(":")
        probe.connect((host, int(port)))


def test_the_daemon_imports_nothing_heavy(tmp_path: Path, models: Path) -> None:
    with running(tmp_path, models, python=["-X", "importtime"]) as daemon:
        with client(daemon) as api:
            api.chat.completions.create(model="tiny", messages=question("x", png()), max_tokens=2)
        daemon.ctl("status")
        assert daemon.stop() == 0
    imported = set(re.findall(r"\| +([\w.]+)$", daemon.log, re.MULTILINE))
    assert "trio" in imported
    heavy = {
        "numpy",
        "PIL",
        "tokenizers",
        "jinja2",
        "torch",
        "transformers",
        "onnxruntime",
        "rkvlmd.engine",
    }
    assert not {name for name in imported if name in heavy or name.partition(".")[0] in heavy}


def test_a_host_that_is_not_ours_is_refused(daemon: Daemon) -> None:
    answer = httpx.get(daemon.url + "/v1/models", headers={"host": "evil.example"}, timeout=120)
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "host_not_allowed"


def test_wrong_hash_missing_and_cut_files(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    make_model(folder / "good", name="good")
    for name, spoil in (("changed", b"x"), ("cut", None)):
        make_model(folder / name, name=name)
        path = folder / name / "decoder_model_merged.onnx"
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if spoil is None else data[:-1] + spoil)
    rubbish = folder / "rubbish"
    make_model(rubbish, name="rubbish")
    was = hashlib.sha256((rubbish / "decoder_model_merged.onnx").read_bytes()).hexdigest()
    (rubbish / "decoder_model_merged.onnx").write_bytes(b"this is no model")
    now = hashlib.sha256(b"this is no model").hexdigest()
    manifest = rubbish / "rkvlm.json"
    manifest.write_text(manifest.read_text().replace(was, now))
    make_model(folder / "missing", name="missing")
    (folder / "missing" / "vision_encoder.onnx").unlink()
    check = subprocess.run(
        [sys.executable, "-m", "rkvlmd", "--check", "--models", str(folder), "--state", str(tmp_path)],
        capture_output=True, check=False,
    )  # fmt: skip
    assert check.returncode == 78
    assert b"missing" in check.stdout + check.stderr
    assert b"encoders[0].file" in check.stdout + check.stderr
    with running(tmp_path, folder) as daemon:
        for name in ("changed", "cut", "rubbish"):
            refused = daemon.ctl("load", name)
            assert refused["exit"] == 1
            assert "decoder" in refused["error"]["message"]
        with client(daemon) as api:
            with pytest.raises(openai.APIStatusError):
                api.chat.completions.create(model="changed", messages=question("x"))
            good = api.chat.completions.create(model="good", messages=question("x"), max_tokens=1)
        assert good.usage is not None
        assert good.usage.completion_tokens == 1


def test_second_daemon_on_the_same_socket_says_so(
    daemon: Daemon, models: Path, tmp_path: Path
) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "rkvlmd", "--http", "127.0.0.1:0", "--control", str(daemon.control),
         "--models", str(models), "--state", str(tmp_path / "s2")],
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert second.returncode == 1
    assert second.stdout == b""
    assert daemon.ctl("status")["state"] == "serving"
