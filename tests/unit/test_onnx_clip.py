"""CLIP as published, two ONNX files with their projections, against transformers."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import numpy as np
import pytest

from rkvlmd.engine import vectors
from rkvlmd.engine.onnx_encoder import OnnxEncoder
from rkvlmd.engine.onnx_tower import OnnxTower
from rkvlmd.engine.pooling import text as as_text
from rkvlmd.engine.pooling import vector
from rkvlmd.models import manifest as manifests
from rkvlmd.wire import child
from tests.fakes.clip import END, PLACES, SIDE, SIZE, START, Clip

pytestmark = pytest.mark.torch


def test_both_towers_equal_transformers(tmp_path: Path) -> None:
    reference = Clip()
    reference.publish(tmp_path)

    def entry(name: str) -> dict[str, str]:
        return {"file": name, "sha256": hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}

    tree = {
        "schema": 1,
        "name": "clip",
        "family": "clip",
        "encoders": [{"engine": "onnx", **entry("onnx/vision_model.onnx"), "width": SIDE, "height": SIDE,
                      "tokens": 1, "embedding": SIZE}],
        "decoder": {"engine": "tower", "files": {"text": entry("onnx/text_model.onnx")}, "context": PLACES,
                    "embedding": SIZE},
        "tokenizer": {"file": "tokenizer.json", "sha256": "0" * 64},
        "embeddings": {"inputs": ["text", "image"], "pictures": "rows"},
        "capabilities": ["image", "embeddings"],
    }  # fmt: skip
    manifest = manifests.parse(msgspec.json.encode(tree))
    assert manifest.embeddings is not None
    load = child.Load(folder=str(tmp_path), manifest=manifests.to_builtins(manifest))
    encoder, tower = OnnxEncoder(), OnnxTower()
    encoder.load(load, lambda *_: None)
    tower.load(load, lambda *_: None)

    tokens = [START, 11, 42, 7, END]
    pixels = np.random.default_rng(1).normal(size=(1, 3, SIDE, SIDE)).astype(np.float32)
    said, seen = reference.vectors(tokens, pixels)
    order = child.Embed(id=1, tokens=tokens)
    rows = encoder.encode(pixels)
    assert np.abs(vector([tower.embed(order, [])], manifest.embeddings) - said).max() < 1e-5
    assert np.abs(vector([rows], manifest.embeddings) - seen).max() < 1e-5
    # And as the child says it.
    look = child.Embed(id=2, tokens=[0], spans=[child.Span(start=0, count=1, key="k")])
    done = vectors.embed(tower, look, [rows], manifest.embeddings)
    assert done.vector == as_text(vector([rows], manifest.embeddings))
