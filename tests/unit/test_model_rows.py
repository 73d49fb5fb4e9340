"""Rows of a checkpoint as files, and that a model takes them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.house.tree import ROOT
from tools.exporter import rows

WIDTH = 5


def checkpoint(folder: Path, config: dict[str, Any], **tensors: tuple[str, Any]) -> Path:
    """Write safetensors of (type, float32 values); keys have dots for double underscores."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, data = {}, b""
    for key, (kind, values) in tensors.items():
        values = np.asarray(values, np.float32)
        if kind == "BF16":
            part = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
        else:
            part = values.astype({"F32": "<f4", "F16": "<f2"}[kind]).tobytes()
        where = [len(data), len(data) + len(part)]
        header[key.replace("__", ".")] = {
            "dtype": kind, "shape": list(values.shape), "data_offsets": where,
        }  # fmt: skip
        data += part
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


def table(words: int = 7) -> npt.NDArray[np.float32]:
    return np.arange(words * WIDTH, dtype=np.float32).reshape(words, WIDTH) / 4


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_the_table_is_written_in_blocks(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "BLOCK", 3)
    source = checkpoint(
        tmp_path / "hf",
        {"model_type": "minicpmv"},
        llm__model__embed_tokens__weight=(kind, table()),
    )
    (said,) = rows.write(source, tmp_path)
    assert said == "embed.npy: llm.model.embed_tokens.weight, 7 x 5 in float16"
    found = np.load(tmp_path / "embed.npy")
    assert found.dtype == np.float16
    assert np.array_equal(found, table())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["embed.npy", "hf"]


@pytest.mark.process
def test_the_command_writes_both_files_of_deepseek_ocr(tmp_path: Path) -> None:
    newline, separator = np.full(WIDTH, 1.5), np.full(WIDTH, -2.5)
    source = checkpoint(
        tmp_path / "hf", {"model_type": "deepseek_vl_v2"}, model__image_newline=("BF16", newline),
        model__view_seperator=("BF16", separator), model__embed_tokens__weight=("BF16", table()),
    )  # fmt: skip
    command = [sys.executable, str(ROOT / "tools" / "model_rows"), str(source), str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[0].startswith("separators.npy: model.image_newline")
    assert np.array_equal(np.load(tmp_path / "separators.npy"), np.stack([newline, separator]))
    assert (tmp_path / "embed.npy").is_file()


@pytest.mark.parametrize(
    ("config", "values", "says"),
    [
        ({"model_type": "gemma3n"}, table(), "multiplies its embeddings"),
        ({"model_type": "m", "scale_emb": 12}, table(), "multiplies its embeddings"),
        ({"model_type": "m"}, table() * 1e6, "does not hold"),
    ],
)
def test_what_would_be_wrong_is_refused(
    config: dict[str, Any], values: Any, says: str, tmp_path: Path, capsys: Any
) -> None:
    source = checkpoint(tmp_path / "hf", config, model__embed_tokens__weight=("F32", values))
    assert rows.main([str(source), str(tmp_path)]) == 1
    assert says in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_other_folders_are_told(tmp_path: Path, capsys: Any) -> None:
    source = checkpoint(tmp_path / "hf", {"model_type": "m"}, other__weight=("F32", table()))
    assert rows.main([str(source), str(tmp_path)]) == 1
    assert "the weights have no embed_tokens.weight" in capsys.readouterr().err
    assert rows.main([str(tmp_path / "none"), str(tmp_path)]) == 1
