"""The demo model answers through the Rockchip engine as it does through the CPU engine.

The simulated library hands the prompt and the embeddings that it received to the demo model's
decoder, so a float in a wrong place would change an answer.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from rkvlmd.models.catalog import DEMO
from tests.e2e.daemon import ROOT, Daemon, running
from tests.npusim import compiler, models
from tests.npusim.fixture import Sim
from tests.npusim.house import plug_in

pytestmark = pytest.mark.process

#: Questions for each skill, and the skills: one picture, two pictures, follow-ups.
EACH = 4
SKILLS = ("caption", "count", "where", "different", "nth_picture", "follow_up")


@pytest.fixture
def sim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sim:
    return plug_in(tmp_path, monkeypatch)


@pytest.fixture
def mind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    path = str(tmp_path / "mind.sock")
    with subprocess.Popen(
        [sys.executable, "-m", "tests.npusim.mind", path, DEMO], stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        monkeypatch.setenv("NPUSIM_MIND", path)
        yield
        process.kill()


def on_npu(folder: Path, version: str) -> None:
    """Write the demo model with its decoder on the NPU: the same files, another manifest."""
    folder.mkdir(parents=True)
    tree = json.loads((DEMO / "rkvlm.json").read_text())
    for file in ("vision_encoder.onnx", "tokenizer.json", "chat_template.jinja"):
        (folder / file).symlink_to(DEMO / file)
    decoder = tree["decoder"]
    model = models.rkllm(
        folder / "demo.rkllm", embed=decoder["embedding"], specials=tree["special_strings"]
    )
    entry = {"file": model.name, "sha256": hashlib.sha256(model.read_bytes()).hexdigest()}
    tree |= {"name": folder.name, "decoder": {
        "engine": "rkllm", "files": {"model": entry}, "context": decoder["context"],
        "embedding": decoder["embedding"], "runtime_versions": [version], "lease": "npu",
    }}  # fmt: skip
    (folder / "rkvlm.json").write_text(json.dumps(tree))


@pytest.fixture
def board(sim: Sim, mind: None) -> Iterator[Daemon]:
    libraries, where = sim.folder / "libraries", sim.folder / "models"
    libraries.mkdir()
    for name, version in (("new", "1.3.0"), ("old", "1.2.3")):
        (libraries / f"librkllmrt-{version}.so").symlink_to(compiler.library(version))
        on_npu(where / name, version)
    config = f'[npu]\nlibrary = "{libraries}"\nsoc = "rk3588"\n'
    with running(sim.folder, where, config=config) as daemon:
        yield daemon


def uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def cases(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from demoworld import heldout
    from demoworld.text import Fonts

    return [c for s in SKILLS for c in heldout.cases(s, EACH, Fonts(None), "independent")]


def messages(case: Any) -> list[dict[str, Any]]:
    pictures = iter(case.pictures)

    def part(value: dict[str, Any]) -> dict[str, Any]:
        if value["type"] == "text":
            return value
        return {"type": "image_url", "image_url": {"url": uri(next(pictures))}}

    return [
        m if isinstance(m["content"], str) else m | {"content": [part(p) for p in m["content"]]}
        for m in case.messages
    ]


def test_the_same_answers(sim: Sim, board: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = cases(monkeypatch)
    answers: dict[str, list[str | None]] = {}
    with openai.OpenAI(base_url=board.url + "/v1", api_key="x", max_retries=0, timeout=120) as api:
        for model in ("demo", "new", "old"):
            answers[model] = [
                api.chat.completions.create(
                    model=model, messages=messages(case), max_tokens=140, temperature=0
                )
                .choices[0]
                .message.content
                for case in asked
            ]
    right = [case.expected == answer for case, answer in zip(asked, answers["demo"], strict=True)]
    assert sum(right) >= len(asked) // 2, list(zip(asked, answers["demo"], strict=True))
    assert answers["new"] == answers["demo"]
    assert answers["old"] == answers["demo"]
    runs = [
        e for e in sim.trace("run") if e["kind"] == "multimodal" and e["prompt"] != "a <image> b"
    ]
    assert len(runs) == 2 * len(asked)
    assert not sim.trace("misuse")
