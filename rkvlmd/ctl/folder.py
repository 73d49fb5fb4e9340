"""What lies in a folder of published files: looked at from outside, nothing is changed."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkvlmd.board import rknn
from rkvlmd.ctl.client import CtlError

if TYPE_CHECKING:
    from rkvlmd.models.matching import Tower

#: Most entries of a folder, largest JSON file and largest tokenizer that are read (bytes).
MAX_ENTRIES = 4096
MAX_JSON = 4 << 20
MAX_TOKENIZER = 128 << 20
#: How long reading the shapes of one ONNX file may take, seconds.
INSPECT_SECONDS = 60
#: How long writing a part of one may take, seconds: a gigabyte to a slow card.
CUT_SECONDS = 600
#: Where published ONNX checkpoints keep their graphs, besides the folder itself.
ONNX = "onnx"
#: The parts of a published ONNX checkpoint by the beginning of their names, longest first.
ROLES = {
    "vision_encoder": "vision", "image_encoder": "vision", "vision_model": "vision",
    "multi_modal_projector": "projector", "vision_projector": "projector",
    "projector": "projector",
    "embed_tokens": "embed",
    "decoder_with_past_model": "decoder", "decoder_model_merged": "decoder",
    "decoder_model": "decoder_prefill",
    "text_model": "text",
}  # fmt: skip
#: What the vision tower of CLIP calls its vector.
VECTOR = "image_embeds"
#: The endings of names that tell in which precision the same graph is stored.
_VARIANT = re.compile(r"_(fp16|q4f16|q4|q8|int8|uint8|int4|bnb4|quantized)$")
_SIZE = re.compile(r"(?<!\d)(\d{3,4})x(\d{3,4})(?!\d)")
#: What a folder of an unconverted checkpoint holds.
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


def quoted(name: str) -> str:
    """Return a file's name as a shell takes it."""
    return shlex.quote(name)


class WrongFolderError(CtlError):
    """The folder cannot become a model; says what was found."""

    exit_status = 1


@dataclass(frozen=True, slots=True)
class Graph:
    """One ONNX file: its part, its precision (empty for full) and its size in bytes."""

    file: str
    role: str
    variant: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Found:
    """The files of a folder, sorted by what they are; names are relative to it."""

    path: Path
    files: dict[str, int]
    rkllm: tuple[str, ...] = ()
    rknn: tuple[str, ...] = ()
    graphs: tuple[Graph, ...] = ()
    weights: tuple[str, ...] = ()
    #: Links to files that are not there.
    lost: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    picture: Mapping[str, Any] = field(default_factory=dict)
    film: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def says(self) -> str:
        """Return in words what there is, for an error."""
        kinds = [
            (self.rkllm, ".rkllm"), (self.rknn, ".rknn"), ([g.file for g in self.graphs], ".onnx"),
            (self.weights, "weights of a checkpoint"),
        ]  # fmt: skip
        parts = [f"{kind}: {', '.join(files[:8])}" for files, kind in kinds if files]
        if kind := self.config.get("model_type"):
            parts.append(f"config.json with model_type {kind!r}")
        if not parts:
            names = ", ".join(list(self.files)[:8]) or "nothing"
            return f"found {names}, and no model files (.rkllm, .rknn, .onnx)"
        return "found " + "; ".join(parts)


def look(path: Path) -> Found:
    """Sort the files of a folder.

    Raises:
      WrongFolderError: it is no folder, or cannot be read.

    """
    files, lost = _files(path)
    problems: list[str] = []
    graphs = tuple(g for g in (_graph(f, files[f]) for f in files) if g is not None)

    def tree(name: str) -> dict[str, Any]:
        return _json(path, name, files, problems)

    return Found(
        path=path,
        files=files,
        rkllm=tuple(f for f in files if f.lower().endswith(".rkllm")),
        rknn=tuple(f for f in files if f.lower().endswith(".rknn")),
        graphs=graphs,
        weights=tuple(f for f in files if f.lower().endswith(_WEIGHTS)),
        config=tree("config.json"),
        picture=tree("preprocessor_config.json"),
        film=tree("video_preprocessor_config.json"),
        generation=tree("generation_config.json"),
        lost=lost,
        problems=tuple(problems),
    )


