"""The export tool: what it writes, that it repeats, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkvlmd.engine import onnx_cache, onnx_common
from rkvlmd.models import manifest as manifests
from tests.fakes import tiny_model
from tools.exporter import cli, parts, quantize, text
from tools.exporter.graph import Graph
from tools.exporter.weights import CheckpointError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make_hf(tmp_path_factory.mktemp("hf"))


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "hf")


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.process
def test_the_command_writes_a_whole_model_folder(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "tools/export_onnx"), str(checkpoint), str(out)]
    done = subprocess.run(
        [*command, "--name", "demo"], check=True, capture_output=True, text=True, timeout=120
    )
    assert "vision_encoder.onnx" in done.stdout
    manifest = manifests.parse((out / manifests.FILE).read_bytes())
    assert manifests.file_problems(manifest, out) == []
    found = digests(out)
    for key, entry in manifests.files(manifest).items():
        assert found[entry.file] == entry.sha256, key
    assert (manifest.name, manifest.family, manifest.marker) == ("demo", "smolvlm", "<image>")
    assert manifest.image == manifests.Tags(
        start="<fake_token_around_image><global-img>",
        content="<image>",
        end="<fake_token_around_image>",
    )
    assert set(manifest.special_strings) == set(tiny_model.SPECIALS)
    assert manifest.stop_ids == (tiny_model.END,)
    encoder = manifest.encoders[0]
    assert (encoder.width, encoder.height, encoder.tokens, encoder.embedding) == (32, 32, 4, 64)
    assert (encoder.resize.rule, encoder.resize.resample) == ("stretch", "bicubic")
    assert (encoder.mean, encoder.std) == ((0.5,) * 3, (0.5,) * 3)
    assert (manifest.decoder.context, manifest.decoder.kv_bytes_per_token) == (512, 768)


@pytest.mark.parametrize("attention", ["plain", "gqa"])
@pytest.mark.parametrize("quantize", ["none", "half", "int8", "int4"])
def test_the_same_checkpoint_gives_the_same_bytes(
    checkpoint: Path, tmp_path: Path, attention: str, quantize: str
) -> None:
    options = ["--attention", attention, "--quantize", quantize, "--name", "x"]
    for out in ("one", "two"):
        assert cli.main([str(checkpoint), str(tmp_path / out), *options]) == 0
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


@pytest.mark.parametrize("attention", ["plain", "gqa"])
def test_names_are_those_of_published_checkpoints(tmp_path: Path, attention: Any) -> None:
    tiny_model.make_model(tmp_path / "m", attention=attention, layers=1)
    graph = onnx.load(tmp_path / "m/decoder_model_merged.onnx").graph
    caches = ["past_key_values.0.key", "past_key_values.0.value"]
    extra = {"plain": {"position_ids"}, "gqa": {"num_logits_to_keep"}}[attention]
    wanted = {"inputs_embeds", "attention_mask", *caches, *extra}
    assert {i.name for i in graph.input} == wanted
    assert {o.name for o in graph.output} == {"logits", "present.0.key", "present.0.value"}
    if attention == "plain":
        assert {n.domain for n in graph.node} == {""}
        for name in ("vision_encoder", "embed_tokens", "decoder_model_merged"):
            onnx.checker.check_model(onnx.load(tmp_path / f"m/{name}.onnx"), full_check=True)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def break_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda f: edit(f / "config.json", model_type="bert"), "model_type 'bert'"),
        (lambda f: edit(f / "config.json", scale_factor=3), "scale_factor"),
        (lambda f: edit(f / "config.json", image_token_id=9), "<image> is 2, not 9"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (break_weights, "model.safetensors is cut short"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda f: (f / "chat_template.jinja").unlink(), "chat_template.jinja is missing"),
        (lambda f: (f / "generation_config.json").write_text("{}"), None),
        (lambda f: edit(f / "preprocessor_config.json", resample=77), "resample 77"),
    ],
)
def test_what_cannot_be_exported_is_told(
    checkpoint: Path, tmp_path: Path, damage: Any, says: str | None, capsys: Any
) -> None:
    damage(checkpoint)
    status = cli.main([str(checkpoint), str(tmp_path / "out")])
    assert status == (1 if says else 0)
    assert says is None or says in capsys.readouterr().err


def test_sixteen_bit_checkpoints_are_read(checkpoint: Path) -> None:
    from tools.exporter.weights import Weights

    values = np.array([[1.0, -2.5], [0.15625, 3e20]], np.float32)
    upper = (values.view(np.uint32) >> 16).astype(np.uint16)
    header = {"x": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    path = checkpoint / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + upper.tobytes())
    found = Weights(checkpoint).get("x", (2, 2))
    assert np.allclose(found, values, rtol=2**-8)


@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e3))
def test_rounding_errors_are_at_most_half_a_step(seed: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.normal(0, size, (3, 64)) * rng.integers(0, 2, (3, 1))).astype(np.float32)
    small, scales = quantize.rows(weight)
    assert np.all(np.abs(small * scales[:, None] - weight) <= scales[:, None] * 0.501)
    packed, scales = quantize.blocks(weight)
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(3, 2, 32).astype(np.float32)
    steps = scales.reshape(3, 2, 1)
    error = np.abs((nibbles - 8) * steps - weight.reshape(3, 2, 32))
    # The value opposite to the largest one may be cut by one whole step.
    assert np.all(error <= np.abs(steps) * 1.001)
    assert np.mean(error) <= np.mean(np.abs(steps)) * 0.5


@pytest.mark.parametrize(
    ("precision", "most"), [("none", 1e-6), ("half", 1e-3), ("int8", 0.02), ("int4", 0.12)]
)
def test_products_and_tables_are_what_the_weights_say(
    tmp_path: Path, precision: Any, most: float
) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 0.1, (96, 64)).astype(np.float32)
    bias = rng.normal(0, 0.1, 96).astype(np.float32)
    g = Graph("one", precision)
    x = g.input("x", ["n", 64])
    ids = g.input("ids", ["n"], onnx.TensorProto.INT64)
    g.output(g.linear(x, "first", weight, bias, out="y"), ["n", 96])
    g.output(g.table(ids, "second", weight, out="rows"), ["n", 64])
    g.save(tmp_path / "one.onnx")
    session = ort.InferenceSession(tmp_path / "one.onnx")
    values, picked = rng.normal(size=(5, 64)).astype(np.float32), np.array([95, 0, 7, 7, 3])
    y, rows = session.run(None, {"x": values, "ids": picked})
    wanted = values @ weight.T + bias
    assert np.linalg.norm(y - wanted) <= most * np.linalg.norm(wanted)
    assert np.linalg.norm(rows - weight[picked]) <= most * np.linalg.norm(weight[picked])


@pytest.mark.parametrize("precision", ["half", "int8"])
@pytest.mark.parametrize("attention", ["plain", "gqa"])
def test_rounded_decoders_give_nearly_the_same_logits(
    tmp_path: Path, attention: Any, precision: Any
) -> None:
    def logits(kind: Any) -> np.ndarray:
        folder = tmp_path / kind
        tiny_model.make_model(folder, attention=attention, precision=kind)
        embed = ort.InferenceSession(folder / "embed_tokens.onnx")
        decoder = onnx_common.open_session(folder / "decoder_model_merged.onnx", "x", 1)
        graph = onnx_cache.open_cache(decoder, onnx_cache.shape_of(decoder), 64)
        rows = embed.run(None, {"input_ids": np.arange(5, 37)[None]})[0]
        return graph.step(rows, ort.RunOptions(), logits=True)

    assert np.corrcoef(logits("none"), logits(precision))[0, 1] > 0.99


TEXT = {
    "model_type": "qwen2_vl",
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "relu"}, "hidden_act: relu"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 4]}}, "with the sum 8"),
        ({"model_type": "gemma3_text", "rope_scaling": {"rope_type": "yarn"}}, "only linear"),
    ],
)
def test_a_decoder_that_no_graph_can_be_made_of_is_told(change: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        text.sizes(TEXT | change)


def test_a_size_that_is_missing_is_named() -> None:
    left = {key: value for key, value in TEXT.items() if key not in {"hidden_size", "vocab_size"}}
    with pytest.raises(CheckpointError, match="hidden_size, vocab_size is missing"):
        text.sizes(left)


def test_older_and_newer_folders_say_the_same() -> None:
    new = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    older = text.sizes(TEXT | {"rope_theta": 1e6})
    newer = {k: v for k, v in TEXT.items() if k != "rope_scaling"} | {"rope_parameters": new}
    assert older == text.sizes(newer)
    assert (older.sections, older.theta, older.bias) == ((2, 3, 3), 1e6, True)
    flat = {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0}}  # fmt: skip
    tree = {"model_type": "gemma3_text", "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }}  # fmt: skip
    assert text.sizes(flat) == text.sizes(tree)
    assert text.sizes(flat).windows[:6] == (4096,) * 5 + (0,)


@pytest.mark.torch
@pytest.mark.parametrize("kind", text.DEFAULTS)
def test_what_folders_leave_out_is_what_transformers_puts_there(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoConfig

        config = AutoConfig.for_model(kind)
    for key, value in text.DEFAULTS[kind].items():
        assert getattr(config, key) == value, key


def test_the_context_can_be_limited(checkpoint: Path, tmp_path: Path) -> None:
    argv = [str(checkpoint), str(tmp_path / "out"), "--context", "100", "--name", "x"]
    assert cli.main(argv) == 0
    made = manifests.parse((tmp_path / "out" / manifests.FILE).read_bytes())
    assert made.decoder.context == 100


def test_pairs_of_rotary_dimensions_belong_to_their_axis() -> None:
    assert parts.axis_of_pairs((2, 3, 3), interleaved=False) == [0, 0, 1, 1, 1, 2, 2, 2]
    assert parts.axis_of_pairs((4, 2, 2), interleaved=True) == [0, 1, 2, 0, 1, 2, 0, 0]


def test_without_a_name_the_model_lies_beside_the_checkpoint(checkpoint: Path) -> None:
    assert cli.main([str(checkpoint)]) == 0
    made = manifests.parse((checkpoint.parent / "hf-onnx" / manifests.FILE).read_bytes())
    assert made.name == "hf-onnx"


def test_a_size_is_only_for_encoders_of_any_size(checkpoint: Path, capsys: Any) -> None:
    assert cli.main([str(checkpoint), "--size", "64x64"]) == 1
    assert "--size" in capsys.readouterr().err
