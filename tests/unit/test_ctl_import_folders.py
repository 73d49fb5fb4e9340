"""``rkvlmctl import`` of folders as people have them: what is said of each, and how to go on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto

from rkvlmd.ctl import placing, showing
from rkvlmd.ctl.__main__ import main
from rkvlmd.models import catalog
from tests.fakes import published, tiny_model
from tools.exporter.graph import Graph

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
CLIP = {"model_type": "clip", "projection_dim": 512, "text_config": {}, "vision_config": {}}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    status = main(["--json", *map(str, argv)])
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert status == (1 if "error" in said else 0)
    return said


def message(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    text: str = run(capsys, *argv)["error"]["message"]
    return text


def notes(said: dict[str, Any]) -> dict[str, Any]:
    return {note["key"]: note for note in said["notes"]}


def graph(path: Path, takes: dict[str, list[int | str]], gives: dict[str, list[int | str]]) -> Path:
    """Write an ONNX file with these inputs and outputs, which computes nothing of use."""
    path.parent.mkdir(parents=True, exist_ok=True)
    g = Graph("x")
    for name, shape in takes.items():
        ids = len(shape) == 2 and "ids" in name
        g.input(name, shape, TensorProto.INT64 if ids else TensorProto.FLOAT)
    for name, shape in gives.items():
        g.add("Identity", g.scalar(0.0), out=name)
        g.output(name, shape)
    g.save(path)
    return path


# --- an .rkllm beside ONNX files -------------------------------------------------------


def beside(
    folder: Path, file: str, takes: dict[str, list[int | str]], gives: dict[str, list[int | str]]
) -> Path:
    """Write an ``.rkllm`` and an encoder's graph; return the folder."""
    published.rkllm(folder / "language.rkllm")
    graph(folder / file, takes, gives)
    return folder


