"""Model folders for tests: right manifests over files that hold nothing."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

#: A whole and right manifest, without file hashes; ``tree`` fills them in.
_TREE: dict[str, Any] = {
    "schema": 1,
    "name": "model",
    "family": "smolvlm",
    "encoders": [
        {
            "engine": "onnx",
            "file": "vision.onnx",
            "sha256": "",
            "width": 64,
            "height": 64,
            "tokens": 16,
            "embedding": 32,
        }
    ],
    "decoder": {
        "engine": "onnx",
        "files": {
            "embed": {"file": "embed.onnx", "sha256": ""},
            "decoder": {"file": "decoder.onnx", "sha256": ""},
        },
        "context": 512,
        "embedding": 32,
    },
    "tokenizer": {"file": "tokenizer.json", "sha256": ""},
    "template": {"file": "template.jinja", "sha256": ""},
    "image": {"start": "<a>", "content": "<i>", "end": "<b>"},
    "capabilities": ["image", "multi_image"],
}


def content(file: str) -> bytes:
    """Return what stands in a file of a test model."""
    return f"this is {file}".encode()


def tree(**top: Any) -> dict[str, Any]:
    """Return the manifest as JSON values, with ``top`` in place of top-level keys."""
    built = copy.deepcopy(_TREE)
    for entry in (
        *built["encoders"],
        *built["decoder"]["files"].values(),
        built["tokenizer"],
        built["template"],
    ):
        entry["sha256"] = hashlib.sha256(content(entry["file"])).hexdigest()
    return built | top


def write_model(folder: Path, **top: Any) -> Path:
    """Make a model folder; return it."""
    folder.mkdir(parents=True)
    built = tree(**top)
    names = [e["file"] for e in built["encoders"]]
    names += [f["file"] for f in built["decoder"]["files"].values()]
    names += ["tokenizer.json", "template.jinja"]
    for name in names:
        (folder / name).write_bytes(content(name))
    (folder / "rkvlm.json").write_text(json.dumps(built))
    return folder
