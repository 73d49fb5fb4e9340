"""Installed models: which folders are taken, and what is said about the others."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rkvlmd.models import catalog, manifest
from tests.fakes.models import write_model

KNOWN = frozenset({"smolvlm"})


def scan(folder: Path, **kwargs: Any) -> tuple[dict[str, catalog.Entry], dict[str, list[str]]]:
    options = {"demo": False, "known_families": KNOWN, **kwargs}
    entries, errors = catalog.scan(folder, **options)
    return entries, {error.name: error.problems for error in errors}


def test_no_folder_is_no_model(tmp_path: Path) -> None:
    assert scan(tmp_path / "absent") == ({}, {})
    assert scan(tmp_path) == ({}, {})
    (tmp_path / "file").write_text("x")
    assert scan(tmp_path / "file") == ({}, {})


def test_models_in_order_of_names(tmp_path: Path) -> None:
    write_model(tmp_path / "b", name="alpha")
    write_model(tmp_path / "a", name="beta")
    (tmp_path / "none-of-ours").mkdir()
    (tmp_path / "a-file").write_text("x")
    real = write_model(tmp_path.parent / f"{tmp_path.name}-elsewhere", name="linked")
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.utime(tmp_path / "b" / manifest.FILE, (1_700_000_000.7, 1_700_000_000.7))
    entries, problems = scan(tmp_path)
    assert not problems
    assert list(entries) == ["alpha", "beta", "linked"]
    alpha = entries["alpha"]
    assert alpha.folder == tmp_path / "b"
    assert alpha.created == 1_700_000_000
    assert alpha.digest == manifest.digest(alpha.manifest)
    assert alpha.bytes == sum(
        p.stat().st_size for p in (tmp_path / "b").iterdir() if p.name != manifest.FILE
    )
    assert alpha.digest != entries["beta"].digest


def test_a_wrong_folder_does_not_hide_the_good_ones(tmp_path: Path) -> None:
    write_model(tmp_path / "good", name="good")
    write_model(tmp_path / "stranger", name="stranger", family="unheard-of")
    write_model(tmp_path / "lacking", name="lacking")
    (tmp_path / "lacking" / "decoder.onnx").unlink()
    (tmp_path / "lacking" / "tokenizer.json").write_bytes(b"")
    for name, data in [("broken", b"{"), ("big", b" " * (manifest.MAX_BYTES + 1)), ("list", b"[]")]:
        (tmp_path / name).mkdir()
        (tmp_path / name / manifest.FILE).write_bytes(data)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / manifest.FILE).mkdir()
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / manifest.FILE)
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / manifest.FILE).symlink_to(manifest.FILE)
    entries, problems = scan(tmp_path)
    assert list(entries) == ["good"]
    assert set(problems) == {
        "stranger", "lacking", "broken", "big", "list", "folder", "pipe", "loop",
    }  # fmt: skip
    assert problems["stranger"] == ["family: unheard-of is not known"]
    assert problems["lacking"] == [
        "decoder.files.decoder.file: decoder.onnx is missing",
        "tokenizer.file: tokenizer.json is empty",
    ]
    assert str(tmp_path) not in str(problems)


def test_two_folders_with_one_name(tmp_path: Path) -> None:
    write_model(tmp_path / "one", name="twin")
    write_model(tmp_path / "two", name="twin")
    entries, problems = scan(tmp_path)
    assert not entries
    assert problems == {"twin": ["name: used by more than one folder: one, two"]}
    write_model(tmp_path / "twin", name="twin")
    entries, problems = scan(tmp_path)
    assert entries["twin"].folder == tmp_path / "twin"
    assert problems == {"twin": ["name: used by more than one folder: one, twin, two"]}


def test_the_demo_model_gives_way(tmp_path: Path) -> None:
    demo = write_model(tmp_path / "package", name="demo")
    models = tmp_path / "models"
    write_model(models / "other", name="other")
    assert list(scan(models, demo=True, demo_folder=demo)[0]) == ["demo", "other"]
    assert list(scan(models, demo=False, demo_folder=demo)[0]) == ["other"]
    assert list(scan(models, demo=True, demo_folder=tmp_path / "absent")[0]) == ["other"]
    write_model(models / "mine", name="demo")
    entries, problems = scan(models, demo=True, demo_folder=demo)
    assert entries["demo"].folder == models / "mine"
    assert not problems
    (demo / "tokenizer.json").unlink()
    assert "demo" in scan(models, demo=True, demo_folder=demo)[1]


def test_only_so_many_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "MAX_FOLDERS", 2)
    for name in "abc":
        write_model(tmp_path / name, name=name)
    entries, problems = scan(tmp_path)
    assert list(entries) == ["a", "b"]
    assert "more than 2 model folders" in problems["c"][0]


def test_the_package_knows_its_own_demo_model() -> None:
    entries, errors = catalog.scan(Path("/nonexistent"), demo=True)
    assert not errors
    for entry in entries.values():
        assert catalog.verify(entry, {}, lambda _: None)[0] == []


# --- hashes ----------------------------------------------------------------------------


@pytest.fixture
def entry(tmp_path: Path) -> catalog.Entry:
    write_model(tmp_path / "model", name="model")
    return scan(tmp_path)[0]["model"]


def test_hashes_are_right_and_remembered(entry: catalog.Entry) -> None:
    steps: list[float] = []
    problems, hashes = catalog.verify(entry, {}, steps.append)
    assert problems == []
    assert steps[0] == 0.0
    assert steps[-1] == 1.0
    assert steps == sorted(steps)
    file = entry.folder / "decoder.onnx"
    status = file.stat()
    key = f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
    assert hashes[key] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert len(hashes) == len(manifest.files(entry.manifest))
    # What is remembered is believed: the files are not read again.
    lies = dict.fromkeys(hashes, "0" * 64)
    problems, again = catalog.verify(entry, lies, lambda _: None)
    assert len(problems) == len(manifest.files(entry.manifest))
    assert again == lies
    # A file with another time is read again.
    os.utime(file, (1, 1))
    problems, again = catalog.verify(entry, lies, lambda _: None)
    assert len(problems) == len(manifest.files(entry.manifest)) - 1
    assert not any("decoder.onnx" in problem for problem in problems)


@pytest.mark.parametrize(
    "harm",
    [
        lambda p: p.write_bytes(p.read_bytes()[:-1]),
        lambda p: p.write_bytes(p.read_bytes()[:-1] + b"!"),
        lambda p: p.write_bytes(b""),
    ],
    ids=["cut short", "changed", "emptied"],
)
def test_a_wrong_file_is_named(entry: catalog.Entry, harm: Callable[[Path], None]) -> None:
    harm(entry.folder / "vision.onnx")
    problems, _ = catalog.verify(entry, {}, lambda _: None)
    assert len(problems) == 1
    assert problems[0].startswith("encoders[0].sha256: vision.onnx has the hash ")


def test_a_file_that_went_away(entry: catalog.Entry) -> None:
    (entry.folder / "vision.onnx").unlink()
    problems, _ = catalog.verify(entry, {}, lambda _: None)
    assert problems == ["encoders[0].file: vision.onnx cannot be read"]


def test_a_file_that_changes_meanwhile(entry: catalog.Entry) -> None:
    path = entry.folder / "vision.onnx"
    path.write_bytes(bytes(3 << 20))
    entry = scan(entry.folder.parent)[0]["model"]
    grown = False

    def progress(fraction: float) -> None:
        nonlocal grown
        if fraction > 0.5 and not grown:
            grown = True
            with path.open("ab") as file:
                file.write(b"more")

    problems, hashes = catalog.verify(entry, {}, progress)
    assert "encoders[0].file: vision.onnx changed while it was read" in problems
    assert len(hashes) == len(manifest.files(entry.manifest)) - 1


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, RuntimeError])
def test_progress_can_end_it(entry: catalog.Entry, error: type[BaseException]) -> None:
    (entry.folder / "vision.onnx").write_bytes(bytes(5 << 20))
    entry = scan(entry.folder.parent)[0]["model"]
    calls = 0

    def progress(fraction: float) -> None:
        nonlocal calls
        calls += 1
        if fraction > 0.3:
            raise error

    with pytest.raises(error):
        catalog.verify(entry, {}, progress)
    assert calls < 13


def test_one_file_under_two_keys(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", name="model")
    tree = json.loads((folder / manifest.FILE).read_bytes())
    tree["decoder"]["files"]["embed"] = {"file": "decoder.onnx", "sha256": "0" * 64}
    (folder / manifest.FILE).write_text(json.dumps(tree))
    entry = scan(tmp_path)[0]["model"]
    problems, _ = catalog.verify(entry, {}, lambda _: None)
    assert len(problems) == 1
    assert problems[0].startswith("decoder.files.embed.sha256: decoder.onnx")
    assert entry.bytes == sum(
        (folder / n).stat().st_size
        for n in ("vision.onnx", "decoder.onnx", "tokenizer.json", "template.jinja")
    )