def mixed(folder: Path, file: str = "Qwen3-VL-2B_vision.onnx", **size: int) -> Path:
    side = size.get("side", 448)
    gives = {f"out{i}": [1, (side // 32) ** 2, 2048] for i in range(4)}
    return beside(folder, file, {"pixel": [1, 3, side, side]}, gives)  # type: ignore[arg-type]


@pytest.mark.process
@pytest.mark.parametrize("file", ["Qwen3-VL-2B_vision.onnx", "onnx/vision_encoder.onnx", "a.onnx"])
def test_an_onnx_encoder_beside_an_rkllm(
    file: str, tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = run(capsys, "import", mixed(tmp_path / "download", file), "--models", models)
    made = catalog.scan(models, demo=False)[0]["qwen3-vl-2b"].manifest
    (encoder,) = made.encoders
    assert (encoder.engine, made.decoder.engine) == ("onnx", "rkllm")
    assert (encoder.baked, encoder.layout, encoder.lease) == (False, "nchw", "cpu")
    assert (encoder.width, encoder.tokens, encoder.outputs) == (448, 196, 4)
    # The size and rule of the NPU's encoders, the numbers of the published processor.
    assert (encoder.resize.rule, encoder.mean, encoder.std) == ("pad", (0.5,) * 3, (0.5,) * 3)
    note = notes(said)["encoders[0].engine"]
    assert f"{file} runs on the CPU" in note["says"]
    assert "the decoder runs on the NPU" in note["says"]
    assert "--size 448x448" in note["todo"]
    assert "rknn-toolkit2" in note["todo"]


@pytest.mark.process
def test_an_encoder_of_any_size_gets_one(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    takes: dict[str, list[int | str]] = {"pixel_values": ["n", 1176], "image_grid_thw": [1, 3]}
    source = beside(tmp_path / "Qwen2-VL-2B", "vision_encoder.onnx", takes, {"rows": ["m", 1536]})
    said = run(capsys, "import", source, "--models", models)
    (encoder,) = catalog.scan(models, demo=False)[0]["qwen2-vl-2b"].manifest.encoders
    assert encoder.patches is not None
    assert (encoder.width, encoder.height, encoder.tokens) == (392, 392, 196)
    assert encoder.resize.rule == "pad"
    assert "takes pictures of several sizes" in notes(said)["encoders[0].width"]["says"]
    argv = ("--as", "wide", "--size", "560x448")
    said = run(capsys, "import", source, "--models", models, *argv)
    (encoder,) = catalog.scan(models, demo=False)[0]["wide"].manifest.encoders
    assert (encoder.width, encoder.height, encoder.tokens) == (560, 448, 320)
    assert encoder.patches is not None
    assert "encoders[0].width" not in notes(said)


@pytest.mark.process
def test_pixels_of_a_model_that_nobody_described_for_the_cpu_are_a_doubt(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    takes: dict[str, list[int | str]] = {"pixel": [1, 3, 448, 448]}
    source = beside(tmp_path / "MiniCPM-V-2.6", "vision.onnx", takes, {"rows": [1, 64, 3584]})
    said = run(capsys, "import", source, "--models", models)
    assert (
        "how the pixels for vision.onnx are normalised" in notes(said)["encoders[0].mean"]["says"]
    )
    assert "preprocessor_config.json" in notes(said)["encoders[0].mean"]["todo"]
    assert "encoders[0].mean" in said["unverified"]
    picture = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (source / "preprocessor_config.json").write_text(json.dumps(picture))
    said = run(capsys, "import", source, "--models", models, "--replace")
    assert "encoders[0].mean" not in notes(said)
    (encoder,) = catalog.scan(models, demo=False)[0]["minicpm-v-2.6"].manifest.encoders
    assert (encoder.mean, encoder.std) == ((0.5,) * 3, (0.25,) * 3)


def test_a_file_for_the_npu_is_taken_first_and_that_is_said(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = mixed(tmp_path / "download")
    published.rknn(source / "vision.rknn", outputs=4)
    said = run(capsys, "import", source, "--models", models)
    made = catalog.scan(models, demo=False)[0]["qwen3-vl-2b"].manifest
    assert [encoder.file for encoder in made.encoders] == ["vision.rknn"]
    assert notes(said)["encoders"]["says"] == (
        "vision.rknn is taken, and not Qwen3-VL-2B_vision.onnx: the NPU is faster"
    )
    # That is no doubt: people read it as a note.
    main(["import", str(source), "--models", str(models), "--replace"])
    assert "note: encoders: vision.rknn is taken" in capsys.readouterr().out


# --- an .rkllm in a clone of the original repository ------------------------------------


def test_config_json_says_what_an_rkllm_does_not(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "download"
    published.rkllm(source / "model.rkllm")
    config = source / "config.json"
    config.write_text(json.dumps({"model_type": "qwen3", "hidden_size": 2048}))
    said = run(capsys, "import", source, "--models", models)
    assert (said["from"], said["why"]) == ("qwen3-1.7b", "config.json: qwen3, hidden_size 2048")
    config.write_text(json.dumps({"model_type": "qwen3", "hidden_size": 4096}))
    told = message(capsys, "import", source, "--models", models, "--as", "other")
    assert "no model of the catalogue fits" in told
    assert "config.json says 4096" in told
    config.write_text(json.dumps({"model_type": "qwen2_vl", "hidden_size": 1536}))
    told = message(capsys, "import", source, "--models", models, "--as", "other")
    assert "looks like Qwen2-VL-2B-Instruct, but its vision encoder (.rknn) is missing" in told
    config.unlink()
    told = message(capsys, "import", source, "--models", models, "--as", "other")
    assert "An .rkllm file does not say what it is" in told


# --- several decoders, several SoCs ----------------------------------------------------


def test_one_of_several_decoders_is_named(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "Qwen3 0.6B"
    for kind in ("w8a8", "w8a8 g128"):
        published.rkllm(source / f"Qwen3-0.6B {kind}.rkllm")
    at = ("import", source, "--models", models)
    said = message(capsys, *at)
    assert "more than one decoder: Qwen3-0.6B w8a8 g128.rkllm (316 B), " in said
    # What is printed can be copied into a shell, spaces and all.
    assert "--decoder 'Qwen3-0.6B w8a8 g128.rkllm'" in said
    run(capsys, *at, "--decoder", "Qwen3-0.6B w8a8.rkllm")
    made = catalog.scan(models, demo=False)[0]["qwen3-0.6b"].manifest
    assert made.decoder.files["model"].file == "Qwen3-0.6B w8a8.rkllm"
    assert "--decoder: none.rkllm is not here; there are" in message(
        capsys, *at, "--decoder", "none.rkllm"
    )


@pytest.mark.parametrize(
    ("decoder", "platform", "fits"),
    [
        ("language_rk3588.rkllm", "rk3576", False),
        ("language_RK3588.rkllm", "rk3588", True),
        ("language_rk3588s.rkllm", "rk3588", True),
        ("language.rkllm", "rk3576", True),
    ],
)
def test_files_for_two_socs_are_told(
    decoder: str, platform: str, fits: bool, tmp_path: Path, models: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = tmp_path / "download"
    published.rkllm(source / decoder)
    published.rknn(source / "vision.rknn", outputs=4, platform=platform)
    said = run(capsys, "import", source, "--models", models)
    assert said["encoders"][0].endswith(f"for {platform}")
    assert ("soc" in notes(said)) is not fits
    if not fits:
        assert (
            "vision.rknn for rk3576, language_rk3588.rkllm for rk3588"
            in (notes(said)["soc"]["says"])
        )
        assert "rkvlmctl doctor" in notes(said)["soc"]["todo"]


# --- what was not downloaded whole, or lies elsewhere ----------------------------------


def test_pointers_empty_files_and_broken_links_are_no_models(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = tmp_path / "download"
    at.mkdir()
    file = at / "Qwen3-0.6B.rkllm"
    for content, says in ((LFS, "is a pointer of git-lfs"), ("", "is empty")):
        file.write_text(content)
        assert f"{file.name}: {says}" in message(capsys, "import", at, "--models", models)
    file.unlink()
    file.symlink_to(tmp_path / "nothing")
    said = message(capsys, "import", at, "--models", models)
    assert f"{file.name}: a link to a file that is not there" in said
    file.unlink()
    (at / "Qwen3-0.6B.rkllm.incomplete").write_text("x")
    assert "a download that has not ended" in message(capsys, "import", at, "--models", models)
    assert list(models.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["rk3588/Qwen3-0.6B.rkllm"], "but in {0}/rk3588: import that folder"),
        (["a/x.rkllm", "b/c/y.rkllm"], "but in {0}/a, {0}/b/c: import one of these"),
        (["snap/onnx/model.onnx", ".git/z.rkllm"], "but in {0}/snap: import that folder"),
        (["model.gguf"], "a GGUF file, which is for other programs"),
        (["v.rknn"], "put the .rkllm of the same model beside it"),
        (["onnx/model.onnx"], "onnx/model.onnx is a whole model in one graph"),
    ],
)
def test_where_to_look_instead(
    files: list[str], says: str, tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "download"
    for file in files:
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).write_text("something")
    assert says.format(source) in message(capsys, "import", source, "--models", models)


def test_a_name_of_a_repository_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = message(capsys, "import", "Qwen/Qwen3-0.6B")
    assert "hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B" in said
    assert message(capsys, "import", tmp_path / "none").endswith("there is no such folder")
    assert message(capsys, "check", tmp_path / "none").endswith("there is no such folder")


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A repository in the cache of Hugging Face: links into a folder of blobs."""
    repository = tmp_path / "hub" / "models--Some--SmolVLM-tiny"
    folder = repository / "snapshots" / "0a1b2c"
    (repository / "blobs").mkdir(parents=True)
    (folder / "onnx").mkdir(parents=True)
    made = tmp_path / "made"
    tiny_model.make_model(made)
    files = {f"onnx/{path.name}": path for path in made.glob("*.onnx")}
    files["tokenizer.json"] = made / "tokenizer.json"
    for name in ("config.json", "preprocessor_config.json", "generation_config.json"):
        files[name] = tmp_path / ".made.checkpoint" / name
    for number, (name, path) in enumerate(files.items()):
        blob = repository / "blobs" / f"{number:040x}"
        blob.write_bytes(path.read_bytes())
        (folder / name).symlink_to(os.path.relpath(blob, (folder / name).parent))
    return folder


@pytest.mark.process
def test_a_snapshot_of_hugging_face(
    snapshot: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ("--models", models)
    # It is called what the repository is, not what the snapshot is.
    assert run(capsys, "import", snapshot, *at)["model"] == "SmolVLM-tiny"
    placed = models / "SmolVLM-tiny" / "onnx" / "vision_encoder.onnx"
    assert placed.is_file()
    assert not placed.is_symlink()
    above = snapshot.parents[1]
    assert f"but in {snapshot}: import that folder" in message(capsys, "import", above, *at)
    said = message(capsys, "import", snapshot / "onnx", *at)
    assert f"lies one folder above: import {snapshot}" in said
    (snapshot / "tokenizer.json").unlink()
    assert "put them into the folder" in message(capsys, "import", snapshot, *at)
    (snapshot / "tokenizer.model").write_text("pieces")
    assert "writes a tokenizer.json" in message(capsys, "import", snapshot, *at)


@pytest.mark.process
def test_a_precision_that_is_not_there(
    snapshot: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx = snapshot / "onnx"
    (onnx / "vision_encoder_fp16.onnx").write_bytes((onnx / "vision_encoder.onnx").read_bytes())
    said = message(capsys, "import", snapshot, "--models", models, "--variant", "q8")
    assert said.startswith("--variant: there is no q8. ")
    assert "vision_encoder_fp16.onnx (fp16, " in said


def test_a_folder_that_may_not_be_written(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    source = tmp_path / "download"
    published.rkllm(source / "Qwen3-0.6B.rkllm")
    monkeypatch.setattr(placing.tempfile, "mkstemp", refuse)
    said = message(capsys, "import", source, "--models", models)
    assert "cannot be written (Read-only file system)" in said
    assert "sudo" in said
    assert "--models" in said


# --- CLIP ------------------------------------------------------------------------------


def clip(
    folder: Path, *, text: str = "text_embeds", image: str = "image_embeds", size: int = 512
) -> Path:
    graph(folder / "onnx/text_model.onnx", {"input_ids": ["b", "n"]}, {text: ["b", 512]})
    graph(
        folder / "onnx/vision_model.onnx", {"pixel_values": ["b", 3, "h", "w"]},
        {"last_hidden_state": ["b", 50, 768], image: ["b", size]},
    )  # fmt: skip
    published.tokenizer(folder / "tokenizer.json", ("<|startoftext|>", "<|endoftext|>"))
    (folder / "config.json").write_text(json.dumps(CLIP))
    (folder / "preprocessor_config.json").write_text(json.dumps({"crop_size": 224, "size": 256}))
    return folder


@pytest.mark.process
def test_a_clip_becomes_two_towers(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = run(capsys, "import", clip(tmp_path / "clip-vit-base-patch32"), "--models", models)
    assert (said["model"], said["notes"]) == ("clip-vit-base-patch32", [])
    made = catalog.scan(models, demo=False)[0]["clip-vit-base-patch32"].manifest
    assert (made.decoder.engine, made.decoder.context, made.decoder.embedding) == ("tower", 77, 512)
    (encoder,) = made.encoders
    assert (encoder.width, encoder.height, encoder.tokens, encoder.embedding) == (224, 224, 1, 512)
    assert (encoder.resize.rule, encoder.resize.short, encoder.outputs) == ("crop", 256, 1)
    assert encoder.mean == (0.48145466, 0.4578275, 0.40821073)
    assert made.embeddings is not None
    assert (made.embeddings.inputs, made.embeddings.trained) == (("text", "image"), True)
    assert main(["show", "clip-vit-base-patch32", "--models", str(models)]) == 0
    shown = capsys.readouterr().out
    assert "of texts and pictures, 512 floats, from towers" in shown
    assert showing.UNTRAINED not in shown
    assert "can           image, embeddings" in shown
    assert "77 tokens, one text" in shown


@pytest.mark.process
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text": "pooler_output"}, "gives pooler_output and no text_embeds: it was exported"),
        ({"image": "pooler_output"}, "and no image_embeds: it was exported without its projection"),
        ({"size": 768}, "the towers are of two models: vectors of 512 and 768 floats"),
    ],
)
def test_towers_that_cannot_be_compared(
    change: dict[str, Any], says: str, tmp_path: Path, models: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = clip(tmp_path / "clip", **change)
    assert says in message(capsys, "import", source, "--models", models)


@pytest.mark.process
def test_a_clip_that_is_not_whole(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = clip(tmp_path / "clip")
    (source / "onnx/text_model.onnx").rename(source / "onnx/model.onnx")
    at = ("import", source, "--models", models)
    said = message(capsys, *at)
    assert "text_model.onnx missing" in said
    assert "tools/export_onnx" in said
    (source / "onnx/vision_model.onnx").unlink()
    # A graph with one tower alone is no pair.
    assert "onnx/model.onnx: gives " in message(capsys, *at)


# --- what is told of embeddings --------------------------------------------------------


@pytest.mark.process
def test_a_checkpoint_with_hidden_states_makes_embeddings_and_one_without_does_not(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, hidden in (("with", True), ("without", False)):
        source = tmp_path / name
        tiny_model.make_model(source, hidden=hidden)
        (source / "rkvlm.json").unlink()
        for file in ("config.json", "preprocessor_config.json", "generation_config.json"):
            (source / file).write_bytes((tmp_path / f".{name}.checkpoint" / file).read_bytes())
        run(capsys, "import", source, "--models", models, "--as", name)
    entries, _ = catalog.scan(models, demo=False)
    assert entries["without"].manifest.embeddings is None
    assert "embeddings" not in entries["without"].manifest.capabilities
    how = entries["with"].manifest.embeddings
    assert how is not None
    assert (how.inputs, how.pool, how.trained) == (("text", "image"), "last", False)
    assert main(["show", "with", "--models", str(models)]) == 0
    shown = capsys.readouterr().out
    assert "of texts and pictures, 64 floats, from hidden states of the last token" in shown
    assert showing.UNTRAINED in shown
    assert main(["show", "without", "--models", str(models)]) == 0
    assert "none: the decoder's file gives no hidden states" in capsys.readouterr().out
    # A manifest that promises what the file has not is wrong.
    path = models / "without" / "rkvlm.json"
    tree = json.loads(path.read_text())
    tree |= {"embeddings": {"inputs": ["text"]}}
    tree["capabilities"] = [*tree["capabilities"], "embeddings"]
    path.write_text(json.dumps(tree))
    assert main(["--json", "check", "without", "--models", str(models), "--quick"]) == 1
    stops = {f["key"]: f for f in json.loads(capsys.readouterr().out)["findings"]
             if f["status"] == "stop"}  # fmt: skip
    assert "has no output hidden_states" in stops["embeddings.output"]["says"]
