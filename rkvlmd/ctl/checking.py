"""``rkvlmctl check``: whether a model's manifest is about the files beside it; no daemon."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rkvlmd.ctl import folder as folders
from rkvlmd.ctl import onnx_folder, places, render
from rkvlmd.ctl.client import CtlError
from rkvlmd.ctl.folder import WrongFolderError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from rkvlmd.models.catalog import Entry
    from rkvlmd.models.manifest import Encoder
    from rkvlmd.models.matching import Tower

#: How long rendering a few short prompts may take, seconds.
PROMPT_SECONDS = 60
_COLOURS = {"ok": "\x1b[32m", "note": "", "warn": "\x1b[33m", "stop": "\x1b[31m"}


@dataclass(frozen=True, slots=True)
class Line:
    """One finding; ``stop``: the model will not load or would answer wrongly."""

    status: Literal["ok", "note", "warn", "stop"]
    key: str
    says: str
    todo: str = ""


def run(name: str, config: Path | None, models: Path | None, *, quick: bool, as_json: bool) -> int:
    """Check one model; return 1 if something is wrong.

    Raises:
      CtlError: there is no such model.

    """
    folder = find(name, config, models)
    lines = examine(folder, quick=quick)
    good = all(line.status != "stop" for line in lines)
    if as_json:
        found = [asdict(line) for line in lines]
        print(json.dumps({"model": name, "folder": str(folder), "good": good, "findings": found}))
    else:
        print(for_people(lines, colour=render.wants_colour(sys.stdout)))
        print(f"{name}: {'nothing is wrong' if good else 'not right'}")
    return 0 if good else 1


def find(name: str, config: Path | None, models: Path | None) -> Path:
    """Return the folder of an installed model; the demo model counts, and so does a path.

    Raises:
      CtlError: there is none.

    """
    from rkvlmd.models import catalog, manifest

    if "/" in name:
        folder = Path(name)
        if (folder / manifest.FILE).is_file():
            return folder
        message = f"{name}: there is no {manifest.FILE}; rkvlmctl import {name} makes one"
        if not folder.is_dir():
            message = f"{name}: there is no such folder"
        raise CtlError(message, code="model_not_found", param="NAME")
    above = places.models_folder(config, models)
    entries, _ = catalog.scan(above, demo=True)
    if name in entries:
        return entries[name].folder
    if (above / name / manifest.FILE).is_file():  # it is there, and wrong
        return above / name
    have = ", ".join(entries) or "none"
    message = f"there is no model {name} in {above}; there are: {have}"
    raise CtlError(message, code="model_not_found", param="NAME")


def examine(folder: Path, *, quick: bool) -> list[Line]:
    """Return everything there is to say about a model folder."""
    from rkvlmd.errors import ManifestError
    from rkvlmd.models import assembly, catalog, manifest

    try:
        entry = catalog.open_folder(folder)
    except ManifestError as exc:
        todo = "correct rkvlm.json or the files; rkvlmctl import --replace writes a new one"
        return [Line("stop", *_split(problem), todo) for problem in exc.problems]
    lines = [
        Line(
            "ok",
            "rkvlm.json",
            f"family {entry.manifest.family}, {len(manifest.files(entry.manifest))} files",
        )
    ]
    for i, encoder in enumerate(entry.manifest.encoders):
        lines += _encoder(entry, i, encoder)
    if entry.manifest.decoder.engine == "onnx":
        lines += _decoder(entry)
    elif entry.manifest.decoder.engine == "tower":
        lines += _tower(entry)
    if block := assembly.says(entry.manifest):
        lines.append(Line("ok", "assembly", block))
    lines += _words(entry)
    lines += _prompts(entry)
    if not quick:
        lines += _hashes(entry)
    todo = "compare with the model's card; then take it from unverified in rkvlm.json"
    lines += [
        Line("warn", key, "nobody has confirmed this value", todo)
        for key in entry.manifest.unverified
    ]
    return lines


def _split(problem: str) -> tuple[str, str]:
    key, colon, says = problem.partition(": ")
    return (key, says) if colon and " " not in key.strip() else ("rkvlm.json", problem)


def _encoder(entry: Entry, i: int, encoder: Encoder) -> list[Line]:
    """Hold an encoder of the manifest against what its file says."""
    key = f"encoders[{i}]"
    try:
        if encoder.engine == "rknn":
            tower = folders.encoder_of_npu(entry.folder, encoder.file, None)
        else:
            shape = folders.shapes(entry.folder, encoder.file)
            projected = None
            if encoder.projector is not None:
                projected = folders.shapes(entry.folder, encoder.projector.file)
            tower = folders.encoder_of_onnx(encoder.file, shape, projected)
    except WrongFolderError as exc:
        return [Line("stop", f"{key}.file", exc.message)]
    wrong = differences(encoder, tower)
    if wrong:
        says = f"this manifest is for another encoder: {'; '.join(wrong)}"
        return [Line("stop", key, says, "import the folder again with --replace")]
    if tower.outputs is None:
        says = f"{encoder.file} does not say what it takes and gives"
        return [Line("note", key, says, "the first load compares it with the library")]
    return [Line("ok", key, f"{encoder.file} {tower.says()}")]


def differences(encoder: Encoder, tower: Tower) -> list[str]:
    """Return where the manifest and the file of an encoder differ."""
    wrong = []
    pairs = [
        ("embedding", encoder.embedding, tower.embedding),
        ("tokens", encoder.tokens, tower.tokens),
    ]
    if encoder.patches is None:
        pairs += [("width", encoder.width, tower.width), ("height", encoder.height, tower.height)]
    for name, ours, theirs in pairs:
        if theirs is not None and ours != theirs:
            wrong.append(f"{name} is {ours}, {tower.file} has {theirs}")
    few = tower.outputs is not None and tower.outputs < encoder.outputs
    if few or (tower.engine == "rknn" and tower.outputs not in {None, encoder.outputs}):
        wrong.append(f"outputs is {encoder.outputs}, {tower.file} has {tower.outputs}")
    return wrong


def _decoder(entry: Entry) -> list[Line]:
    decoder = entry.manifest.decoder
    lines = []
    for part, name in (("embed", "inputs_embeds"), ("decoder", "inputs_embeds")):
        file = decoder.files[part].file
        key = f"decoder.files.{part}"
        try:
            shape = folders.shapes(entry.folder, file)
        except WrongFolderError as exc:
            lines.append(Line("stop", f"{key}.file", exc.message))
            continue
        values = shape["inputs"]
        width = onnx_folder.row_width(shape) if part == "embed" else _width(values, name)
        if width is not None and width != decoder.embedding:
            says = f"decoder.embedding is {decoder.embedding}, {file} has {width}"
            lines.append(Line("stop", key, says, "import the folder again with --replace"))
        elif part == "decoder" and not any(v["name"] == name for v in values):
            says = f"{file} does not take {name}: it is no decoder of a three-part model"
            lines.append(Line("stop", key, says))
        if part == "decoder":
            lines += _hidden(entry, shape)
    return lines or [Line("ok", "decoder", f"{len(decoder.files)} files")]


def _tower(entry: Entry) -> list[Line]:
    """Hold a text tower against the manifest."""
    decoder = entry.manifest.decoder
    file = decoder.files["text"].file
    try:
        shape = folders.shapes(entry.folder, file)
    except WrongFolderError as exc:
        return [Line("stop", "decoder.files.text.file", exc.message)]
    given = {value["name"]: value["shape"] for value in shape["outputs"]}
    dims: list[Any] = given.get("text_embeds") or next(iter(given.values()), [])
    if dims and isinstance(dims[-1], int) and dims[-1] != decoder.embedding:
        says = f"decoder.embedding is {decoder.embedding}, {file} has {dims[-1]}"
        return [Line("stop", "decoder.files.text", says, "import the folder again with --replace")]
    return [Line("ok", "decoder", f"{file} makes vectors of texts; it writes nothing")]


def _hidden(entry: Entry, shape: Mapping[str, Any]) -> list[Line]:
    """Check that hidden states that the manifest promises are there."""
    how = entry.manifest.embeddings
    if how is None or not ("text" in how.inputs or how.pictures == "hidden"):
        return []
    if how.output in {value["name"] for value in shape["outputs"]}:
        return []
    file = entry.manifest.decoder.files["decoder"].file
    says = f"{file} has no output {how.output}, of which embeddings are made"
    todo = "export the model with tools/export_onnx --hidden, or take embeddings out of rkvlm.json"
    return [Line("stop", "embeddings.output", says, todo)]


def _width(values: list[Mapping[str, Any]], name: str) -> int | None:
    for value in values:
        dims = value["shape"]
        if value["name"] == name and dims and isinstance(dims[-1], int):
            return int(dims[-1])
    return None


def _words(entry: Entry) -> list[Line]:
    """Hold tags and stop ids against the tokenizer, where there is one."""
    manifest = entry.manifest
    if manifest.tokenizer is None:
        says = "there is none: tokens of a prompt are estimated, not counted"
        todo = (
            "put the tokenizer.json of the original model into the folder and import with --replace"
        )
        return [Line("note", "tokenizer", says, todo)]
    try:
        special = folders.special_tokens(entry.folder, manifest.tokenizer.file)
    except WrongFolderError as exc:
        return [Line("stop", "tokenizer.file", exc.message)]
    if manifest.image is not None and manifest.image.content not in special:
        says = f"{manifest.image.content!r} is no special token of {manifest.tokenizer.file}"
        return [Line("stop", "image.content", says, "is it the tokenizer of another model?")]
    return [Line("ok", "tokenizer", f"{len(special)} special tokens")]


def _prompts(entry: Entry) -> list[Line]:
    """Have a child render prompts with the model's template."""
    command = [sys.executable, "-m", "rkvlmd.engine", "inspect", str(entry.folder)]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=PROMPT_SECONDS, check=False, text=True
        )
    except subprocess.TimeoutExpired:
        says = f"rendering a prompt took more than {PROMPT_SECONDS} s: does the template loop?"
        return [Line("stop", "template", says)]
    if done.returncode:
        said = done.stderr.strip().splitlines()
        found = said[-1] if said else "cannot be used"
        if found.startswith("assembly."):
            return [Line("stop", *_split(found), "take the two rows from the model's checkpoint")]
        return [Line("stop", "template", found)]
    found = json.loads(done.stdout)
    says = f"a question is {found['tokens']} tokens"
    if "picture" in found:
        says += f", a picture of 640x480 pixels {found['picture']} more"
    if not found["counted"]:
        says += " (estimated)"
    return [Line("ok", "template", says)]


def _hashes(entry: Entry) -> list[Line]:
    from rkvlmd.models import catalog

    line = render.ProgressLine(sys.stderr)
    try:
        problems, _ = catalog.verify(
            entry, {}, lambda share: line.show(entry.name, "reading", share, "")
        )
    finally:
        line.clear()
    if not problems:
        return [Line("ok", "sha256", "all files have the hashes of the manifest")]
    todo = "copy the file again, or import with --replace if it was changed on purpose"
    return [Line("stop", *_split(problem), todo) for problem in problems]


def for_people(lines: list[Line], *, colour: bool) -> str:
    """Return one line a finding."""
    width = max((len(line.key) for line in lines), default=0)
    shown = []
    for line in lines:
        ink = _COLOURS[line.status] if colour else ""
        status = f"{ink}{line.status:4}\x1b[0m" if ink else f"{line.status:4}"
        text = f"{line.key.ljust(width)}  {line.says}"
        if line.todo:
            text += f". To do: {line.todo}"
        shown.append(f"{status}  {render.plain(text).replace(chr(10), ' ')}")
    return "\n".join(shown)
