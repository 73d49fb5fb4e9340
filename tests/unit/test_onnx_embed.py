"""Hidden states of ONNX decoders, and text towers."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from onnx import TensorProto

from rkvlmd.engine.onnx_decoder import CHUNK, OnnxDecoder
from rkvlmd.engine.onnx_tower import OnnxTower
from rkvlmd.errors import ManifestError, RkvlmdError
from rkvlmd.models import manifest as manifests
from rkvlmd.wire import child
from tests.fakes import tiny_model
from tools.exporter import smolvlm
from tools.exporter.graph import Graph

LONG = [5 + i % 250 for i in range(CHUNK + 30)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make_hf(tmp_path_factory.mktemp("hf"))


@pytest.fixture(params=["plain", "gqa"])
def decoder(request: pytest.FixtureRequest, checkpoint: Path, tmp_path: Path) -> OnnxDecoder:
    made = smolvlm.export(
        checkpoint, tmp_path / "tiny", name="tiny", attention=request.param, hidden=True
    )
    return loaded(tmp_path / "tiny", made)


def loaded(folder: Path, manifest: manifests.Manifest) -> OnnxDecoder:
    found = OnnxDecoder()
    order = child.Load(
        folder=str(folder), manifest=manifests.to_builtins(manifest), options={"threads": 2}
    )
    found.load(order, lambda *_: None)
    return found


def embed(tokens: list[int], **more: Any) -> child.Embed:
    return child.Embed(id=1, tokens=tokens, **more)


@pytest.mark.torch
def test_hidden_states_equal_transformers(checkpoint: Path, decoder: OnnxDecoder) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from transformers import SmolVLMForConditionalGeneration

        reference: Any = SmolVLMForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        with torch.no_grad():
            wanted = reference.model(input_ids=torch.tensor([LONG])).last_hidden_state[0].numpy()
    found = decoder.embed(embed(LONG), [])
    assert found.shape == wanted.shape, "all places, over more than one chunk"
    assert np.abs(found - wanted).max() < 1e-4


def test_rows_of_a_picture_stand_at_their_places(decoder: OnnxDecoder) -> None:
    count, size = 4, 64
    tokens = [9, *[tiny_model.IMAGE] * count, 11]
    span = child.Span(start=1, count=count, key="p")
    rows = [np.random.default_rng(i).normal(size=(count, size)).astype(np.float32) for i in (1, 2)]
    first, second = (decoder.embed(embed(tokens, spans=[span]), [r]) for r in rows)
    assert np.array_equal(first[0], second[0]), "before the picture"
    assert np.abs(first[-1] - second[-1]).max() > 1e-3, "after it"


def test_the_cache_of_the_conversation_stays(decoder: OnnxDecoder) -> None:
    prompt = list(range(5, 45))
    order = child.Generate(id=1, tokens=prompt, max_tokens=4)

    def said() -> tuple[int, list[str]]:
        heard: list[Any] = []
        decoder.generate(order, [], heard.append)
        return heard[0].cached, [m.text for m in heard[1:]]

    before = said()
    decoder.embed(embed(LONG), [])
    after = said()
    assert (before[0], after[0]) == (0, len(prompt) - 1)
    assert after[1] == before[1]


def test_a_prompt_above_the_context_is_refused(decoder: OnnxDecoder) -> None:
    with pytest.raises(RkvlmdError) as error:
        decoder.embed(embed([5] * 600), [])
    assert error.value.code == "context_length_exceeded"


def test_a_file_without_hidden_states_does_not_load(checkpoint: Path, tmp_path: Path) -> None:
    made = smolvlm.export(checkpoint, tmp_path / "tiny", name="tiny")
    made = msgspec.structs.replace(
        made, embeddings=manifests.Embeddings(), capabilities=(*made.capabilities, "embeddings")
    )
    with pytest.raises(RkvlmdError, match=r"embeddings\.output: .* has no output hidden_states"):
        loaded(tmp_path / "tiny", made)
    # The rows of pictures are made by the encoder.
    rows = manifests.Embeddings(inputs=("image",), pictures="rows")
    plain = loaded(tmp_path / "tiny", msgspec.structs.replace(made, embeddings=rows))
    with pytest.raises(RkvlmdError, match="no hidden states"):
        plain.embed(embed([5]), [])


# --- text towers ---------------------------------------------------------------------


def tower(folder: Path, *, places: int | str = "places", mask: bool = False) -> OnnxTower:
    """Return a tower whose vector is the mean of its tokens' rows, or their sum under a mask."""
    g = Graph("text_model")
    ids = g.input("input_ids", ["batch", places], TensorProto.INT64)
    table = np.arange(40, dtype=np.float32).reshape(10, 4)
    rows = g.add("Gather", g.weight("table", table), ids)
    if mask:
        given = g.input("attention_mask", ["batch", places], TensorProto.INT64)
        weights = g.add("Unsqueeze", g.add("Cast", given, to=TensorProto.FLOAT), g.ints(2))
        rows = g.add("Mul", rows, weights)
    g.add("ReduceMean", rows, out="text_embeds", axes=[1], keepdims=0)
    g.output("last_hidden_state_unused", ["batch", places, 4])
    g.add("Identity", rows, out="last_hidden_state_unused")
    g.output("text_embeds", ["batch", 4])
    folder.mkdir()
    g.save(folder / "text.onnx")
    sha = hashlib.sha256((folder / "text.onnx").read_bytes()).hexdigest()
    manifest = manifests.parse(
        msgspec.json.encode(
            {
                "schema": 1,
                "name": "tower",
                "family": "smolvlm",
                "decoder": {
                    "engine": "tower",
                    "files": {"text": {"file": "text.onnx", "sha256": sha}},
                    "context": 8,
                    "embedding": 4,
                },
                "tokenizer": {"file": "tokenizer.json", "sha256": "0" * 64},
                "embeddings": {"pictures": "rows"},
                "capabilities": ["embeddings"],
            }
        )
    )
    found = OnnxTower()
    order = child.Load(folder=str(folder), manifest=manifests.to_builtins(manifest))
    info = found.load(order, lambda *_: None)
    assert info["embedding"] == 4
    return found