def name_of(path: Path) -> str:
    """Return what a folder is called; in the cache of Hugging Face, what the repository is."""
    real = path.resolve()
    above = real.parent
    if above.name == "snapshots" and above.parent.name.startswith("models--"):
        return above.parent.name.rpartition("--")[2]
    return real.name


def _files(path: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the files of the folder and of its ``onnx``, with their sizes, and broken links."""
    found: dict[str, int] = {}
    lost: list[str] = []
    try:
        for above in ("", ONNX):
            folder = path / above
            if above and not folder.is_dir():
                continue
            with os.scandir(folder) as entries:
                for count, entry in enumerate(entries):
                    if count >= MAX_ENTRIES:
                        raise WrongFolderError(f"{path}: more than {MAX_ENTRIES} entries")
                    name = f"{above}/{entry.name}" if above else entry.name
                    if entry.is_file():
                        found[name] = entry.stat().st_size
                    elif entry.is_symlink() and not entry.is_dir():
                        lost.append(name)
    except FileNotFoundError:
        raise WrongFolderError(f"{path}: there is no such folder", code="not_found") from None
    except NotADirectoryError:
        raise WrongFolderError(f"{path}: is no folder") from None
    except OSError as exc:
        raise WrongFolderError(f"{path}: cannot be read ({exc.strerror})") from None
    return dict(sorted(found.items())), tuple(sorted(lost))


def _graph(file: str, size: int) -> Graph | None:
    stem, dot, ending = file.rpartition("/")[2].rpartition(".")
    if not dot or ending.lower() != "onnx":
        return None
    match = _VARIANT.search(stem)
    base = stem[: match.start()] if match else stem
    return Graph(file, ROLES.get(base, ""), match[1] if match else "", size)


def _json(path: Path, name: str, files: Mapping[str, int], problems: list[str]) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        found = json.loads(read(path / name, MAX_JSON))
    except (ValueError, RecursionError) as exc:
        problems.append(f"{name}: cannot be used ({exc})")
        return {}
    if not isinstance(found, dict):
        problems.append(f"{name}: is no JSON object")
        return {}
    return found


def read(path: Path, most: int) -> bytes:
    """Return a file's content.

    Raises:
      ValueError: it is larger than ``most`` bytes, or cannot be read.

    """
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as exc:
        raise ValueError(f"cannot be read: {exc.strerror}") from None
    if len(data) > most:
        raise ValueError(f"larger than {most} bytes")
    return data


def encoder_of_npu(path: Path, file: str, size: tuple[int, int] | None) -> Tower:
    """Return what an ``.rknn`` file says of itself.

    ``size`` (width, height in pixels) is the owner's word; without it and
    without the file's own the size in the file's name is taken.

    Raises:
      WrongFolderError: it is no whole ``.rknn`` file.

    """
    from rkvlmd.models.matching import Tower

    trailer = rknn.read(path / file)
    if trailer.state in {"other", "short", "unreadable"}:
        why = {
            "other": "is no .rknn file", "short": "is shorter than it says; copy it again",
            "unreadable": "cannot be read",
        }[trailer.state]  # fmt: skip
        raise WrongFolderError(f"{file}: {why}", code="invalid_model", param=file)
    width = height = tokens = embedding = None
    odd = _odd(trailer)
    if trailer.takes and not odd:
        dims = trailer.takes[0].dims
        # The file keeps the order of the exported graph: channels first, as a rule.
        height, width = dims[2:] if dims[1] == 3 else dims[1:3]
    elif size is not None:
        width, height = size
    elif named := _SIZE.search(file):
        width, height = int(named[1]), int(named[2])
    if trailer.gives:
        rows = [d for d in trailer.gives[0].dims[:-1] if d > 1]
        tokens, embedding = (rows[-1] if rows else 1), trailer.gives[0].dims[-1]
    return Tower(
        file=file, engine="rknn", width=width, height=height, tokens=tokens, embedding=embedding,
        outputs=trailer.outputs or len(trailer.gives) or None, odd=odd,
        platforms=trailer.platforms, toolkit=trailer.toolkit,
    )  # fmt: skip


def _odd(trailer: rknn.Trailer) -> str:
    """Return what a file takes that is not one picture, in words; empty if it is, or unknown."""
    takes = [list(tensor.dims) for tensor in trailer.takes]
    if not takes or (len(takes) == 1 and len(takes[0]) == 4 and takes[0][0] == 1
                     and 3 in takes[0][1::2]):  # fmt: skip
        return ""
    return f"inputs of {' and '.join(map(str, takes))}"


def shapes(path: Path, file: str) -> dict[str, Any]:
    """Return what ``python -m rkvlmd.engine inspect`` says of an ONNX file.

    Raises:
      WrongFolderError: it is no ONNX file.

    """
    words = ("inspect", str(path / file))
    found: dict[str, Any] = json.loads(_engine(file, words, INSPECT_SECONDS, "reading it"))
    return found


def cut(path: Path, file: str, target: Path, output: str) -> None:
    """Write the part of an ONNX file that computes one output.

    Raises:
      WrongFolderError: it cannot be taken apart.

    """
    target.parent.mkdir(parents=True, exist_ok=True)
    words = ("cut", str(path / file), str(target), output)
    _engine(file, words, CUT_SECONDS, "taking it apart")


def _engine(file: str, words: Sequence[str], seconds: float, what: str) -> str:
    """Return what ``python -m rkvlmd.engine`` prints; its last word on stderr is the error."""
    command = [sys.executable, "-m", "rkvlmd.engine", *words]
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds, check=False, text=True)
    except subprocess.TimeoutExpired:
        raise WrongFolderError(f"{file}: {what} took too long", param=file) from None
    if done.returncode:
        said = done.stderr.strip().splitlines()
        why = said[-1] if said else f"{what} failed"
        raise WrongFolderError(f"{file}: {why}", code="invalid_model", param=file)
    return done.stdout


def encoder_of_onnx(
    file: str, shape: Mapping[str, Any], projected: Mapping[str, Any] | None
) -> Tower:
    """Return what the graph of a vision encoder says; ``projected`` is that of its projector."""
    from rkvlmd.models.matching import Tower

    width = height = None
    patches = bool(shape["inputs"])
    for arg in shape["inputs"]:
        dims = arg["shape"]
        patches = patches and len(dims) <= 2
        if len(dims) >= 4 and arg["name"] != "pixel_attention_mask":
            sides = dims[-2:] if dims[-3] == 3 or dims[-1] != 3 else dims[-3:-1]
            if all(isinstance(side, int) and side > 0 for side in sides):
                height, width = sides
            break
    gives = (projected or shape)["outputs"]
    named = [arg for arg in gives if arg["name"] == VECTOR]
    dims = (named or gives)[0]["shape"] if gives else []
    tokens = dims[-2] if len(dims) >= 3 and isinstance(dims[-2], int) else None
    if named and len(dims) == 2:
        tokens = 1
    embedding = dims[-1] if dims and isinstance(dims[-1], int) else None
    return Tower(
        file=file, engine="onnx", width=width, height=height, tokens=tokens, embedding=embedding,
        outputs=1 if named else len(gives) or None, patches=patches,
    )  # fmt: skip


def special_tokens(path: Path, file: str) -> dict[str, int]:
    """Return the special tokens of a ``tokenizer.json`` with their ids.

    Raises:
      WrongFolderError: it is no tokenizer of the ``tokenizers`` library.

    """
    try:
        tree = json.loads(read(path / file, MAX_TOKENIZER))
        added = tree["added_tokens"]
        return {str(t["content"]): int(t["id"]) for t in added if t.get("special")}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        message = f"{file}: is no tokenizer.json of the tokenizers library"
        raise WrongFolderError(message, code="invalid_model", param=file) from None


def template_in_json(found: Found) -> str | None:
    """Return the chat template that stands inside a JSON file, as older folders have it."""
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        text = _json(found.path, name, found.files, []).get("chat_template")
        if isinstance(text, list):  # several, each {"name", "template"}
            named = {t.get("name"): t.get("template") for t in text if isinstance(t, dict)}
            text = named.get("default")
        if isinstance(text, str) and text:
            return text
    return None


def thinks(found: Found, template: str | None) -> bool:
    """Whether the chat template of the folder writes the usual tags around thoughts."""
    from rkvlmd.models.answers import Thinking

    tags, text = Thinking(), template_in_json(found) or ""
    if template in found.files:
        try:
            text = read(found.path / str(template), MAX_JSON).decode(errors="replace")
        except ValueError:
            return False
    return tags.start in text and tags.end in text
