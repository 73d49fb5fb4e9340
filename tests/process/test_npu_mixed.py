"""A decoder for the NPU beside an ONNX vision encoder: imported, and served on a simulated board."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from onnx import TensorProto

from rkvlmd.ctl.__main__ import main
from rkvlmd.engine.detok import _table
from rkvlmd.models import templates
from tests.e2e.daemon import png, question, running
from tests.fakes import published
from tests.house.tree import ROOT
from tests.npusim import compiler, models
from tests.npusim.fixture import PYTHON, Sim
from tests.npusim.house import plug_in
from tools.exporter.graph import Graph

pytestmark = pytest.mark.process
RED, BLUE = (200, 30, 30), (30, 30, 200)
CATALOGUE, _ = templates.load([ROOT / "etc" / "models.d"])
MODEL = CATALOGUE["qwen2-vl-2b"]
SIDE, TOKENS, EMBED = 392, 196, 1536
MEAN, STD = (np.array(MODEL.onnx["encoder"][key], np.float32) for key in ("mean", "std"))


def rows_of(colour: tuple[int, int, int]) -> Any:
    """Return what the encoders below make of a picture of one colour: its colour, and each row's number."""
    values = np.array(colour, np.float32)[np.arange(EMBED) % 3]
    return values[None] + np.arange(TOKENS, dtype=np.float32)[:, None]


def colours(g: Graph, x: str) -> str:
    """Undo the normalisation of (n, 3) means; give (n, embedding) whole numbers."""
    x = g.add("Add", g.add("Mul", x, g.weight("std", STD)), g.weight("mean", MEAN))
    x = g.add("Round", g.add("Mul", x, g.scalar(255.0)))
    spread = (np.arange(EMBED) % 3 == np.arange(3)[:, None]).astype(np.float32)
    return g.add("MatMul", x, g.weight("spread", spread))


def eyes_for_a_picture(path: Path) -> None:
    """Write an encoder as Rockchip's export script makes one: a picture of one size."""
    g = Graph("vision")
    pixels = g.input("pixel", [1, 3, SIDE, SIDE])
    x = colours(g, g.add("ReduceMean", pixels, axes=[2, 3], keepdims=0))
    x = g.add("Unsqueeze", x, g.ints(1))
    numbers = np.arange(TOKENS, dtype=np.float32)[None, :, None]
    g.add("Add", x, g.weight("numbers", numbers), out="out")
    g.output("out", [1, TOKENS, EMBED])
    g.save(path)


def eyes_for_patches(path: Path) -> None:
    """Write an encoder as converters publish one: flattened patches of a picture of any size."""
    g = Graph("vision")
    pixels = g.input("pixel_values", ["patches", 1176])
    g.input("image_grid_thw", ["pictures", 3], TensorProto.INT64)
    x = g.add("Reshape", pixels, g.ints(-1, 3, 392))
    x = colours(g, g.add("ReduceMean", x, axes=[0, 2], keepdims=0))
    ones = g.add("Reshape", pixels, g.ints(-1, 4 * 1176))
    ones = g.add("Slice", ones, g.ints(0), g.ints(1), g.ints(1))
    ones = g.add("Add", g.add("Mul", ones, g.scalar(0.0)), g.scalar(1.0))
    numbers = g.add("CumSum", ones, g.weight("axis", np.array(0, np.int64)))
    g.add("Add", x, g.add("Sub", numbers, g.scalar(1.0)), out="image_features")
    g.output("image_features", ["rows", EMBED])
    g.save(path)


def download(folder: Path) -> Path:
    """Write the decoder and what lies beside it."""
    special = list(MODEL.manifest["special_strings"])
    folder.mkdir(parents=True)
    published.tokenizer(folder / "tokenizer.json", special)
    ids = {c: i for i, c in enumerate(sorted(_table()))}
    numbers = {text: 256 + i for i, text in enumerate(special)}
    models.rkllm(
        folder / "qwen2-vl-2b_w8a8_rk3588.rkllm", specials=numbers, embed=EMBED, merge=28,
        byte_ids=[ids[c] for c, _ in sorted(_table().items(), key=lambda item: item[1])],
        eos=numbers["<|im_end|>"],
    )  # fmt: skip
    return folder


@pytest.fixture
def sim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sim]:
    made = plug_in(tmp_path, monkeypatch)
    monkeypatch.setenv("PYTHONPATH", f"{PYTHON}:{os.environ.get('PYTHONPATH', '')}")
    yield made
    assert not made.trace("misuse")
    assert not made.trace("refused")


@pytest.mark.parametrize(
    ("write", "file"),
    [
        (eyes_for_a_picture, "qwen2-vl-2b_vision.onnx"),
        (eyes_for_patches, "onnx/vision_encoder.onnx"),
    ],
)
def test_pictures_are_encoded_on_the_cpu_and_read_on_the_npu(
    write: Any, file: str, sim: Sim, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, folder = download(tmp_path / "download"), tmp_path / "models"
    (source / file).parent.mkdir(exist_ok=True)
    write(source / file)
    folder.mkdir()
    assert main(["--json", "import", str(source), "--models", str(folder), "--as", "mixed"]) == 0
    notes = {note["key"]: note for note in json.loads(capsys.readouterr().out)["notes"]}
    assert "runs on the CPU" in notes["encoders[0].engine"]["says"]
    assert "rknn-toolkit2" in notes["encoders[0].engine"]["todo"]
    assert main(["--json", "check", "mixed", "--models", str(folder)]) == 0, capsys.readouterr()
    capsys.readouterr()
    config = f'[npu]\nlibrary = "{compiler.library("1.3.0")}"\nsoc = "rk3588"\n'
    with running(tmp_path, folder, config=config + "[models]\ndemo = false\n") as daemon:
        with openai.OpenAI(base_url=daemon.url + "/v1", api_key="x", max_retries=0) as api:
            done = api.chat.completions.create(
                model="mixed",
                messages=question("What is this?", png(RED), png(BLUE)),
                max_tokens=400,
            )  # type: ignore[call-overload]
        said = models.answer(done.choices[0].message.content)
        assert said["sums"] == ",".join(models.sum_of(rows_of(c)) for c in (RED, BLUE))
        assert said["size"] == f"{SIDE}x{SIDE}"
        assert done.usage.prompt_tokens_details.image_tokens == 2 * TOKENS
        assert done.usage.prompt_tokens == int(said["tokens"])
        # What the catalogue says of hidden states is what clients are told, and true.
        (card,) = httpx.get(daemon.url + "/v1/models", timeout=120).json()["data"]
        assert card["architecture"]["output_modalities"] == ["text", "embeddings"]
        with openai.OpenAI(base_url=daemon.url + "/v1", api_key="x", max_retries=0) as api:
            (one,) = api.embeddings.create(model="mixed", input="hello").data
        assert len(one.embedding) == EMBED
        assert sim.one("run")["mode"] == 1  # RKLLM_INFER_GET_LAST_HIDDEN_LAYER
        assert daemon.stop() == 0
