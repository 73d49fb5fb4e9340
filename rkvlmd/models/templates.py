"""The catalogue: what is known of published models, one file a model, in ``etc/models.d``.

The structures here are the format; ``rkvlmd/data/models.d.schema.json`` is the
JSON Schema made from them (``python -m rkvlmd.models.templates``), and a test
holds the two together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

import rkvlmd
from rkvlmd.errors import ManifestError
from rkvlmd.models.manifest import Name, Natural, Positive

#: Largest file that is read, bytes, and most files of a folder.
MAX_BYTES = 1 << 18
MAX_FILES = 512
#: Files that an owner adds; one with the name of a shipped one replaces it.
OWN = Path("/etc/rkvlmd/models.d")
_PACKAGE = Path(rkvlmd.__file__).parent

Engine = Literal["rkllm", "rknn", "onnx"]
Side = Annotated[int, msgspec.Meta(ge=1, le=1 << 14)]


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Tokens(_Strict, frozen=True, kw_only=True):
    """Image tokens of one input: ``fixed``, or one for each square of ``square`` pixels.

    ``row_end`` tokens follow each row of squares, ``end`` tokens the last row.
    """

    fixed: Natural = 0
    square: Natural = 0
    row_end: Natural = 0
    end: Natural = 0

    def of(self, width: int, height: int) -> int:
        """Return the number for an input of these many pixels."""
        if self.fixed:
            return self.fixed
        rows, columns = height // self.square, width // self.square
        return rows * (columns + self.row_end) + self.end


class Match(_Strict, frozen=True, kw_only=True):
    """How the model's files are recognised.

    ``outputs`` and ``embedding`` (floats of a row) of a vision encoder, as an
    ``.rknn`` file tells them; no ``tokens``: the model has no encoder.
    ``sizes`` (width, height in pixels) are those of published encoders, the
    first is assumed where a file does not tell; other sizes are possible if
    they are multiples of ``multiple``. ``names`` are globs over the names of
    files and folder, lower case: hints between models that look alike. Their
    ``*`` do not cut a number or a word in two: ``*-4b*`` is not ``-4bit``.
    ``model_types`` are those of ``config.json``; ``embedding`` is there the
    ``hidden_size`` of the text model. ``tile`` is the size of the second
    encoder, for the tiles of a picture (rule ``base_tiles``).
    """

    embedding: Positive
    outputs: Positive = 1
    sizes: tuple[tuple[Side, Side], ...] = ()
    multiple: Natural = 0
    tile: tuple[Side, Side] | None = None
    tokens: Tokens | None = None
    names: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()


class MeantFor(_Strict, frozen=True, kw_only=True):
    """An engine, the versions of its library that the model is meant for, and from where on.

    An entry such as ``1.2`` means all of 1.2; without versions: any.
    """

    engine: Engine
    versions: tuple[str, ...] = ()


class Template(_Strict, frozen=True, kw_only=True):
    """One model of the catalogue, or (``variant_of``) another way to use the files of one.

    A variant is taken only where the owner names it (``--model``).

    ``checkpoint`` is where its tokenizer and template are published.
    ``manifest`` has the keys of ``rkvlm.json`` that are known, less files and
    hashes; in place of ``encoders`` it has ``encoder``, what all encoders have
    in common. ``npu`` (encoders of engine rknn, decoders of engine rkllm) and
    ``onnx`` add to it or replace parts. ``sources`` says for each key, or for
    a key above it, where the values come from; a key without a source is in
    ``unverified``. Keys are dotted; those of ``match``, ``npu`` and ``onnx``
    begin with that word.
    """

    schema: Literal[1]
    model: Name
    title: str
    checkpoint: str = ""
    variant_of: str = ""
    family: Name
    meant_for: tuple[MeantFor, ...]
    match: Match
    manifest: dict[str, Any] = {}
    npu: dict[str, Any] = {}
    onnx: dict[str, Any] = {}
    sources: dict[str, str]
    unverified: tuple[str, ...] = ()

    def engines(self) -> tuple[str, ...]:
        """Return the engines that the model is meant for."""
        return tuple(meant.engine for meant in self.meant_for)

    def versions(self, engine: str) -> tuple[str, ...]:
        """Return the versions of an engine's library; empty for any, or for no such engine."""
        return next((m.versions for m in self.meant_for if m.engine == engine), ())

    def known(self, engine: str) -> dict[str, Any]:
        """Return ``manifest`` with what an engine (``npu``, ``onnx``) changes."""
        return merged(self.manifest, self.npu if engine == "npu" else self.onnx)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return both, ``above`` first; objects are joined, anything else is replaced."""
    made = dict(below)
    for key, value in above.items():
        old = made.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            made[key] = merged(old, value)
        else:
            made[key] = value
    return made


def parse(data: bytes, name: str) -> Template:
    """Parse and check one file of the catalogue.

    Raises:
      ManifestError: with every problem, each with its key.

    """
    if len(data) > MAX_BYTES:
        raise ManifestError(name, [f"more than {MAX_BYTES} bytes"])
    try:
        template = msgspec.json.decode(data, type=Template)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ManifestError(name, [str(exc)]) from exc
    if problems := _problems(template):
        raise ManifestError(name, problems)
    return template


def _problems(template: Template) -> list[str]:
    problems = []
    match = template.match
    if match.tokens is not None:
        if bool(match.tokens.fixed) == bool(match.tokens.square):
            problems.append("match.tokens: either fixed or square")
        if not match.sizes:
            problems.append("match.sizes: at least one, for a model with an encoder")
    if not template.meant_for:
        problems.append("meant_for: at least one engine")
    reached = [*template.sources, *template.unverified]
    problems += [
        f"{key}: has no source, and is not listed as unverified"
        for key in sorted(leaves(template))
        if not any(key == above or key.startswith(f"{above}.") for above in reached)
    ]
    return problems


def leaves(template: Template) -> set[str]:
    """Return every key that holds a value which must come from somewhere, dotted."""
    found = {"match.embedding"}
    if template.match.tokens is not None:
        found |= {"match.outputs", "match.sizes", "match.tokens"}
    for part, above in ((template.manifest, ""), (template.npu, "npu."), (template.onnx, "onnx.")):
        _walk(part, above, found)
    return found


def _walk(tree: Mapping[str, Any], above: str, found: set[str]) -> None:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            _walk(value, f"{above}{key}.", found)
        else:
            found.add(f"{above}{key}")


def shipped() -> Path:
    """Return the folder that comes with the package, or lies beside it in a source tree."""
    installed = _PACKAGE / "etc" / "models.d"
    return installed if installed.is_dir() else _PACKAGE.parent / "etc" / "models.d"


def load(folders: Iterable[Path]) -> tuple[dict[str, Template], list[ManifestError]]:
    """Read the catalogue; of two files with one model the later folder's counts.

    Returns:
      The templates by model, in order of names, and what is wrong with the
      other files.

    """
    found: dict[str, Template] = {}
    errors: list[ManifestError] = []
    for folder in folders:
        try:
            paths = sorted(p for p in folder.iterdir() if p.suffix == ".json")
        except OSError:
            continue
        for path in paths[:MAX_FILES]:
            try:
                with path.open("rb") as file:
                    template = parse(file.read(MAX_BYTES + 1), path.stem)
            except ManifestError as exc:
                errors.append(exc)
            except OSError:
                errors.append(ManifestError(path.stem, ["the file cannot be read"]))
            else:
                found[template.model] = template
    return dict(sorted(found.items())), errors


def json_schema() -> bytes:
    """Return the JSON Schema of a file of the catalogue, indented."""
    schema = msgspec.json.schema(Template)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "a file of models.d"
    return msgspec.json.format(msgspec.json.encode(schema), indent=2) + b"\n"


if __name__ == "__main__":
    import sys

    sys.stdout.buffer.write(json_schema())
