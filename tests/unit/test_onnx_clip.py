"""CLIP as published, two ONNX files with their projections, against transformers."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

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

pytestmark = pytest.mark.torch
SIDE, SIZE, PLACES = 32, 24, 16
START, END = 97, 98


class Reference:
    """A tiny CLIP with random weights, and its two files in ``folder``."""

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch
            from transformers import CLIPConfig, CLIPModel

            self.torch = torch
            torch.manual_seed(3)
            both = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2,
                    "num_attention_heads": 4}  # fmt: skip
            text = {**both, "vocab_size": 99, "max_position_embeddings": PLACES,
                    "bos_token_id": START, "eos_token_id": END, "pad_token_id": END}  # fmt: skip
            eyes = {**both, "image_size": SIDE, "patch_size": 8}
            config = CLIPConfig(text_config=text, vision_config=eyes, projection_dim=SIZE)
            self.model: Any = CLIPModel._from_config(config, attn_implementation="eager").eval()
            self.model.requires_grad_(False)  # so that its weights become constants
            self._export(folder)

    def _export(self, folder: Path) -> None:
        torch, model = self.torch, self.model

        class Text(torch.nn.Module):  # type: ignore[misc, name-defined]
            def forward(self, input_ids: Any) -> Any:
                found = model.text_model(input_ids=input_ids)
                return model.text_projection(found.pooler_output), found.last_hidden_state

        class Eyes(torch.nn.Module):  # type: ignore[misc, name-defined]
            def forward(self, pixel_values: Any) -> Any:
                found = model.vision_model(pixel_values=pixel_values)
                return model.visual_projection(found.pooler_output), found.last_hidden_state

        for module, example, path, name, out in (
            (Text(), torch.tensor([[START, 5, END]]), "text.onnx", "input_ids", "text_embeds"),
            (Eyes(), torch.zeros(1, 3, SIDE, SIDE), "vision.onnx", "pixel_values", "image_embeds"),
        ):
            torch.onnx.export(
                module, (example,), str(folder / path), input_names=[name],
                output_names=[out, "last_hidden_state"], dynamo=False, opset_version=17,
                dynamic_axes={name: {1: "places"}} if name == "input_ids" else {},
            )  # fmt: skip

    def vectors(self, tokens: list[int], pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the normalised vectors of a text and a picture."""
        torch = self.torch
        with torch.no_grad():
            said = self.model.get_text_features(input_ids=torch.tensor([tokens]))
            seen = self.model.get_image_features(pixel_values=torch.from_numpy(pixels))
        found = [getattr(f, "pooler_output", f)[0].numpy() for f in (said, seen)]
        return found[0] / np.linalg.norm(found[0]), found[1] / np.linalg.norm(found[1])


def test_both_towers_equal_transformers(tmp_path: Path) -> None:
    reference = Reference(tmp_path)

    def entry(name: str) -> dict[str, str]:
        return {"file": name, "sha256": hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}

    tree = {
        "schema": 1,
        "name": "clip",
        "family": "clip",
        "encoders": [{"engine": "onnx", **entry("vision.onnx"), "width": SIDE, "height": SIDE,
                      "tokens": 1, "embedding": SIZE}],
        "decoder": {"engine": "tower", "files": {"text": entry("text.onnx")}, "context": PLACES,
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
