"""What to tell people of a folder that is not a model yet: what is missing, and how to supply it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from rkvlmd.ctl.folder import ONNX, Found, WrongFolderError

#: How deep below a folder models are looked for, how many folders of them, and how many are told.
_DEPTH, _MOST_FOLDERS, _LISTED = 4, 512, 6
#: A pointer that git-lfs leaves in place of a file is shorter than this, bytes, and begins so.
_POINTER, _LFS = 1024, b"version https://git-lfs.github.com/spec/"
_MODELS = (".rkllm", ".rknn", ".onnx")
#: The endings of downloads that have not ended.
_UNFINISHED = (".part", ".partial", ".incomplete", ".crdownload", ".aria2", ".download")


def check_whole(found: Found) -> None:
    """Check that what was downloaded is there.

    Raises:
      WrongFolderError: a model file is empty, a pointer of git-lfs, or a link into nothing.

    """
    for file in [*found.rkllm, *found.rknn, *(g.file for g in found.graphs)]:
        if found.files[file] == 0:
            message = f"{file}: is empty: the download or the copy failed; fetch it again"
            raise WrongFolderError(message, code="incomplete", param=file)
        if found.files[file] < _POINTER and _starts(found.path / file, _LFS):
            message = (
                f"{file}: is a pointer of git-lfs and not the file itself; run git lfs pull in the"
                " clone, or download the file from the repository's page"
            )
            raise WrongFolderError(message, code="incomplete", param=file)
    lost = [file for file in found.lost if file.lower().endswith(_MODELS)]
    if lost:
        message = (
            f"{found.path}: {', '.join(lost)}: a link to a file that is not there. Copy the files"
            " themselves (cp -L), or download them again"
        )
        raise WrongFolderError(message, code="incomplete", param=lost[0])


def _starts(path: Path, text: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(text)) == text
    except OSError:
        return False


def no_folder(path: Path) -> str:
    """Return the error for a folder that is not there."""
    text = f"{path}: there is no such folder"
    if len(path.parts) == 2 and not path.is_absolute() and not path.parent.exists():
        text += (
            ". An import takes a folder on this machine; if this is a repository on Hugging Face,"
            f" download it first: hf download {path} --local-dir {path.name}"
        )
    return text


def none(found: Found) -> str:
    """Return the error for a folder without any decoder."""
    path, says = found.path, found.says()
    if found.rknn:
        return (
            f"{path}: the decoder (.rkllm) is missing; {says}. An .rknn is the vision encoder"
            " alone: put the .rkllm of the same model beside it"
        )
    if whole := [g.file for g in found.graphs if g.file.endswith("model.onnx")]:
        return (
            f"{path}: {whole[0]} is a whole model in one graph; these ONNX files are none of the"
            " published parts that can be used (vision_encoder, embed_tokens,"
            f" decoder_model_merged); tools/export_onnx CHECKPOINT makes those; {says}"
        )
    if found.graphs:
        return (
            f"{path}: these ONNX files are none of the published parts (vision_encoder,"
            f" embed_tokens, decoder_model_merged); {says}"
        )
    if found.weights and all(name.lower().endswith(".gguf") for name in found.weights):
        return (
            f"{path}: a GGUF file, which is for other programs; take the original checkpoint"
            f" (.safetensors) and convert that; {says}"
        )
    if found.weights:
        return (
            f"{path}: a checkpoint that is not converted: tools/export_onnx makes ONNX files"
            f" of it, rkllm-toolkit and rknn-toolkit2 make NPU files; {says}"
        )
    if partial := [name for name in found.files if name.lower().endswith(_UNFINISHED)]:
        return f"{path}: {', '.join(partial[:_LISTED])}: a download that has not ended; {says}"
    if below := list(_below(path)):
        more = f" and {len(below) - _LISTED} more" if len(below) > _LISTED else ""
        listed = ", ".join(str(folder) for folder in below[:_LISTED])
        one = "import that folder" if len(below) == 1 else "import one of these folders"
        return f"{path}: no model files here, but in {listed}{more}: {one}"
    return f"{path}: no known family; {says}"


def missing(found: Found, files: Iterable[str]) -> str:
    """Return the error for a folder of ONNX files that is not whole."""
    files = list(files)
    text = f"{found.path}: {', '.join(files)} missing; {found.says()}"
    above = found.path.resolve().parent
    beside = [name for name in files if "/" not in name and (above / name).is_file()]
    if found.path.resolve().name == ONNX and beside:
        return f"{text}. {', '.join(beside)} lies one folder above: import {above}"
    if "tokenizer.json" in files and "tokenizer.model" in found.files:
        text += (
            ". tokenizer.model is of another kind; with transformers,"
            " AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(DIR) writes a"
            " tokenizer.json"
        )
    elif any(name.endswith(".json") for name in files):
        text += ". The .json files are those of the original model: put them into the folder"
    if any(name.endswith(".onnx") for name in files):
        text += ". tools/export_onnx CHECKPOINT makes all .onnx files of a model"
    return text


def _below(path: Path) -> Iterator[Path]:
    """Yield the folders below one that hold model files."""
    for count, (above, folders, files) in enumerate(os.walk(path)):
        here = Path(above)
        depth = len(here.relative_to(path).parts)
        if count >= _MOST_FOLDERS:
            return
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if depth < _DEPTH else []
        own = [name for name in files if name.lower().endswith(_MODELS)]
        onnx = here / ONNX
        if not own and onnx.is_dir():
            own = [name for name in _names(onnx) if name.lower().endswith(_MODELS)]
        if own and here != path:
            folders[:] = []
            yield here


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
