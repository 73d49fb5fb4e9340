"""``rkvlmctl import``: a folder of published files becomes a model; no daemon."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkvlmd.ctl import advice, clip_folder, npu_folder, onnx_folder, places, placing, render
from rkvlmd.ctl import folder as folders
from rkvlmd.ctl.folder import Found, WrongFolderError

if TYPE_CHECKING:
    from rkvlmd.models.building import Note, Parts, Text
    from rkvlmd.models.matching import Candidate
    from rkvlmd.models.templates import Template

_ZERO = "0" * 64


@dataclass(frozen=True, slots=True)
class Wishes:
    """The command line. ``size`` is (width, height) in pixels, ``context`` in tokens.

    ``decoder`` is the name of the one ``.rkllm`` of several.
    """

    path: Path
    name: str | None = None
    family: str | None = None
    model: str | None = None
    size: tuple[int, int] | None = None
    context: int | None = None
    variant: str | None = None
    decoder: str | None = None
    models: Path | None = None
    config: Path | None = None
    replace: bool = False


def run(wishes: Wishes, *, as_json: bool) -> int:
    """Import a folder and say what came of it.

    Raises:
      CtlError: it cannot become a model; nothing was written then.

    """
    if not wishes.path.exists():
        raise WrongFolderError(advice.no_folder(wishes.path), code="not_found")
    found = folders.look(wishes.path)
    advice.check_whole(found)
    known, broken = places.catalogue()
    from rkvlmd.models import building

    candidate, why, parts, notes = _decide(found, list(known.values()), wishes)
    template = candidate.template
    where = placing.plan(
        wishes.path, places.models_folder(wishes.config, wishes.models),
        wishes.name, _own_name(found, candidate), replace=wishes.replace,
    )  # fmt: skip
    # Everything that can be wrong is found before gigabytes are hashed.
    tree, _ = building.build(template, where.name, parts, lambda _: _ZERO)
    placing.check(tree)
    files = placing.files_of(tree)
    where.ready(files, found.path)
    texts: dict[str, str | Path] = {}
    if placing.TEMPLATE not in found.files:
        texts |= _texts(found, template)
    with _beside(where, parts) as beside:
        texts |= _cuts(found, parts, beside)
        line = render.ProgressLine(sys.stderr)
        try:
            digests = placing.hashes(found.path, files, texts, line, where.name)
        finally:
            line.clear()
        tree, made = building.build(template, where.name, parts, digests.__getitem__)
        notes = [*notes, *made, *placing.unreadable(found.path, digests)]
        notes += [
            building.Note("--model", f"{t.model} is another way to use these files: {t.title}", "")
            for t in known.values()
            if t.variant_of == template.model
            and set(t.engines()) & {t.engine for t in parts.towers}
        ]
        if candidate.pattern:
            tree["description"] = f"another size than {template.title}"
        placing.check(tree)
        written = where.write(tree, found.path, files, texts)
    report = {
        "model": where.name,
        "folder": str(where.folder),
        "from": template.model,
        "title": template.title,
        "family": template.family,
        "why": why,
        "differs": [] if candidate.pattern else list(candidate.wrong),
        "placed": written,
        "encoders": [t.says() for t in parts.towers],
        "notes": [{"key": n.key, "says": n.says, "todo": n.todo} for n in notes],
        "unverified": tree["unverified"],
        "warnings": [*found.problems, *broken],
    }
    print(json.dumps(report) if as_json else for_people(report))
    return 0


@contextlib.contextmanager
def _beside(where: placing.Place, parts: Parts) -> Iterator[Path]:
    """Give a folder for files in the making, on the disk where they will lie; it goes at the end."""
    if not parts.cuts:
        yield where.folder
        return
    try:
        made = tempfile.TemporaryDirectory(dir=where.above(), prefix=".import-")
    except OSError as exc:
        message = f"{where.above()}: cannot be written ({exc.strerror})"
        raise placing.CannotPlaceError(message, code="failed") from None
    with made as name:
        yield Path(name)


def _cuts(found: Found, parts: Parts, beside: Path) -> dict[str, str | Path]:
    """Make the files that are parts of another; return where they lie."""
    made: dict[str, str | Path] = {}
    for name, (file, output) in parts.cuts.items():
        folders.cut(found.path, file, beside / name, output)
        made[name] = beside / name
    return made


def _own_name(found: Found, candidate: Candidate) -> str:
    """Return what a model is called that nobody named: a size of its own is not the catalogue's."""
    name = folders.name_of(found.path)
    own = candidate.pattern and placing.NAME.fullmatch(name)
    return name if own else candidate.template.model


