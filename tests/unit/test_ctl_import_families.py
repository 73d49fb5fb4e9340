"""``rkvlmctl import`` of ONNX checkpoints: what the exporter writes of a family, from its files alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rkvlmd.ctl.__main__ import main
from rkvlmd.models import catalog, families
from tests.parity_onnx import checkpoints, layouts
from tools.exporter import folder as exporter

pytestmark = [pytest.mark.torch, pytest.mark.process]

FAMILIES = (
    "qwen2_vl", "qwen3_vl", "qwen3_5", "internvl", "idefics3", "llava", "janus", "gemma3", "qwen3",
    "gemma3n", "gemma4",
)  # fmt: skip


#: A tower of any size, exported for one.
SIZES = {"qwen3_vl of one size": (64, 32)}


@pytest.mark.parametrize("kind", [*FAMILIES, *SIZES])
def test_config_json_names_the_family_and_the_files_say_the_rest(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, size = kind.split()[0], SIZES.get(kind)
    checkpoint = tmp_path / "checkpoint"
    checkpoints.make(checkpoints.KINDS[family], checkpoint)
    models = tmp_path / "models"
    wanted = exporter.export(checkpoint, models / "mine", name="mine", attention="plain", size=size)
    (models / "mine" / "rkvlm.json").unlink()
    # Without one the family's own is written, and must go with its tags.
    (models / "mine" / "chat_template.jinja").unlink()
    for name in ("config.json", "preprocessor_config.json", "generation_config.json"):
        shutil.copy(checkpoint / name, models / "mine" / name)
    context = str(wanted.decoder.context)
    argv = ["--json", "import", str(models / "mine"), "--models", str(models), "--context", context]
    assert main(argv) == 0
    said = json.loads(capsys.readouterr().out)
    entries, errors = catalog.scan(models, demo=False)
    assert not errors
    made = entries["mine"].manifest
    # SmolVLM's first checkpoints say idefics3 too; the rules of both are the same.
    assert said["family"] == {"idefics3": "smolvlm"}.get(family, family)
    for ours, theirs in zip(made.encoders, wanted.encoders, strict=True):
        for key in ("width", "height", "tokens", "embedding", "outputs", "patches", "mean", "std"):
            assert getattr(ours, key) == getattr(theirs, key), key
    template = models / "mine" / "chat_template.jinja"
    assert template.read_text() == families.get(made.family).template
    for key in ("files", "context", "kv_bytes_per_token", "embedding", "rope", "deepstack"):
        assert getattr(made.decoder, key) == getattr(wanted.decoder, key), key
    assert made.marker == wanted.marker or not made.encoders
    assert made.image == wanted.image
    assert made.stop_ids == wanted.stop_ids
    capsys.readouterr()
    main(["--json", "check", "mine", "--models", str(models), "--quick"])
    found = json.loads(capsys.readouterr().out)["findings"]
    assert not [line for line in found if line["status"] == "stop"]


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("smolvlm")
    checkpoints.make(checkpoints.KINDS["smolvlm"], root / "checkpoint")
    exporter.export(root / "checkpoint", root / "plain", name="mine", attention="plain")
    for name in ("config.json", "preprocessor_config.json", "generation_config.json"):
        shutil.copy(root / "checkpoint" / name, root / "plain" / name)
    return root / "plain"


@pytest.mark.parametrize("layout", ["unmerged", "outside", "halved", "projected"])
def test_the_layouts_of_published_checkpoints(
    layout: str, smolvlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "models" / "mine"
    shutil.copytree(smolvlm, folder)
    getattr(layouts, layout)(folder)
    wanted = json.loads((folder / "rkvlm.json").read_text())
    argv = ["--json", "import", str(folder), "--models", str(folder.parent), "--replace"]
    assert main(argv) == 0, capsys.readouterr()
    made = json.loads((folder / "rkvlm.json").read_text())
    for key in ("files", "kv_bytes_per_token", "embedding"):
        assert made["decoder"][key] == wanted["decoder"][key], key
    (ours,), (theirs,) = made["encoders"], wanted["encoders"]
    for key in ("file", "sha256", "tokens", "embedding"):
        assert ours[key] == theirs[key], key
    for key in ("projector", "data"):
        assert ours.get(key) == (theirs.get(key) or None), key
