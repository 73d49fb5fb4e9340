"""``rkvlmctl import``: a folder of published files becomes a model; no daemon."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkvlmd.ctl import folder as folders
from rkvlmd.ctl import onnx_folder, places, placing, render
from rkvlmd.ctl.folder import Found, WrongFolderError

if TYPE_CHECKING:
    from rkvlmd.models.building import Note, Parts, Text
    from rkvlmd.models.matching import Candidate, Tower, Verdict
    from rkvlmd.models.templates import Template

#: Most models that an error lists.
_LISTED = 12
_ZERO = "0" * 64
#: The table of embeddings of a model that is given rows, by the manifest's keys.
_TABLE = {"embed": "embed.npy", "embed_scale": "embed_scale.npy"}


@dataclass(frozen=True, slots=True)
class Wishes:
    """The command line. ``size`` is (width, height) in pixels, ``context`` in tokens."""

    path: Path
    name: str | None = None
    family: str | None = None
    model: str | None = None
    size: tuple[int, int] | None = None
    context: int | None = None
    variant: str | None = None
    models: Path | None = None
    config: Path | None = None
    replace: bool = False


class UndecidedError(WrongFolderError):
    """Several models of the catalogue fit, or none; ``details`` lists them for scripts."""

    def __init__(self, message: str, candidates: Sequence[Candidate]) -> None:
        super().__init__(message, code="undecided", param="--model")
        self.details = {
            "candidates": [
                {
                    "model": c.template.model, "family": c.template.family,
                    "fits": not c.wrong, "differs": list(c.wrong), "named": c.hinted,
                }
                for c in candidates
            ]
        }  # fmt: skip


def run(wishes: Wishes, *, as_json: bool) -> int:
    """Import a folder and say what came of it.

    Raises:
      CtlError: it cannot become a model; nothing was written then.

    """
    found = folders.look(wishes.path)
    known, broken = places.catalogue()
    from rkvlmd.models import building

    candidate, why, parts, notes = _decide(found, list(known.values()), wishes)
    template = candidate.template
    where = placing.plan(
        wishes.path, places.models_folder(wishes.config, wishes.models),
        wishes.name, template.model, replace=wishes.replace,
    )  # fmt: skip
    # Everything that can be wrong is found before gigabytes are hashed.
    tree, _ = building.build(template, where.name, parts, lambda _: _ZERO)
    placing.check(tree)
    files = placing.files_of(tree)
    where.ready(files, found.path)
    texts = _texts(found, template) if placing.TEMPLATE not in found.files else {}
    line = render.ProgressLine(sys.stderr)
    try:
        digests = placing.hashes(found.path, files, texts, line, where.name)
    finally:
        line.clear()
    tree, made = building.build(template, where.name, parts, digests.__getitem__)
    notes = [*notes, *made, *placing.unreadable(found.path, digests)]
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
        return _npu(found, known, wishes)
    if any(graph.role for graph in found.graphs):
        return onnx_folder.decide(found, known, wishes, text_of(found, wishes))
    if found.rknn:
        message = f"{found.path}: the decoder (.rkllm) is missing; {found.says()}"
    elif found.graphs:
        message = (
            f"{found.path}: these ONNX files are none of the published parts (vision_encoder,"
            f" embed_tokens, decoder_model_merged); {found.says()}"
        )
    elif found.weights:
        message = (
            f"{found.path}: a checkpoint that is not converted: tools/export_onnx makes ONNX files"
            f" of it, rkllm-toolkit and rknn-toolkit2 make NPU files; {found.says()}"
        )
    else:
        message = f"{found.path}: no known family; {found.says()}"
    raise WrongFolderError(message, code="unknown_family")


def _npu(
    found: Found, known: list[Template], wishes: Wishes
) -> tuple[Candidate, str, Parts, list[Note]]:
    from rkvlmd.models import building, matching

    if len(found.rkllm) > 1:
        names = ", ".join(found.rkllm)
        message = f"more than one decoder: {names}; leave one in the folder, or make a folder each"
        raise WrongFolderError(message, code="undecided")
    towers = tuple(folders.encoder_of_npu(found.path, file, wishes.size) for file in found.rknn)
    seen = matching.Folder(found.path.resolve().name, towers, found.rkllm, found.config)
    able = [t for t in known if "rkllm" in t.engines()]
    verdict = matching.choose(able, seen, family=wishes.family, model=wishes.model)
    chosen = verdict.chosen
    if chosen is None:
        raise _undecided(found, towers, verdict)
    template, notes = chosen.template, []
    if template.match.tokens is not None and not towers:
        if wishes.model is None:
            message = (
                f"{found.path}: looks like {template.title}, but its vision encoder (.rknn) is"
                f" missing. Put it into the folder, or take --model {template.model} to import"
                " the decoder alone, for text"
            )
            raise WrongFolderError(message, code="undecided")
        notes.append(
            building.Note("encoders", "there is no .rknn file: the model takes text alone",
                          "put the vision encoder into the folder and import again with --replace")
        )  # fmt: skip
    if template.match.tokens is None and towers:
        files = ", ".join(t.file for t in towers)
        message = f"{template.title} has no vision encoder here, but there is {files}"
        raise WrongFolderError(message, code="wrong_encoder", param="--model")
    if chosen.about & {"embedding", "outputs", "input"} and not (wishes.family and chosen.pattern):
        listed = "; ".join(chosen.wrong)
        message = f"--model: {template.title} does not go with these files: {listed}"
        raise WrongFolderError(message, code="wrong_encoder", param="--model")
    if chosen.pattern:
        says = f"{template.title} is another size; context and cache of this one are not known"
        notes.append(building.Note("decoder", says, "compare rkvlm.json with the model's card"))
    parts = building.Parts(
        decoder={"model": found.rkllm[0]}
        | {
            key: name
            for key, name in _TABLE.items()
            if name in found.files and template.known("npu")["decoder"].get("input")
        },
        towers=in_order(towers, template),
        text=text_of(found, wishes),
        context=wishes.context,
    )
    return chosen, verdict.why, parts, notes


def in_order(towers: Sequence[Tower], template: Template) -> tuple[Tower, ...]:
    """Return the encoders, first the one of the usual size, which ``detail: auto`` takes."""
    usual = template.match.sizes[0] if template.match.sizes else None
    return tuple(sorted(
        towers,
        key=lambda t: ((t.width, t.height) != usual, t.tokens or 0, t.file),
    ))  # fmt: skip


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
    return Text(tokenizer, special, template, _stop_ids(found))


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


def _undecided(found: Found, towers: Sequence[Tower], verdict: Verdict) -> UndecidedError:
    fit = [c for c in verdict.others if not c.wrong]
    head = "several models fit" if fit else "no model of the catalogue fits"
    lines = [f"{found.path}: {head}; {found.says()}"]
    lines += [f"  {t.file} {t.says()}" for t in towers]
    for candidate in verdict.others[:_LISTED]:
        template = candidate.template
        told = "; ".join(candidate.wrong) or "fits"
        if not candidate.wrong and template.match.names:
            told += f"; its files are usually called {' or '.join(template.match.names)}"
        lines.append(f"  {template.model} ({template.family}): {told}")
    if len(verdict.others) > _LISTED:
        lines.append(f"  and {len(verdict.others) - _LISTED} more")
    lines.append("Say which it is with --model NAME, or its kind with --family NAME.")
    return UndecidedError("\n".join(lines), verdict.others)


def for_people(report: dict[str, Any]) -> str:
    """Return the report in lines."""
    lines = [
        f"{report['model']}: {report['title']}, family {report['family']} ({report['why']})",
        f"written: {report['folder']}/rkvlm.json ({report['placed']})",
    ]
    lines += [f"encoder: {text}" for text in report["encoders"]]
    lines += [f"warning: {text}" for text in [*report["differs"], *report["warnings"]]]
    for note in report["notes"]:
        lines.append(f"not certain: {note['key']}: {note['says']}")
        if note["todo"]:
            lines.append(f"    {note['todo']}")
    if report["unverified"]:
        lines.append(f"not confirmed: {', '.join(report['unverified'])}")
    name = report["model"]
    lines.append(
        f"next: rkvlmctl check {name}; rkvlmctl show {name}; where the daemon runs, rkvlmctl reload"
    )
    return "\n".join(render.plain(line) for line in lines)
