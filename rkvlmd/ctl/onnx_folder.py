"""The parts of a published ONNX checkpoint: which files belong together, and what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rkvlmd.ctl import advice
from rkvlmd.ctl import folder as folders
from rkvlmd.ctl.folder import Found, Graph, WrongFolderError
from rkvlmd.ctl.render import size

if TYPE_CHECKING:
    from rkvlmd.ctl.importing import Wishes
    from rkvlmd.models.building import Note, Parts, Text
    from rkvlmd.models.matching import Candidate, Tower
    from rkvlmd.models.templates import Template

#: Bytes of one value, by ONNX type.
_BYTES = {"float": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1}


def decide(
    found: Found, known: list[Template], wishes: Wishes, text: Text
) -> tuple[Candidate, str, Parts, list[Note]]:
    """Return the model that a folder of ONNX files holds, and its parts.

    Raises:
      WrongFolderError: files are missing, or nobody knows what they are.

    """
    from rkvlmd.models import building, matching

    chosen = {role: one(found, role, wishes.variant) for role in
              ("vision", "projector", "embed", "decoder", "decoder_prefill")}  # fmt: skip
    graphs = {role: graph for role, graph in chosen.items() if graph is not None}
    _complete(found, graphs, text)
    shapes = {role: folders.shapes(found.path, graph.file) for role, graph in graphs.items()}
    towers: tuple[Tower, ...] = ()
    if "vision" in graphs:
        projected = shapes.get("projector")
        towers = (folders.encoder_of_onnx(graphs["vision"].file, shapes["vision"], projected),)
    hidden = row_width(shapes["embed"]) or number(found.config, "hidden_size")
    seen = matching.Folder(folders.name_of(found.path), towers, (), found.config, hidden)
    able = [t for t in known if "onnx" in t.engines()]
    candidate, why = template_of(found, able, seen, hidden, wishes)
    outside = {
        graph.file: external(found, graph.file, shapes[role]) for role, graph in graphs.items()
    }
    parts = building.Parts(
        decoder={r: graphs[r].file for r in ("embed", "decoder", "decoder_prefill") if r in graphs},
        towers=towers,
        projector=graphs["projector"].file if "projector" in graphs else None,
        external={file: data for file, data in outside.items() if data},
        text=text,
        config=found.config,
        picture=found.picture,
        film=found.film,
        hidden=hidden,
        kv_bytes=_kv_bytes(shapes["decoder"]),
        longest=number(found.config, "max_position_embeddings"),
        context=wishes.context,
        outputs=tuple(arg["name"] for arg in shapes["decoder"]["outputs"]),
    )
    notes = []
    if not towers and candidate.template.match.tokens is not None:
        notes.append(
            building.Note("encoders", "there is no vision encoder: the model takes text alone",
                          "put vision_encoder.onnx into the folder and import with --replace")
        )  # fmt: skip
    return candidate, why, parts, notes


def one(found: Found, role: str, variant: str | None) -> Graph | None:
    """Return the file of a part, see ``pick``."""
    graphs = [g for g in found.graphs if g.role == role]
    if role == "decoder":
        # A merged decoder does the work of both others.
        merged = [g for g in graphs if "decoder_model_merged" in g.file]
        graphs = merged or graphs
    if role == "decoder_prefill" and any("decoder_model_merged" in g.file for g in found.graphs):
        return None
    return pick(found, graphs, variant)


def pick(found: Found, graphs: Sequence[Graph], variant: str | None) -> Graph | None:
    """Return the only one of some files, or the one of the precision that was asked for.

    Raises:
      WrongFolderError: there are several, and nobody said which.

    """
    if len(graphs) > 1 and variant is not None:
        wanted = "" if variant == "full" else variant
        graphs = [g for g in graphs if g.variant == wanted] or graphs
    if len(graphs) > 1:
        listed = ", ".join(f"{g.file} ({g.variant or 'full'}, {size(g.bytes)})" for g in graphs)
        none = variant not in {None, *(g.variant or "full" for g in graphs)}
        head = f"--variant: there is no {variant}. " if none else ""
        message = (
            f"{head}{found.path}: the same part in several precisions: {listed}. Say which with"
            " --variant, for example --variant full, or leave one in the folder"
        )
        raise WrongFolderError(message, code="undecided", param="--variant")
    return graphs[0] if graphs else None


def _complete(found: Found, graphs: Mapping[str, Graph], text: Text) -> None:
    missing = []
    if "decoder" not in graphs:
        missing.append(
            "decoder_with_past_model.onnx" if "decoder_prefill" in graphs
            else "decoder_model_merged.onnx"
        )  # fmt: skip
    if "embed" not in graphs:
        missing.append("embed_tokens.onnx")
    if text.tokenizer is None:
        missing.append("tokenizer.json")
    if "vision" in graphs and not found.picture:
        missing.append("preprocessor_config.json")
    if missing:
        raise WrongFolderError(advice.missing(found, missing), code="incomplete")


def template_of(
    found: Found, able: list[Template], seen: Any, hidden: int | None, wishes: Wishes
) -> tuple[Candidate, str]:
    from rkvlmd.models import matching

    kind = found.config.get("model_type")
    if wishes.model is not None or wishes.family is not None:
        picked = [t for t in able if wishes.model in {None, t.model}
                  and wishes.family in {None, t.family}]  # fmt: skip
        if not picked:
            what = wishes.model or wishes.family
            raise WrongFolderError(f"{what} has no ONNX form in the catalogue", param="--model")
        exact = [t for t in picked if t.match.embedding == hidden]
        return matching.judge((exact or picked)[0], seen), "as asked for"
    candidate, alike = matching.by_config(able, seen)
    if candidate is not None:
        return candidate, f"config.json: {kind}, hidden_size {hidden}"
    if alike:
        names = ", ".join(t.model for t in alike)
        why = f"config.json: {kind}; no catalogued size ({names}), so files say the sizes"
        return matching.judge(alike[0], seen), why
    kinds = sorted({k for t in able for k in t.match.model_types})
    said = f"model_type {kind!r} in config.json" if kind else "config.json, which names no family"
    message = (
        f"{found.path}: {said} is no known family; known are {', '.join(kinds)}."
        f" {found.says()}. Say --family if it is one of these under another name"
    )
    raise WrongFolderError(message, code="unknown_family", param="--family")


def number(config: Mapping[str, Any], key: str) -> int | None:
    """Return a number of the text model, which older files keep at the top."""
    for name in ("text_config", "language_config", "llm_config", ""):
        tree = config.get(name) if name else config
        value = tree.get(key) if isinstance(tree, dict) else None
        if type(value) is int and value > 0:
            return value
    return None


def row_width(shape: Mapping[str, Any]) -> int | None:
    """Return the floats of one row that an ``embed_tokens`` graph gives."""
    outputs = shape["outputs"]
    # One may have rows for each layer beside them.
    named = [v for v in outputs if v["name"] == "inputs_embeds"] or outputs
    last = named[0]["shape"][-1] if named and named[0]["shape"] else None
    return last if isinstance(last, int) else None


def _kv_bytes(shape: Mapping[str, Any]) -> int | None:
    """Return what a token costs in the cache, bytes, from the cache's inputs of a decoder."""
    total = 0
    for arg in shape["inputs"]:
        dims = arg["shape"]
        if not arg["name"].startswith("past_key_values.") or len(dims) != 4:
            continue
        heads, width, each = dims[1], dims[3], _BYTES.get(arg["type"])
        if not (isinstance(heads, int) and isinstance(width, int) and each):
            return None
        total += heads * width * each
    return total or None


def external(found: Found, file: str, shape: Mapping[str, Any]) -> tuple[str, ...]:
    above = file.rpartition("/")[0]
    names: Sequence[str] = shape.get("external", ())
    data = [f"{above}/{name}" if above else name for name in names]
    if lost := [name for name in data if name not in found.files]:
        message = f"{file}: its weights are in {', '.join(lost)}, which is missing"
        raise WrongFolderError(message, code="incomplete", param=file)
    return tuple(data)
