"""Writes the tree of one machine, and files that look like the vendor's."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

AARCH64, ARM, X86_64 = 183, 40, 62
MODELS = "/var/lib/rkvlmd/models"


@dataclass
class Board:
    """One machine; change it as you like before ``write``.

    ``files``: path to text or bytes, ``links``: path to target, ``nodes`` and
    ``here`` as in ``recorded.json``.
    """

    here: dict[str, Any]
    files: dict[str, str | bytes] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write the tree; return its root."""
        for path, content in self.files.items():
            file = folder / path.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.encode() if isinstance(content, str) else content)
        for path, target in self.links.items():
            link = folder / path.lstrip("/")
            link.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(target, link)
        record = {"here": self.here, "nodes": self.nodes}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recorded.json").write_text(json.dumps(record))
        return folder

    def node(self, path: str, gid: int, mode: str = "0660", uid: int = 0) -> None:
        """Add a device node."""
        self.nodes[path] = {"mode": mode, "uid": uid, "gid": gid}

    def without(self, *starts: str) -> Board:
        """Drop every file whose path starts with one of ``starts``."""
        self.files = {k: v for k, v in self.files.items() if not k.startswith(starts)}
        return self

    def model(self, name: str, **changes: Any) -> None:
        """Add a model folder; see ``model_files``."""
        for file, content in model_files(name, **changes).items():
            self.files[f"{MODELS}/{name}/{file}"] = content


def library(text: str, machine: int = AARCH64, needed: Sequence[str] = ()) -> bytes:
    """Return an ELF file for ``machine`` that needs ``needed`` and says ``text``."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name in needed)
    at, base = 64 + 2 * 56, 0x10000
    offsets, place = [], 1
    for name in needed:
        offsets.append(place)
        place += len(name) + 1
    dynamic = b"".join(struct.pack("<qQ", 1, offset) for offset in offsets)
    dynamic += struct.pack("<qQ", 5, base + at) + struct.pack("<qQ", 0, 0)
    body = names + dynamic
    load = struct.pack("<IIQQQQQQ", 1, 4, 0, base, base, at + len(body), at + len(body), 4096)
    table = at + len(names)
    dyn = struct.pack(
        "<IIQQQQQQ", 2, 4, table, base + table, base + table, len(dynamic), len(dynamic), 8
    )
    ident = b"\x7fELF" + bytes([1 if machine == ARM else 2, 1, 1]) + bytes(9)
    head = ident + struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    return head + load + dyn + body + bytes(3000) + text.encode() + bytes(100)


def rkllm(version: str, machine: int = AARCH64, needed: Sequence[str] = ()) -> bytes:
    """Return a ``librkllmrt.so`` of a version."""
    text = f"RKLLM SDK (version: {version} | target: Linux | build: 00000000 2025-01-01)"
    return library(text, machine, needed)


def rknnrt(version: str, machine: int = AARCH64) -> bytes:
    """Return a ``librknnrt.so`` of a version."""
    return library(f"librknnrt version: {version} (0000000000@2025-01-01T00:00:00)", machine)


def rknn(platform: str = "rk3588", version: str = "2.3.2", outputs: int = 1) -> bytes:
    """Return an ``.rknn`` file with a body of nothing."""
    tree = {"target_platform": [platform], "version": version, "output_num": outputs}
    text = json.dumps(tree).encode()
    head = b"RKNN\0\0\0\0" + struct.pack("<QQ", 6, 512) + bytes(40)
    return head + bytes(512) + struct.pack("<Q", len(text)) + text


def model_files(
    name: str,
    *,
    encoder: bytes | None = b"",
    decoder: str = "model_w8a8_rk3588.rkllm",
    outputs: int = 1,
    **of_decoder: Any,
) -> dict[str, bytes]:
    """Return the files of a model for the NPU; an empty ``encoder`` is one for the RK3588."""
    files = {decoder: b"weights"}
    encoders: list[dict[str, Any]] = []
    if encoder is not None:
        files["vision.rknn"] = encoder or rknn(outputs=outputs)
        encoders.append(
            {
                "engine": "rknn", "file": "vision.rknn", "sha256": _hash(files["vision.rknn"]),
                "width": 448, "height": 448, "baked": True, "layout": "nhwc", "tokens": 196,
                "embedding": 2048, "outputs": outputs, "lease": "npu",
            }
        )  # fmt: skip
    manifest: dict[str, Any] = {
        "schema": 1,
        "name": name,
        "family": "smolvlm",
        "encoders": encoders,
        "decoder": {
            "engine": "rkllm", "context": 4096, "embedding": 2048, "lease": "npu",
            "files": {"model": {"file": decoder, "sha256": _hash(files[decoder])}},
            **of_decoder,
        },
        "image": {"start": "<a>", "content": "<i>", "end": "<b>"},
    }  # fmt: skip
    return files | {"rkvlm.json": json.dumps(manifest).encode()}


def onnx_files(name: str) -> dict[str, bytes]:
    """Return the files of a model for the CPU, text only."""
    file = {"file": "model.onnx", "sha256": _hash(b"weights")}
    manifest = {
        "schema": 1,
        "name": name,
        "family": "smolvlm",
        "decoder": {
            "engine": "onnx", "context": 512, "embedding": 32,
            "files": {"embed": file, "decoder": file},
        },
        "tokenizer": file,
        "template": file,
    }  # fmt: skip
    return {"model.onnx": b"weights", "rkvlm.json": json.dumps(manifest).encode()}


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