def test_a_tower_gives_its_projected_output(tmp_path: Path) -> None:
    found = tower(tmp_path / "t").embed(embed([0, 2]), [])
    assert found.tolist() == [[4, 5, 6, 7]]


def test_a_fixed_length_is_filled_with_the_last_token(tmp_path: Path) -> None:
    found = tower(tmp_path / "t", places=8).embed(embed([0, 2]), [])
    assert np.allclose(found, [[7, 8, 9, 10]])  # seven times row 2


def test_the_mask_tells_text_from_filling(tmp_path: Path) -> None:
    found = tower(tmp_path / "t", places=8, mask=True).embed(embed([0, 2]), [])
    assert np.allclose(found, [[1, 1.25, 1.5, 1.75]])  # (row 0 + row 2) / 8


@pytest.mark.parametrize("tokens", [[], [1] * 9])
def test_a_tower_has_a_longest_text(tmp_path: Path, tokens: list[int]) -> None:
    with pytest.raises(RkvlmdError, match="1 to 8 tokens") as error:
        tower(tmp_path / "t").embed(embed(tokens), [])
    assert error.value.code == "context_length_exceeded"


def test_a_tower_writes_no_text_and_mixes_nothing(tmp_path: Path) -> None:
    made = tower(tmp_path / "t")
    with pytest.raises(RkvlmdError, match="writes no text"):
        made.generate(child.Generate(id=1, tokens=[1], max_tokens=1), [], lambda _m: None)
    with pytest.raises(RkvlmdError, match="not both"):
        made.embed(embed([1]), [np.zeros((1, 4), np.float32)])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"embeddings": None}, "decoder.engine: embeddings are not described"),
        ({"embeddings": {}}, "embeddings.pictures: must be rows"),
        ({"capabilities": []}, "embeddings: not among the capabilities"),
        ({"embeddings": {"pictures": "rows", "inputs": []}}, "embeddings.inputs: must name"),
        ({"embeddings": {"pictures": "rows", "inputs": ["image"]}}, "image without an encoder"),
        ({"tokenizer": None}, "tokenizer: needed by a text tower"),
    ],
)
def test_a_tower_that_does_not_fit_together(changes: dict[str, Any], problem: str) -> None:
    tree: dict[str, Any] = {
        "schema": 1,
        "name": "tower",
        "family": "smolvlm",
        "decoder": {
            "engine": "tower",
            "files": {"text": {"file": "text.onnx", "sha256": "0" * 64}},
            "context": 8,
            "embedding": 4,
        },
        "tokenizer": {"file": "tokenizer.json", "sha256": "0" * 64},
        "embeddings": {"pictures": "rows"},
        "capabilities": ["embeddings"],
    }
    with pytest.raises(ManifestError, match=problem):
        manifests.parse(msgspec.json.encode({**tree, **changes}))
