"""``rkvlmctl import``: from a folder of published files to a model that the daemon lists."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rkvlmd.board import rknn
from rkvlmd.ctl import placing
from rkvlmd.ctl.__main__ import main
from rkvlmd.models import catalog
from tests.fakes import published, tiny_model

QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
        "<|image_pad|>", "<|video_pad|>")  # fmt: skip


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def qwen3(folder: Path, **changes: Any) -> Path:
    """Write what people publish for Qwen3-VL-2B: two files, and nothing else."""
    published.rkllm(folder / "language_w8a8_rk3588.rkllm")
    published.rknn(folder / "vision.rknn", **{"outputs": 4, **changes})
    return folder


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, dict[str, Any]]:
    status = main(["--json", *map(str, argv)])
    return status, json.loads(capsys.readouterr().out)


def failed(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    status, said = run(capsys, *argv)
    assert status == 1
    error: dict[str, Any] = said["error"]
    return error


def listed(models: Path) -> dict[str, catalog.Entry]:
    entries, errors = catalog.scan(models, demo=False)
    assert not errors
    return entries


def test_a_pair_of_npu_files_is_known_by_what_the_encoder_says(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = qwen3(tmp_path / "download")
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    status, said = run(capsys, "import", source, "--models", models)
    assert status == 0
    assert (said["model"], said["from"], said["family"]) == (
        "qwen3-vl-2b",
        "qwen3-vl-2b",
        "qwen3_vl",
    )
    assert said["why"] == "the encoder's file fits no other"
    entry = listed(models)["qwen3-vl-2b"]
    made = entry.manifest
    (encoder,) = made.encoders
    assert (encoder.width, encoder.height, encoder.tokens) == (448, 448, 196)
    assert (encoder.outputs, encoder.embedding, encoder.baked) == (4, 2048, True)
    assert (encoder.resize.rule, encoder.resize.fill) == ("pad", (128, 128, 128))
    assert made.decoder.runtime_versions == ("1.2.3", "1.3")
    assert made.decoder.multi_image_from == "1.3.0"
    assert catalog.verify(entry, {}, lambda share: None)[0] == []
    # Nothing of the user's has changed.
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before
    # What is missing is said, with the way to supply it.
    notes = {note["key"]: note for note in said["notes"]}
    assert "tokenizer.json of Qwen/Qwen3-VL-2B-Instruct" in notes["tokenizer"]["todo"]
    assert "--context" in notes["decoder.context"]["todo"]
    assert "chat_template.jinja" in notes["template"]["todo"]
    assert "decoder.context" in said["unverified"]


def test_people_read_the_same(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = qwen3(tmp_path / "download")
    assert main(["import", str(source), "--models", str(models), "--as", "mine"]) == 0
    text = capsys.readouterr().out
    assert "mine: Qwen3-VL-2B-Instruct, family qwen3_vl" in text
    assert "vision.rknn" not in text or "takes 448x448 pixels" in text
    assert "not certain: tokenizer" in text
    assert "rkvlmctl show mine; where the daemon runs, rkvlmctl reload" in text


def test_files_of_the_same_disk_take_no_room(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = qwen3(tmp_path / "download")
    _, said = run(capsys, "import", source, "--models", models)
    placed = models / "qwen3-vl-2b" / "vision.rknn"
    assert os.path.samefile(placed, source / "vision.rknn")
    assert "hard-linked" in said["placed"]


def test_files_of_another_disk_are_copied(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(placing.os, "link", refuse)
    source = qwen3(tmp_path / "download")
    _, said = run(capsys, "import", source, "--models", models)
    placed = models / "qwen3-vl-2b"
    assert said["placed"] == "files copied"
    assert not os.path.samefile(placed / "vision.rknn", source / "vision.rknn")
    assert (placed / "vision.rknn").read_bytes() == (source / "vision.rknn").read_bytes()
    assert {p.name for p in placed.iterdir()} == {
        "rkvlm.json", "vision.rknn", "language_w8a8_rk3588.rkllm",
    }  # fmt: skip


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(placing, "_links", lambda *_: False)
    monkeypatch.setattr(placing.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    error = failed(capsys, "import", qwen3(tmp_path / "download"), "--models", models)
    assert error["code"] == "no_space"
    assert "100 B free" in error["message"]
    assert list(models.iterdir()) == []


def test_a_folder_that_lies_among_the_models_stays(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = qwen3(models / "my-qwen")
    _, said = run(capsys, "import", source, "--models", models)
    assert (said["model"], said["folder"]) == ("my-qwen", str(source))
    assert set(listed(models)) == {"my-qwen"}
    error = failed(capsys, "import", source, "--models", models)
    assert error["code"] == "exists"
    assert "--replace" in error["message"]
    assert run(capsys, "import", source, "--models", models, "--replace", "--context", 2048)[0] == 0
    assert listed(models)["my-qwen"].manifest.decoder.context == 2048


def test_another_models_folder_is_not_written_over(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "import", qwen3(tmp_path / "a"), "--models", models)
    changed = qwen3(tmp_path / "b", tokens=441, width=672, height=672)
    error = failed(capsys, "import", changed, "--models", models, "--replace")
    assert error["code"] == "exists"
    assert "--as" in error["message"]
    assert listed(models)["qwen3-vl-2b"].manifest.encoders[0].width == 448


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_with_the_tags_of_thoughts_makes_a_model_that_thinks(
    file: str, tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, template, thinks in (
        ("yes", "{{ messages }}<think>{% if no %}</think>{% endif %}", True),
        ("no", "{{ messages }}</think>", False),
    ):
        source = qwen3(tmp_path / name)
        text = template if file.endswith("jinja") else json.dumps({"chat_template": template})
        (source / file).write_text(text)
        run(capsys, "import", source, "--models", models, "--as", name)
        made = listed(models)[name].manifest
        assert (made.thinking is not None, "thinking" in made.capabilities) == (thinks, thinks)
    assert run(capsys, "show", "yes", "--models", models)[1]["thinking"] == {"unasked": None}
    assert run(capsys, "show", "no", "--models", models)[1]["thinking"] is None


def test_tokenizer_and_template_of_the_folder_are_used(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = qwen3(tmp_path / "download")
    published.tokenizer(source / "tokenizer.json", QWEN)
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    (source / "generation_config.json").write_text('{"eos_token_id": [262, 256]}')
    _, said = run(capsys, "import", source, "--models", models)
    made = listed(models)["qwen3-vl-2b"].manifest
    assert made.tokenizer is not None
    assert made.template is not None
    # Those of the catalogue too: the library has a tokenizer of its own.
    assert set(made.special_strings) > set(QWEN)
    assert made.stop_ids == (262, 256)
    # The template stood inside a JSON file; it becomes a file of the model, not of the download.
    placed = models / "qwen3-vl-2b"
    assert (placed / made.template.file).read_text() == "{{ messages }}"
    assert (placed / "tokenizer_config.json").is_file()
    assert not (source / made.template.file).exists()
    assert {n["key"] for n in said["notes"]} == {"decoder.context"}


def test_several_sizes_are_several_encoders(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = qwen3(tmp_path / "download")
    published.rknn(source / "big.rknn", 896, 896, tokens=784, outputs=4)
    published.rknn(source / "mid.rknn", 672, 672, tokens=441, outputs=4, leading=True)
    run(capsys, "import", source, "--models", models)
    encoders = listed(models)["qwen3-vl-2b"].manifest.encoders
    assert [(e.width, e.tokens) for e in encoders] == [(448, 196), (672, 441), (896, 784)]


def test_several_models_that_fit_are_listed_and_names_or_the_owner_decide(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "download"
    published.rkllm(source / "language.rkllm")
    published.rknn(source / "vision.rknn", 512, 512, tokens=64, embedding=576)
    error = failed(capsys, "import", source, "--models", models)
    assert error["code"] == "undecided"
    assert [c["model"] for c in error["candidates"]] == ["smolvlm-256m", "smolvlm2-256m"]
    assert all(c["fits"] for c in error["candidates"])
    assert "several models fit" in error["message"]
    assert "*smolvlm2-256m*" in error["message"]
    assert "--model" in error["message"]
    _, said = run(capsys, "import", source, "--models", models, "--model", "smolvlm2-256m")
    assert said["from"] == "smolvlm2-256m"
    (source / "language.rkllm").rename(source / "SmolVLM-256M-Instruct_rk3588.rkllm")
    _, said = run(capsys, "import", source, "--models", models)
    assert said["from"] == "smolvlm-256m"
    assert "names decide" in said["why"]


def test_names_that_speak_of_another_model_are_not_overruled(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "download"
    published.rkllm(source / "Qwen3-VL-2B-Instruct_w8a8_rk3588.rkllm")
    published.rknn(source / "vision.rknn", 448, 448, tokens=196, embedding=2048)
    error = failed(capsys, "import", source, "--models", models)
    assert error["code"] == "undecided"
    assert [(c["model"], c["fits"]) for c in error["candidates"]] == [
        ("qwen3.5-2b", True), ("qwen3-vl-2b", False),
    ]  # fmt: skip
    assert "the files fit Qwen3.5-2B, but names speak of Qwen3-VL-2B" in error["message"]
    assert "vision.rknn: 4 output(s), the file has 1" in error["message"]
    assert listed(models) == {}
    _, said = run(capsys, "import", source, "--models", models, "--model", "qwen3.5-2b")
    assert said["from"] == "qwen3.5-2b"


def test_an_encoder_of_no_known_model_is_told_with_what_is_nearest(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = qwen3(tmp_path / "download", embedding=4096)
    error = failed(capsys, "import", source, "--models", models)
    assert error["code"] == "undecided"
    assert "no model of the catalogue fits" in error["message"]
    assert "gives 4 output(s) of 196 rows of 4096 floats" in error["message"]
    nearest = {c["model"]: c["differs"] for c in error["candidates"]}
    assert nearest["qwen3-vl-2b"] == ["vision.rknn: rows of 2048 floats, the file has 4096"]
    # Its kind is enough: sizes come from the files.
    _, said = run(
        capsys, "import", source, "--models", models, "--family", "qwen3_vl", "--as", "q8"
    )
    made = listed(models)["q8"].manifest
    assert (made.encoders[0].embedding, made.decoder.embedding) == (4096, 4096)
    assert any(n["key"] == "decoder" and "another size" in n["says"] for n in said["notes"])


def test_a_model_that_does_not_go_with_the_encoder_is_refused(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = qwen3(tmp_path / "download")
    error = failed(capsys, "import", source, "--models", models, "--model", "qwen2-vl-2b")
    assert error["code"] == "wrong_encoder"
    assert "1 output(s), the file has 4" in error["message"]
    assert "rows of 1536 floats, the file has 2048" in error["message"]
    assert list(models.iterdir()) == []


@pytest.mark.parametrize(
    ("takes", "says"),
    [
        ([("patches", [784, 1176])], "inputs of [784, 1176]"),
        ([("pixel", [2, 3, 448, 448])], "inputs of [2, 3, 448, 448]"),
        ([("pixel", [1, 3, 448, 448]), ("grid", [1, 3])], "[1, 3, 448, 448] and [1, 3]"),
    ],
)
def test_an_encoder_that_takes_something_else_fits_nothing(
    takes: Any, says: str, tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = qwen3(tmp_path / "download")
    gives = [(f"out{i}", [196, 2048]) for i in range(4)]
    published.rknn(source / "vision.rknn", tree=published.trailer(takes, gives))
    error = failed(capsys, "import", source, "--models", models)
    assert error["code"] == "undecided"
    assert says in error["message"]


def test_an_encoder_with_channels_last_is_understood(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = qwen3(tmp_path / "download")
    gives = [(f"out{i}", [196, 2048]) for i in range(4)]
    tree = published.trailer([("pixel", [1, 448, 448, 3])], gives)
    published.rknn(source / "vision.rknn", tree=tree)
    assert run(capsys, "import", source, "--models", models)[1]["from"] == "qwen3-vl-2b"


def test_files_that_say_nothing_go_by_names_and_options(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "Qwen2.5-VL-3B-RKLLM"
    published.rkllm(source / "language.rkllm")
    published.rknn(source / "vision.rknn", tree={})
    _, said = run(capsys, "import", source, "--models", models, "--size", "476x476")
    assert said["why"] == "by the names of files alone"
    encoder = listed(models)["qwen2.5-vl-3b"].manifest.encoders[0]
    assert (encoder.width, encoder.tokens) == (476, 289)
    assert any(n["key"] == "encoders[0].tokens" for n in said["notes"])


def test_a_text_model_needs_no_encoder_and_a_vision_model_does(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    published.rkllm(text / "Qwen3-0.6B-rk3588.rkllm")
    _, said = run(capsys, "import", text, "--models", models)
    assert said["from"] == "qwen3-0.6b"
    blind = tmp_path / "blind"
    published.rkllm(blind / "Qwen2-VL-2B_rk3588.rkllm")
    error = failed(capsys, "import", blind, "--models", models)
    assert "vision encoder (.rknn) is missing" in error["message"]
    _, said = run(capsys, "import", blind, "--models", models, "--model", "qwen2-vl-2b")
    assert any(n["key"] == "encoders" for n in said["notes"])
    assert listed(models)["qwen2-vl-2b"].manifest.encoders == ()


def test_a_table_of_embeddings_is_used_where_the_model_takes_rows(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "gemma"
    published.rkllm(source / "gemma-3n-E2B-it.rkllm")
    _, said = run(capsys, "import", source, "--models", models, "--as", "plain")
    assert any(n["key"] == "decoder.input" and "embed.npy" in n["todo"] for n in said["notes"])
    published.tokenizer(source / "tokenizer.json", ["<bos>", "<end_of_turn>"])
    (source / "embed.npy").write_bytes(b"\x93NUMPY rows")
    run(capsys, "import", source, "--models", models, "--as", "rows")
    entries = listed(models)
    assert entries["plain"].manifest.decoder.input == "text"
    assert entries["rows"].manifest.decoder.input == "embeddings"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "no known family; found nothing, and no model files"),
        (["notes.txt"], "found notes.txt, and no model files"),
        (["a.rknn"], "the decoder (.rkllm) is missing; found .rknn: a.rknn"),
        (["model.safetensors"], "a checkpoint that is not converted"),
        (["model.onnx"], "none of the published parts"),
        (["a.rkllm", "b.rkllm"], "more than one decoder: a.rkllm (9 B), b.rkllm (9 B)"),
        (["a.rkllm", "a.rknn"], "a.rknn: is no .rknn file"),
    ],
)
def test_folders_that_cannot_be_models_say_what_was_found(
    files: list[str], says: str, tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "download"
    source.mkdir()
    for name in files:
        (source / name).write_bytes(b"something")
    error = failed(capsys, "import", source, "--models", models)
    assert says in error["message"]
    assert list(models.iterdir()) == []


def test_other_wrong_arguments(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = qwen3(tmp_path / "download")
    at = ("import", source, "--models", models)
    assert "no such folder" in failed(capsys, "import", tmp_path / "none")["message"]
    assert "is not in the catalogue" in failed(capsys, *at, "--model", "gpt")["message"]
    assert "is not known" in failed(capsys, *at, "--family", "gpt")["message"]
    assert "cannot be a model's name" in failed(capsys, *at, "--as", "a/b")["message"]
    for wrong in (["--size", "448"], ["--context", "0"], ["--model", "a", "--family", "b"]):
        with pytest.raises(SystemExit) as caught:
            main([*map(str, at), *wrong])
        assert caught.value.code == 2


def test_a_closed_file_is_noted(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = qwen3(tmp_path / "download")
    (source / "vision.rknn").chmod(0o600)
    _, said = run(capsys, "import", source, "--models", models)
    (note,) = [n for n in said["notes"] if n["key"] == "files"]
    assert note["todo"] == "chmod o+r vision.rknn"


# --- what an .rknn file says -----------------------------------------------------------


def test_the_trailer_of_the_toolkit_is_understood(tmp_path: Path) -> None:
    found = rknn.read(published.rknn(tmp_path / "v.rknn", 448, 392, tokens=176, outputs=4))
    assert found.takes == (rknn.Tensor("pixel", (1, 3, 392, 448)),)
    assert [t.dims for t in found.gives] == [(176, 2048)] * 4
    assert (found.outputs, found.platforms, found.toolkit) == (4, ("rk3588",), "2.5.0")


@pytest.mark.parametrize(
    "change",
    [
        {"graph": None},
        {"graph": [{"left": "input", "left_tensor_id": 0, "right": "other", "right_tensor_id": 0}]},
        {"graph": [{"left": "input", "left_tensor_id": 0, "right": "norm_tensor",
                    "right_tensor_id": 99}]},
        {"graph": [{"left": "input", "left_tensor_id": "0", "right": "norm_tensor",
                    "right_tensor_id": 0}]},
        {"graph": ["input", 7]},
        {"norm_tensor": [{"tensor_id": 0, "size": [1, -3, 4, 4]}]},
        {"norm_tensor": [{"tensor_id": 0, "size": "wide"}]},
        {"norm_tensor": {"0": []}},
    ],
)  # fmt: skip
def test_a_trailer_laid_out_in_another_way_says_nothing(
    change: dict[str, Any], tmp_path: Path
) -> None:
    tree = published.trailer([("pixel", [1, 3, 448, 448])], [("out", [196, 2048])]) | change
    found = rknn.read(published.rknn(tmp_path / "v.rknn", tree=tree))
    assert found.state == "read"
    assert found.takes == ()


# --- ONNX ------------------------------------------------------------------------------


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    """A checkpoint as published: graphs in a folder of their own, configuration beside it."""
    folder = tmp_path / "SmolVLM-tiny-ONNX"
    tiny_model.make_model(folder)
    checkpoint = tmp_path / f".{folder.name}.checkpoint"
    (folder / "rkvlm.json").unlink()
    (folder / "onnx").mkdir()
    for graph in folder.glob("*.onnx"):
        graph.rename(folder / "onnx" / graph.name)
    for name in ("config.json", "preprocessor_config.json", "generation_config.json"):
        shutil.copy(checkpoint / name, folder / name)
    return folder


@pytest.mark.process
def test_an_onnx_folder_gives_the_manifest_that_the_exporter_writes(
    onnx: Path, tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = tiny_model.make_model(tmp_path / "wanted", "mine")
    _, said = run(capsys, "import", onnx, "--models", models, "--as", "mine")
    assert said["family"] == "smolvlm"
    made = listed(models)["mine"].manifest
    (mine,), (theirs,) = made.encoders, wanted.encoders
    for key in ("width", "height", "resize", "mean", "std", "tokens", "embedding", "outputs"):
        assert getattr(mine, key) == getattr(theirs, key), key
    for key in ("context", "kv_bytes_per_token", "embedding"):
        assert getattr(made.decoder, key) == getattr(wanted.decoder, key), key
    assert made.image == wanted.image
    assert made.stop_ids == wanted.stop_ids
    assert set(made.special_strings) == set(wanted.special_strings)
    assert [f.sha256 for f in made.decoder.files.values()] == [
        f.sha256 for f in wanted.decoder.files.values()
    ]
    assert made.unverified == ()


@pytest.mark.process
def test_an_imported_onnx_folder_passes_its_check(
    onnx: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "import", onnx, "--models", models, "--as", "mine")
    status, said = run(capsys, "check", "mine", "--models", models)
    assert status == 0
    assert {f["status"] for f in said["findings"]} == {"ok"}


@pytest.mark.process
def test_one_precision_must_be_chosen_of_several(
    onnx: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(onnx / "onnx/vision_encoder.onnx", onnx / "onnx/vision_encoder_fp16.onnx")
    error = failed(capsys, "import", onnx, "--models", models)
    assert error["param"] == "--variant"
    assert "vision_encoder_fp16.onnx (fp16, " in error["message"]
    assert run(capsys, "import", onnx, "--models", models, "--variant", "full")[0] == 0


@pytest.mark.process
@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ("onnx/embed_tokens.onnx", "embed_tokens.onnx missing"),
        ("onnx/decoder_model_merged.onnx", "decoder_model_merged.onnx missing"),
        ("tokenizer.json", "tokenizer.json missing"),
        ("preprocessor_config.json", "preprocessor_config.json missing"),
        ("config.json", "config.json, which names no family"),
    ],
)
def test_an_onnx_folder_that_is_not_whole(
    lost: str, says: str, onnx: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (onnx / lost).unlink()
    assert says in failed(capsys, "import", onnx, "--models", models)["message"]


@pytest.mark.process
def test_a_checkpoint_of_an_unknown_family_is_told(
    onnx: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((onnx / "config.json").read_text())
    (onnx / "config.json").write_text(json.dumps(config | {"model_type": "florence2"}))
    error = failed(capsys, "import", onnx, "--models", models)
    assert error["code"] == "unknown_family"
    assert "model_type 'florence2'" in error["message"]
    assert "smolvlm" in error["message"]
    (onnx / "onnx/vision_encoder.onnx").write_bytes(b"no graph")
    assert "is no ONNX model" in failed(capsys, "import", onnx, "--models", models)["message"]


@pytest.mark.process
def test_weights_in_files_of_their_own_are_found_and_missed(
    onnx: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnx as onnx_lib

    path = onnx / "onnx/vision_encoder.onnx"
    model = onnx_lib.load(path)
    path.unlink()
    onnx_lib.save(
        model, path, save_as_external_data=True, location="vision_encoder.onnx_data",
        size_threshold=0,
    )  # fmt: skip
    run(capsys, "import", onnx, "--models", models, "--as", "mine")
    (data,) = listed(models)["mine"].manifest.encoders[0].data
    assert data.file == "onnx/vision_encoder.onnx_data"
    (onnx / data.file).unlink()
    error = failed(capsys, "import", onnx, "--models", models, "--as", "other")
    assert "its weights are in onnx/vision_encoder.onnx_data, which is missing" in error["message"]
