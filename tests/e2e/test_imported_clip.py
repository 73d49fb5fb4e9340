"""A CLIP as published, imported and served: its vectors are those of transformers."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

from rkvlmd.ctl.__main__ import main
from tests.e2e.daemon import Daemon, running
from tests.fakes.clip import END, PLACES, SIDE, SIZE, START, Clip
from tools.exporter import folder as exporter

pytestmark = [pytest.mark.process, pytest.mark.torch]
TEXTS = ("a red picture", "A Picture of NOTHING", "blue")
EXACT = "[media]\nexact = true\n"


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip()


def pictures() -> list[Image.Image]:
    """Return a wide and a tall picture of noise: the middle is what counts."""
    noise = np.random.default_rng(5)
    return [
        Image.fromarray(noise.integers(0, 256, (high, wide, 3), np.uint8))
        for wide, high in ((70, 40), (33, 90))
    ]


def shown(picture: Image.Image) -> list[dict[str, Any]]:
    data = io.BytesIO()
    picture.save(data, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return [{"type": "image_url", "image_url": {"url": url}}]


def vectors(daemon: Daemon, model: str, *given: Any) -> Any:
    body = {"model": model, "input": list(given)}
    answer = httpx.post(daemon.url + "/v1/embeddings", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return np.array([item["embedding"] for item in answer.json()["data"]])


def same(daemon: Daemon, model: str, clip: Clip) -> None:
    """Compare vectors of texts and pictures with those of transformers."""
    seen = pictures()
    found = vectors(daemon, model, *TEXTS, *(shown(picture) for picture in seen))
    wanted = [*map(clip.of_text, TEXTS), *map(clip.of_picture, seen)]
    assert found.shape == (5, SIZE)
    assert np.abs(found - np.array(wanted)).max() < 1e-4
    # And they differ from each other by far more.
    assert np.abs(found[0] - found[1]).max() > 1e-2
    assert np.abs(found[3] - found[4]).max() > 1e-2


def test_published_towers_are_imported_and_give_the_vectors_of_transformers(
    clip: Clip, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    source = clip.publish(tmp_path / "My CLIP")
    with running(tmp_path, models, config=EXACT) as daemon:
        assert main(["--json", "import", str(source), "--as", "clip", "--models", str(models)]) == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["family"], said["notes"], said["unverified"]) == ("clip", [], [])
        assert main(["--json", "check", "clip", "--models", str(models)]) == 0
        assert {f["status"] for f in json.loads(capsys.readouterr().out)["findings"]} == {"ok"}
        assert daemon.ctl("reload")["models"]["added"] == ["clip"]
        cards = {
            c["id"]: c for c in httpx.get(daemon.url + "/v1/models", timeout=120).json()["data"]
        }
        assert cards["clip"]["architecture"]["output_modalities"] == ["embeddings"]
        same(daemon, "clip", clip)
        long = httpx.post(
            daemon.url + "/v1/embeddings", json={"model": "clip", "input": "red " * 40}, timeout=120
        )
        assert long.status_code == 400
        assert f"the model's context holds {PLACES}" in long.json()["error"]["message"]
        assert daemon.stop() == 0


def test_towers_in_one_graph_are_taken_apart(
    clip: Clip, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    source = clip.publish(tmp_path / "download", whole=True)
    before = sorted(str(p) for p in source.rglob("*"))
    assert main(["--json", "import", str(source), "--as", "clip", "--models", str(models)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [note["key"] for note in said["notes"]] == ["decoder.files"]
    assert sorted(str(p) for p in source.rglob("*")) == before
    made = sorted(p.relative_to(models / "clip").as_posix() for p in models.rglob("*.*"))
    assert made == [
        "onnx/text_model.onnx", "onnx/vision_model.onnx", "rkvlm.json", "tokenizer.json",
    ]  # fmt: skip
    # Neither has the other's weights.
    sizes = [(models / "clip" / name).stat().st_size for name in made[:2]]
    assert sum(sizes) < 1.1 * (source / "onnx/model.onnx").stat().st_size
    assert [p.name for p in models.iterdir()] == ["clip"]
    with running(tmp_path, models, config=EXACT) as daemon:
        same(daemon, "clip", clip)
        assert daemon.stop() == 0


@pytest.mark.parametrize("end", [END, 2])
def test_the_end_of_a_text_is_where_the_checkpoint_has_it(end: int, tmp_path: Path) -> None:
    """The first checkpoints call it 2 and mean the largest id; later ones say the id itself."""
    made = Clip(end)
    exporter.export(made.checkpoint(tmp_path / "checkpoint"), tmp_path / "out", name="x")
    session = ort.InferenceSession(
        tmp_path / "out" / "text_model.onnx", providers=["CPUExecutionProvider"]
    )
    tokens = [START, 5, END, 7, 7]  # what follows the end does not count
    (found,) = session.run(["text_embeds"], {"input_ids": np.array([tokens], np.int64)})
    wanted, _ = made.vectors(tokens, np.zeros((1, 3, SIDE, SIDE), np.float32))
    assert np.abs(found[0] / np.linalg.norm(found[0]) - wanted).max() < 1e-5


def test_an_exported_checkpoint_gives_the_vectors_of_transformers(
    clip: Clip, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = tmp_path / "models"
    checkpoint = clip.checkpoint(tmp_path / "checkpoint")
    made = exporter.export(checkpoint, models / "mine", name="mine")
    assert made.decoder.engine == "tower"
    assert main(["--json", "check", "mine", "--models", str(models)]) == 0
    assert {f["status"] for f in json.loads(capsys.readouterr().out)["findings"]} == {"ok"}
    with running(tmp_path, models, config=EXACT) as daemon:
        same(daemon, "mine", clip)
        assert daemon.stop() == 0
