"""The parts of a published CLIP: a text tower and a vision tower, for embeddings alone."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rkvlmd.ctl import advice, onnx_folder
from rkvlmd.ctl import folder as folders
from rkvlmd.ctl.folder import Found, Graph, WrongFolderError

if TYPE_CHECKING:
    from rkvlmd.ctl.importing import Wishes
    from rkvlmd.models.building import Note, Parts, Text
    from rkvlmd.models.matching import Candidate
    from rkvlmd.models.templates import Template

FAMILY = "clip"
#: What the towers call the vector after their projections, in every published export.
_VECTORS = {"text": "text_embeds", "vision": folders.VECTOR}
_FILES = {"text": "text_model.onnx", "vision": "vision_model.onnx"}
#: A file with both towers, in any precision.
_WHOLE = re.compile(r"model(_[a-z0-9]+)?\.onnx")
#: What ``config.json`` may leave out (transformers, ``CLIPConfig`` and ``CLIPTextConfig``).
_SIZE, _CONTEXT = 512, 77


def is_one(found: Found, known: list[Template], wishes: Wishes) -> bool:
    """Whether the folder is a CLIP's, or its owner says so."""
    ours = [t for t in known if t.family == FAMILY]
    kinds = {kind for t in ours for kind in t.match.model_types}
    said = wishes.family == FAMILY or wishes.model in {t.model for t in ours}
    return bool(found.graphs) and (said or found.config.get("model_type") in kinds)


def decide(
    found: Found, known: list[Template], wishes: Wishes, text: Text
) -> tuple[Candidate, str, Parts, list[Note]]:
    """Return the model, and its parts.

    Raises:
      WrongFolderError: files are missing, or lack the projections.

    """
    from rkvlmd.models import building, matching

    chosen = {role: onnx_folder.one(found, role, wishes.variant) for role in _FILES}
    graphs = {role: graph.file for role, graph in chosen.items() if graph is not None}
    cuts: dict[str, tuple[str, str]] = {}
    whole = None if graphs else onnx_folder.pick(found, _whole(found), wishes.variant)
    if whole is not None:
        shape = folders.shapes(found.path, whole.file)
        above = whole.file.rpartition("/")[0]
        # Beside where it lies: so its weights in other files are found under the same names.
        graphs = {role: f"{above}/{file}" if above else file for role, file in _FILES.items()}
        cuts = {graphs[role]: (whole.file, name) for role, name in _VECTORS.items()}
        shapes = {role: _part(shape, role) for role in graphs}
        external = onnx_folder.external(found, whole.file, shape)
        outside = dict.fromkeys(graphs.values(), external)
        _complete(found, set(graphs), text)
    else:
        _complete(found, set(graphs), text)
        shapes = {role: folders.shapes(found.path, file) for role, file in graphs.items()}
        outside = {f: onnx_folder.external(found, f, shapes[r]) for r, f in graphs.items()}
    widths = {
        role: _vector(cuts.get(graphs[role], (graphs[role],))[0], role, shape)
        for role, shape in shapes.items()
    }
    size = _size(found, widths)
    tower = folders.encoder_of_onnx(graphs["vision"], shapes["vision"], None)
    tower = replace(tower, embedding=size, tokens=1)
    seen = matching.Folder(folders.name_of(found.path), (tower,), (), found.config, size)
    ours = [t for t in known if t.family == FAMILY]
    candidate, why = onnx_folder.template_of(found, ours, seen, size, wishes)
    parts = building.Parts(
        decoder={"text": graphs["text"]},
        towers=(tower,),
        external={file: data for file, data in outside.items() if data},
        text=text,
        config=found.config,
        picture=found.picture,
        hidden=size,
        longest=onnx_folder.number(found.config, "max_position_embeddings") or _CONTEXT,
        context=wishes.context,
        cuts=cuts,
    )
    notes = []
    if cuts:
        says = f"its two towers are cut out of {next(iter(cuts.values()))[0]}, which stays as it is"
        notes.append(building.Note("decoder.files", says))
    return candidate, why, parts, notes


def _whole(found: Found) -> list[Graph]:
    """Return the files that hold both towers."""
    return [g for g in found.graphs if _WHOLE.fullmatch(g.file.rpartition("/")[2])]


def _part(shape: dict[str, Any], role: str) -> dict[str, Any]:
    """Return what one tower of a graph with both will take and give."""
    eyes = role == "vision"
    return {
        "inputs": [a for a in shape["inputs"] if (a["name"] == "pixel_values") == eyes],
        "outputs": [a for a in shape["outputs"] if a["name"] == _VECTORS[role]],
    }


def _complete(found: Found, roles: set[str], text: Text) -> None:
    missing = [file for role, file in _FILES.items() if role not in roles]
    if text.tokenizer is None:
        missing.append("tokenizer.json")
    if not found.picture:
        missing.append("preprocessor_config.json")
    if missing:
        raise WrongFolderError(advice.missing(found, missing), code="incomplete")


def _vector(file: str, role: str, shape: dict[str, Any]) -> int | None:
    """Return the floats of a tower's vector; ``None`` where the file leaves them open.

    Raises:
      WrongFolderError: the file gives no vector.

    """
    name = _VECTORS[role]
    given = {arg["name"]: arg["shape"] for arg in shape["outputs"]}
    if name not in given:
        message = (
            f"{file}: gives {', '.join(given) or 'other things'} and no {name}: it was exported"
            " without its"
            " projection; tools/export_onnx CHECKPOINT makes one that has it"
        )
        raise WrongFolderError(message, code="invalid_model", param=file)
    last = given[name][-1] if given[name] else None
    return last if isinstance(last, int) else None


def _size(found: Found, widths: dict[str, int | None]) -> int:
    known = {width for width in widths.values() if width is not None}
    if len(known) > 1:
        message = (
            f"{found.path}: the towers are of two models: vectors of"
            f" {' and '.join(str(w) for w in sorted(known))} floats"
        )
        raise WrongFolderError(message, code="wrong_encoder")
    said = found.config.get("projection_dim", _SIZE)
    return known.pop() if known else said if type(said) is int and said > 0 else _SIZE
