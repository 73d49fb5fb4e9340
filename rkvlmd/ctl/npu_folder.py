"""The parts of a model for the NPU: an ``.rkllm`` with its encoders, ``.rknn`` or ONNX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rkvlmd.ctl import folder as folders
from rkvlmd.ctl import onnx_folder
from rkvlmd.ctl.folder import Found, Graph, WrongFolderError
from rkvlmd.ctl.render import size

if TYPE_CHECKING:
    from rkvlmd.ctl.importing import Wishes
    from rkvlmd.models.building import Note, Parts, Text
    from rkvlmd.models.matching import Candidate, Tower, Verdict
    from rkvlmd.models.templates import Template

#: Most models that an error lists.
_LISTED = 12
#: The table of embeddings of a model that is given rows, by the manifest's keys.
_TABLE = {"embed": "embed.npy", "embed_scale": "embed_scale.npy"}
#: The rows after each line and after a picture, of a model that needs them (``assembly``).
_SEPARATORS = "separators.npy"
#: What a word in the name of an ONNX file says of it, where it is none of the published parts:
#: Rockchip's own scripts call an encoder MODEL_vision.onnx.
_EYES = ("vision", "visual", "image_encoder", "vit")
_OTHERS = ("decoder", "embed", "text", "language", "llm", "audio")
#: SoCs that RKLLM has files for, as their names mention them (the toolkit's target_platform).
_SOC = re.compile(r"rk3588s?|rk3576|rk3562|rv1126b", re.IGNORECASE)


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


def decide(
    found: Found, known: list[Template], wishes: Wishes, text: Text
) -> tuple[Candidate, str, Parts, list[Note]]:
    """Return the model that a folder with an ``.rkllm`` holds, and its parts.

    Raises:
      WrongFolderError: files are missing or too many, or nobody knows what they are.

    """
    from rkvlmd.models import building, matching

    file = _decoder(found, wishes)
    notes: list[Note] = []
    projector: str | None = None
    external: dict[str, tuple[str, ...]] = {}
    if found.rknn:
        towers = _encoders(found, wishes, notes)
    else:
        towers, projector, external = _onnx_encoder(found, wishes)
    hidden = onnx_folder.number(found.config, "hidden_size")
    seen = matching.Folder(folders.name_of(found.path), towers, (file,), found.config, hidden)
    able = [t for t in known if "rkllm" in t.engines()]
    verdict = matching.choose(able, seen, family=wishes.family, model=wishes.model)
    chosen = verdict.chosen
    if chosen is None:
        raise _undecided(found, towers, verdict)
    template = chosen.template
    _goes_together(found, chosen, towers, wishes)
    if template.match.tokens is not None and not towers:
        notes.append(
            building.Note("encoders", "there is no vision encoder: the model takes text alone",
                          "put the .rknn into the folder and import again with --replace")
        )  # fmt: skip
    if chosen.pattern:
        says = f"{template.title} is another size; context and cache of this one are not known"
        notes.append(building.Note("decoder", says, "compare rkvlm.json with the model's card"))
    notes += _socs(file, towers)
    parts = building.Parts(
        decoder={"model": file}
        | {
            key: name
            for key, name in _TABLE.items()
            if name in found.files and template.known("npu")["decoder"].get("input")
        },
        towers=in_order(towers, template),
        projector=projector,
        external=external,
        text=text,
        config=found.config,
        picture=found.picture,
        context=wishes.context,
        separators=_SEPARATORS if _SEPARATORS in found.files else None,
    )
    return chosen, verdict.why, parts, notes


def _socs(decoder: str, towers: Sequence[Tower]) -> list[Note]:
    """Return a note where the files are for different SoCs, as they or their names say."""
    from rkvlmd.models.building import Note

    said = {t.file: {p.lower() for p in t.platforms} for t in towers if t.platforms}
    if named := {name.lower() for name in _SOC.findall(decoder)}:
        said[decoder] = named
    plain = {file: {_alike(name) for name in names} for file, names in said.items()}
    if len(plain) < 2 or set.intersection(*plain.values()):
        return []
    listed = ", ".join(f"{file} for {' and '.join(sorted(names))}" for file, names in said.items())
    todo = "one of them will not load: take all files for the board's own SoC; rkvlmctl doctor says"
    return [Note("soc", f"the files are made for different SoCs: {listed}", f"{todo} which it is")]


def _alike(soc: str) -> str:
    """Return the name under which files of a SoC are made: the RK3588S takes those of the RK3588."""
    return "rk3588" if soc == "rk3588s" else soc


def _decoder(found: Found, wishes: Wishes) -> str:
    """Return the decoder's file.

    Raises:
      WrongFolderError: there are several, and nobody said which.

    """
    files = list(found.rkllm)
    if wishes.decoder is not None:
        files = [f for f in files if f == wishes.decoder]
        if not files:
            message = f"--decoder: {wishes.decoder} is not here; there are {', '.join(found.rkllm)}"
            raise WrongFolderError(message, param="--decoder")
    if len(files) > 1:
        names = ", ".join(f"{f} ({size(found.files[f])})" for f in files)
        message = (
            f"{found.path}: more than one decoder: {names}. A model has one: say which with"
            f" --decoder FILE, for example --decoder {folders.quoted(files[0])}; import again with"
            " another --as NAME for each of the others"
        )
        raise WrongFolderError(message, code="undecided", param="--decoder")
    return files[0]


def _encoders(found: Found, wishes: Wishes, notes: list[Note]) -> tuple[Tower, ...]:
    from rkvlmd.models import building

    towers = tuple(folders.encoder_of_npu(found.path, file, wishes.size) for file in found.rknn)
    eyes = [graph.file for graph in _eyes(found)]
    if eyes:
        says = f"{', '.join(found.rknn)} is taken, and not {', '.join(eyes)}: the NPU is faster"
        notes.append(building.Note("encoders", says, ""))
    return towers


def _eyes(found: Found) -> list[Graph]:
    """Return the ONNX files that are vision encoders: by their names, else the only one."""
    named = [g for g in found.graphs if g.role == "vision"]
    if named:
        return named
    unknown = [g for g in found.graphs if not g.role]
    stems = {g.file: g.file.rpartition("/")[2].lower() for g in unknown}
    named = [g for g in unknown if any(word in stems[g.file] for word in _EYES)]
    if named:
        return named
    left = [g for g in unknown if not any(word in stems[g.file] for word in _OTHERS)]
    return left if len(left) == 1 and len(found.graphs) == 1 else []


def _onnx_encoder(
    found: Found, wishes: Wishes
) -> tuple[tuple[Tower, ...], str | None, dict[str, tuple[str, ...]]]:
    """Return an ONNX encoder beside an ``.rkllm``, its projector, and where their weights are."""
    graph = onnx_folder.pick(found, _eyes(found), wishes.variant)
    if graph is None:
        return (), None, {}
    projector = onnx_folder.one(found, "projector", wishes.variant)
    shape = folders.shapes(found.path, graph.file)
    external = {graph.file: onnx_folder.external(found, graph.file, shape)}
    projected = None
    if projector is not None:
        projected = folders.shapes(found.path, projector.file)
        external[projector.file] = onnx_folder.external(found, projector.file, projected)
    tower = folders.encoder_of_onnx(graph.file, shape, projected)
    if tower.width is None and wishes.size is not None:
        tower = replace(tower, width=wishes.size[0], height=wishes.size[1])
    files = {file: data for file, data in external.items() if data}
    return (tower,), projector.file if projector is not None else None, files


def _goes_together(
    found: Found, chosen: Candidate, towers: Sequence[Tower], wishes: Wishes
) -> None:
    template = chosen.template
    if template.match.tokens is not None and not towers and wishes.model is None:
        message = (
            f"{found.path}: looks like {template.title}, but its vision encoder (.rknn) is"
            " missing. Put it into the folder (an ONNX file would do too, on the CPU), or take"
            f" --model {template.model} to import the decoder alone, for text"
        )
        raise WrongFolderError(message, code="undecided")
    if template.match.tokens is None and towers:
        files = ", ".join(t.file for t in towers)
        message = f"{template.title} has no vision encoder here, but there is {files}"
        raise WrongFolderError(message, code="wrong_encoder", param="--model")
    if chosen.about & {"embedding", "outputs", "input"} and not (wishes.family and chosen.pattern):
        listed = "; ".join(chosen.wrong)
        message = f"--model: {template.title} does not go with these files: {listed}"
        raise WrongFolderError(message, code="wrong_encoder", param="--model")


def in_order(towers: Sequence[Tower], template: Template) -> tuple[Tower, ...]:
    """Return the encoders, first the one of the usual size, which ``detail: auto`` takes."""
    usual = template.match.sizes[0] if template.match.sizes else None
    return tuple(sorted(
        towers,
        key=lambda t: ((t.width, t.height) != usual, t.tokens or 0, t.file),
    ))  # fmt: skip


def _undecided(found: Found, towers: Sequence[Tower], verdict: Verdict) -> UndecidedError:
    fit = [c for c in verdict.others if not c.wrong]
    head = verdict.why or ("several models fit" if fit else "no model of the catalogue fits")
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
    if not towers:
        lines.append(
            "An .rkllm file does not say what it is, and there is no vision encoder beside it."
        )
    return UndecidedError("\n".join(lines), verdict.others)