def _decide(
    found: Found, known: list[Template], wishes: Wishes
) -> tuple[Candidate, str, Parts, list[Note]]:
    if wishes.model is not None and wishes.model not in {t.model for t in known}:
        names = ", ".join(t.model for t in known)
        raise WrongFolderError(
            f"--model: {wishes.model} is not in the catalogue; it has {names}", param="--model"
        )
    if wishes.family is not None and wishes.family not in {t.family for t in known}:
        names = ", ".join(sorted({t.family for t in known}))
        message = f"--family: {wishes.family} is not known; known are {names}"
        raise WrongFolderError(message, param="--family")
    if found.rkllm:
        return npu_folder.decide(found, known, wishes, text_of(found, wishes))
    if clip_folder.is_one(found, known, wishes):
        return clip_folder.decide(found, known, wishes, text_of(found, wishes))
    if any(graph.role for graph in found.graphs):
        return onnx_folder.decide(found, known, wishes, text_of(found, wishes))
    raise WrongFolderError(advice.none(found), code="unknown_family")


def text_of(found: Found, wishes: Wishes) -> Text:
    """Return what the folder has for text; a template inside a JSON file becomes a file later."""
    from rkvlmd.models.building import Text

    special = None
    tokenizer = "tokenizer.json" if "tokenizer.json" in found.files else None
    if tokenizer is not None:
        special = folders.special_tokens(found.path, tokenizer)
    template: str | None = next(
        (name for name in ("chat_template.jinja", "chat_template.txt") if name in found.files), None
    )
    if template is None and folders.template_in_json(found) is not None:
        template = placing.TEMPLATE
    return Text(tokenizer, special, template, _stop_ids(found), folders.thinks(found, template))


def _texts(found: Found, template: Template) -> dict[str, str]:
    """Return the files that an import writes besides the manifest."""
    from rkvlmd.models import families

    text = folders.template_in_json(found) or families.get(template.family).template
    return {placing.TEMPLATE: text} if text else {}


def _stop_ids(found: Found) -> tuple[int, ...]:
    for tree in (found.generation, found.config, found.config.get("text_config", {})):
        ids = tree.get("eos_token_id") if isinstance(tree, dict) else None
        ids = ids if isinstance(ids, list) else [ids]
        if ids and all(type(i) is int and i >= 0 for i in ids):
            return tuple(ids)
    return ()


def for_people(report: dict[str, Any]) -> str:
    """Return the report in lines."""
    lines = [
        f"{report['model']}: {report['title']}, family {report['family']} ({report['why']})",
        f"written: {report['folder']}/rkvlm.json ({report['placed']})",
    ]
    lines += [f"encoder: {text}" for text in report["encoders"]]
    lines += [f"warning: {text}" for text in [*report["differs"], *report["warnings"]]]
    for note in report["notes"]:
        kind = "not certain" if note["todo"] else "note"
        lines.append(f"{kind}: {note['key']}: {note['says']}")
        if note["todo"]:
            lines.append(f"    {note['todo']}")
    if report["unverified"]:
        lines.append(f"not confirmed: {', '.join(report['unverified'])}")
    name = report["model"]
    lines.append(
        f"next: rkvlmctl check {name}; rkvlmctl show {name}; where the daemon runs, rkvlmctl reload"
    )
    return "\n".join(render.plain(line) for line in lines)
