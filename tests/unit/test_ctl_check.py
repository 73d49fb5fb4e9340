"""``rkvlmctl check`` and ``rkvlmctl show``, without a daemon."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rkvlmd.ctl import checking
from rkvlmd.ctl.__main__ import main
from rkvlmd.models.catalog import DEMO
from tests.fakes import published

QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
        "<|image_pad|>", "<|video_pad|>")  # fmt: skip


@pytest.fixture
def models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A folder of models with one of two encoders in it, imported."""
    source = tmp_path / "download"
    published.rkllm(source / "language.rkllm")
    published.rknn(source / "vision.rknn", outputs=4)
    published.rknn(source / "large.rknn", 896, 896, tokens=784, outputs=4)
    published.tokenizer(source / "tokenizer.json", QWEN)
    folder = tmp_path / "models"
    folder.mkdir()
    assert main(["import", str(source), "--models", str(folder), "--as", "qwen"]) == 0
    shutil.rmtree(source)
    capsys.readouterr()
    return folder


def edit(models: Path, **changes: Any) -> None:
    path = models / "qwen" / "rkvlm.json"
    tree = json.loads(path.read_text())
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(tree))


def with_template(models: Path, text: str) -> None:
    path = models / "qwen" / "rkvlm.json"
    (models / "qwen" / "chat_template.jinja").write_text(text)
    template = {"file": "chat_template.jinja", "sha256": "0" * 64}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"template": template}))


