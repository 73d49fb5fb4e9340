"""An ONNX checkpoint as published, imported beside a running daemon, and then served by it."""

from __future__ import annotations

import shutil
from pathlib import Path

import openai
import pytest

from rkvlmd.ctl.__main__ import main
from tests.e2e.daemon import png, question, running
from tests.fakes import tiny_model

pytestmark = pytest.mark.process


def test_a_folder_is_dropped_imported_and_answers(tmp_path: Path) -> None:
    source, models = tmp_path / "SmolVLM-tiny", tmp_path / "models"
    tiny_model.make_model(source)
    (source / "rkvlm.json").unlink()
    (source / "onnx").mkdir()
    for graph in source.glob("*.onnx"):
        graph.rename(source / "onnx" / graph.name)
    for name in ("config.json", "preprocessor_config.json", "generation_config.json"):
        shutil.copy(tmp_path / ".SmolVLM-tiny.checkpoint" / name, source / name)
    models.mkdir()
    with running(tmp_path, models) as daemon:
        assert main(["import", str(source), "--as", "tiny", "--models", str(models)]) == 0
        # The download may go: the model has its files.
        shutil.rmtree(source)
        assert daemon.ctl("reload")["models"]["added"] == ["tiny"]
        with openai.OpenAI(base_url=daemon.url + "/v1", api_key="x", max_retries=0) as api:
            assert {card.id for card in api.models.list()} == {"demo", "tiny"}
            told = [
                api.chat.completions.create(
                    model="tiny", messages=question("What is this?", *pictures), max_tokens=4
                )  # type: ignore[call-overload]
                for pictures in ((png(),), (png(), png((1, 2, 3))))
            ]
        assert [t.usage.prompt_tokens_details.image_tokens for t in told] == [4, 8]
        assert daemon.stop() == 0
