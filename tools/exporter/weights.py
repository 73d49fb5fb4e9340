"""Reads a checkpoint folder: its JSON files and its safetensors weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

#: Types of the safetensors header; BF16 is the upper half of a float32.
TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}


class CheckpointError(Exception):
    """The checkpoint cannot be exported; the message says why."""


def read_json(folder: Path, name: str, *, needed: bool = True) -> dict[str, Any]:
    """Return a JSON file of the folder; an empty object when it may be missing and is."""
    path = folder / name
    if not path.is_file():
        if needed:
            raise CheckpointError(f"{name} is missing")
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise CheckpointError(f"{name} is not JSON: {exc}") from exc
    if not isinstance(tree, dict):
        raise CheckpointError(f"{name} is not an object")
    return tree


class Weights:
    """The tensors of ``model.safetensors``, or of the shards that its index names.

    The files are mapped; a tensor is read when it is asked for, as float32.
    """

    def __init__(self, folder: Path) -> None:
        index = read_json(folder, "model.safetensors.index.json", needed=False)
        names = sorted(set(index["weight_map"].values())) if index else ["model.safetensors"]
        self._found: dict[str, tuple[npt.NDArray[np.uint8], str, list[int]]] = {}
        for name in names:
            self._open(folder / name)

    def _open(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError(f"{path.name} is missing")
        data = np.memmap(path, np.uint8, "r")
        size = int.from_bytes(data[:8].tobytes(), "little")
        try:
            header = json.loads(data[8 : 8 + size].tobytes())
        except ValueError as exc:
            raise CheckpointError(f"{path.name} is not a safetensors file") from exc
        for key, entry in header.items():
            if key == "__metadata__":
                continue
            start, end = (8 + size + at for at in entry["data_offsets"])
            if end > data.size:
                raise CheckpointError(f"{path.name} is cut short")
            self._found[key] = (data[start:end], entry["dtype"], entry["shape"])

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def ending(self, end: str) -> str | None:
        """Return the first name, in order, that is ``end`` or ends with it after a dot."""
        return next((n for n in sorted(self._found) if f".{n}".endswith(f".{end}")), None)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor that is there."""
        return tuple(self._found[name][2])

    def blocks(self, name: str, rows: int) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Yield a matrix in parts of some rows, each with the number of its first."""
        raw, kind, (total, width) = self._found[name]
        if kind not in TYPES:
            raise CheckpointError(f"{name} has the type {kind}")
        size = width * np.dtype(TYPES[kind]).itemsize
        for start in range(0, total, rows):
            part = raw[start * size : (start + rows) * size]
            yield start, _floats(part, kind).reshape(-1, width)

    def get(self, name: str, shape: tuple[int, ...] | None = None) -> npt.NDArray[np.float32]:
        """Return a tensor; ``shape`` is what the configuration says that it must be."""
        if name not in self._found:
            raise CheckpointError(f"the weights have no {name}")
        raw, kind, size = self._found[name]
        if kind not in TYPES:
            raise CheckpointError(f"{name} has the type {kind}")
        if shape is not None and tuple(size) != shape:
            raise CheckpointError(f"{name} has the shape {tuple(size)}, not {shape}")
        return _floats(raw, kind).reshape(size)


def _floats(raw: npt.NDArray[np.uint8], kind: str) -> npt.NDArray[np.float32]:
    values = np.frombuffer(raw.tobytes(), TYPES[kind])
    if kind == "BF16":
        values = (values.astype("<u4") << 16).view("<f4")
    return values.astype(np.float32)