def check(
    models: Path, capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[int, list[dict[str, Any]]]:
    status = main(["--json", "check", "qwen", "--models", str(models), *options])
    said = json.loads(capsys.readouterr().out)
    assert said["good"] == (status == 0)
    return status, said["findings"]


def stops(found: list[dict[str, Any]]) -> dict[str, str]:
    return {line["key"]: line["says"] for line in found if line["status"] == "stop"}


def test_a_good_model(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = check(models, capsys)
    assert status == 0
    said = {line["key"]: line for line in found}
    assert "takes 448x448 pixels" in said["encoders[0]"]["says"]
    # 196 tokens of the picture and its two tags.
    assert "a picture of 640x480 pixels 198 more" in said["template"]["says"]
    assert said["sha256"]["status"] == "ok"
    # What nobody has confirmed is warned of, one line each.
    assert said["decoder.kv_bytes_per_token"]["status"] == "warn"
    assert said["decoder.context"]["status"] == "warn"


def test_people_get_one_line_each(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, found = check(models, capsys)
    assert main(["check", "qwen", "--models", str(models)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == len(found)
    assert last == "qwen: nothing is wrong"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokens": 441, "width": 672, "height": 672},
         "tokens is 441, vision.rknn has 196; width is 672, vision.rknn has 448"),
        ({"outputs": 1}, "outputs is 1, vision.rknn has 4"),
    ],
)  # fmt: skip
def test_a_manifest_for_another_encoder(
    change: dict[str, Any], says: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = json.loads((models / "qwen" / "rkvlm.json").read_text())
    tree["encoders"][0] |= change
    edit(models, encoders=tree["encoders"])
    status, found = check(models, capsys, "--quick")
    assert status == 1
    assert stops(found)["encoders[0]"].startswith("this manifest is for another encoder")
    assert says in stops(found)["encoders[0]"]


def test_rows_of_another_width(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published.rknn(models / "qwen" / "vision.rknn", embedding=2560, outputs=4)
    status, found = check(models, capsys, "--quick")
    assert status == 1
    assert "embedding is 2048, vision.rknn has 2560" in stops(found)["encoders[0]"]


def test_a_file_that_has_changed(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published.rkllm(models / "qwen" / "language.rkllm", size=301)
    assert check(models, capsys, "--quick")[0] == 0
    status, found = check(models, capsys)
    assert status == 1
    assert "language.rkllm has the hash" in stops(found)["decoder.files.model.sha256"]


def test_a_file_that_is_missing(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (models / "qwen" / "large.rknn").unlink()
    status, found = check(models, capsys)
    assert status == 1
    assert stops(found) == {"encoders[1].file": "large.rknn is missing"}


def test_a_tokenizer_of_another_model(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published.tokenizer(models / "qwen" / "tokenizer.json", ["<s>"])
    status, found = check(models, capsys, "--quick")
    assert status == 1
    assert "'<|image_pad|>' is no special token" in stops(found)["image.content"]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for %}", "cannot be read"),
        ("no place for anything", "The model's files do not agree"),
    ],
)
def test_a_template_that_cannot_be(
    template: str, says: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_template(models, template)
    status, found = check(models, capsys, "--quick")
    assert status == 1
    assert says in stops(found)["template"]


def test_a_template_that_loops_for_ever(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "PROMPT_SECONDS", 1)
    loop = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    with_template(models, loop)
    status, found = check(models, capsys, "--quick")
    assert status == 1
    assert "does the template loop?" in stops(found)["template"]


def test_a_broken_manifest_names_every_key(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(models, family="gpt")
    status, found = check(models, capsys)
    assert status == 1
    assert stops(found) == {"family": "gpt is not known"}


def test_a_model_that_is_not_there(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("check", "show"):
        assert main(["--json", command, "none", "--models", str(models)]) == 1
        error = json.loads(capsys.readouterr().out)["error"]
        assert error["code"] == "model_not_found"
        assert "qwen" in error["message"]


def test_a_model_may_be_named_by_its_folder(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("check", "show"):
        assert main([command, str(models / "qwen"), "--models", str(models)]) == 0
        assert "qwen" in capsys.readouterr().out


# --- show -----------------------------------------------------------------------------


def show(models: Path, capsys: pytest.CaptureFixture[str], *names: str) -> dict[str, Any]:
    assert main(["--json", "show", *names, "--models", str(models)]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def test_what_clients_may_expect(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = show(models, capsys, "qwen")
    assert told["engines"] == ["rknn", "rkllm"]
    assert told["library_versions"] == ["1.2.3", "1.3"]
    assert told["context"] == 4096
    assert set(told["capabilities"]) >= {"image", "multi_image", "video"}
    pictures = told["pictures"]
    assert pictures["sizes"] == ["448x448, padded", "896x896, padded"]
    assert pictures["tokens"][0] == {
        "width": 640, "height": 480, "tokens": 196, "inputs": 1, "low": 196, "high": 784,
    }  # fmt: skip
    assert pictures["most"] == 4095 // 196
    assert told["video"] == {"native": True, "frames": 8}
    assert told["tokens_counted"] is True
    assert "several pictures: only with librkllmrt.so 1.3.0 or later" in told["warnings"]
    assert "decoder.kv_bytes_per_token: nobody has confirmed this value" in told["warnings"]


def test_people_see_it_too(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "qwen", "--models", str(models)]) == 0
    text = capsys.readouterr().out
    for part in (
        "rknn, rkllm; librkllmrt.so 1.2.3, 1.3", "4096 tokens", "448x448, padded",
        "196 for a picture of any size, high 784", "warning: decoder.kv_bytes_per_token",
        "8 frames, natively", "of family qwen3_vl", "counted",
    ):  # fmt: skip
        assert part in text


def test_adapters_are_named_as_requests_name_them(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published.rkllm(models / "qwen" / "pirate.rkllm")
    adapter = {"name": "pirate", "file": "pirate.rkllm", "sha256": "0" * 64}
    edit(models, decoder={"adapters": [adapter]})
    assert show(models, capsys, "qwen")["adapters"] == ["qwen:pirate"]


def test_the_catalogue_is_listed_and_its_entries_are_shown(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {row["model"]: row for row in show(models, capsys)["models"]}
    assert rows["deepseek-ocr"]["engines"] == ["rkllm", "rknn"]
    assert not rows["deepseek-ocr"]["installed"]
    told = show(models, capsys, "deepseek-ocr")
    assert not told["installed"]
    assert told["encoder_tokens"] == [57]
    assert told["sources"]
    assert any("kv_bytes_per_token" in text for text in told["warnings"])
    assert main(["show", "--models", str(models)]) == 0
    assert "deepseek-ocr" in capsys.readouterr().out


def test_the_demo_model_shows_and_checks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = show(tmp_path, capsys, "demo")
    assert told["folder"] == str(DEMO)
    assert main(["check", "demo", "--models", str(tmp_path)]) == 0


def test_settings_say_where_the_models_are(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "my.toml"
    config.write_text(f'[models]\ndir = "{models}"\n')
    assert main(["show", "qwen", "--config", str(config)]) == 0
    config.write_text("[models]\nsurprise = 1\n")
    capsys.readouterr()
    assert main(["show", "qwen", "--config", str(config)]) == 1
    assert "models.surprise" in capsys.readouterr().err
