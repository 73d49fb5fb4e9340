"""Reads for whom and by which toolkit an ``.rknn`` file was made, without any library."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

#: The layout was seen on files of rknn-toolkit2 2.5.0 and is not documented, so what does not
#: fit it is unknown and not wrong: magic, u64 version, u64 length n of the body, the body
#: from byte 64, u64 length of the JSON behind it, the JSON.
MAGIC = b"RKNN\0\0\0\0"
_BODY = 64
#: Longest JSON that is read, bytes, and largest body that makes sense.
MAX_JSON = 16 << 20
_MAX_BODY = 1 << 40


#: Most inputs, outputs and dimensions that make sense.
_MAX_TENSORS = 256


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output: its name and its dimensions (an input of pixels: batch, 3, rows, columns)."""

    name: str
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trailer:
    """What the file says of itself.

    ``state``: ``read``; ``other`` has not the magic; ``short`` ends before its
    own lengths say; ``unknown`` is laid out in another way; ``unreadable``.
    ``takes`` and ``gives`` are the inputs and outputs in the order of the
    model, empty where the file does not say.
    """

    state: Literal["read", "other", "short", "unknown", "unreadable"]
    platforms: tuple[str, ...] = ()
    toolkit: str | None = None
    outputs: int | None = None
    takes: tuple[Tensor, ...] = ()
    gives: tuple[Tensor, ...] = ()


def read(path: Path) -> Trailer:
    """Return what the end of the file says; never raises for what the file holds."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            return _read(file, size)
    except OSError:
        return Trailer("unreadable")


def _read(file: BinaryIO, size: int) -> Trailer:
    head = file.read(24)
    if head[:8] != MAGIC:
        return Trailer("other")
    if len(head) < 24:
        return Trailer("short")
    (body,) = struct.unpack_from("<Q", head, 16)
    if body > _MAX_BODY:
        return Trailer("unknown")
    if _BODY + body + 8 > size:
        return Trailer("short")
    file.seek(_BODY + body)
    (length,) = struct.unpack("<Q", file.read(8))
    if not 2 <= length <= MAX_JSON:
        return Trailer("unknown")
    if _BODY + body + 8 + length > size:
        return Trailer("short")
    try:
        tree = json.loads(file.read(length).rstrip(b"\0"))
    except (ValueError, RecursionError):
        return Trailer("unknown")
    return _trailer(tree) if isinstance(tree, dict) else Trailer("unknown")


def _trailer(tree: dict[str, Any]) -> Trailer:
    platforms = tree.get("target_platform")
    if isinstance(platforms, str):
        platforms = [platforms]
    if not isinstance(platforms, list):
        platforms = []
    version, outputs = tree.get("version"), tree.get("output_num")
    return Trailer(
        "read",
        tuple(name.lower() for name in platforms if isinstance(name, str)),
        version if isinstance(version, str) else None,
        outputs if isinstance(outputs, int) and not isinstance(outputs, bool) else None,
        _tensors(tree, "input"),
        _tensors(tree, "output"),
    )


def _tensors(tree: dict[str, Any], side: str) -> tuple[Tensor, ...]:
    """Return the tensors that ``graph`` joins to a ``side``; none if one of them is not understood.

    ``graph`` has ``{"left": side, "left_tensor_id": place, "right": "norm_tensor",
    "right_tensor_id": id}``, ``norm_tensor`` has ``{"tensor_id", "url", "size"}``.
    """
    graph, listed = tree.get("graph"), tree.get("norm_tensor")
    if not (isinstance(graph, list) and isinstance(listed, list)):
        return ()
    by_id = {t.get("tensor_id"): t for t in listed[:_MAX_TENSORS] if isinstance(t, dict)}
    found: dict[int, Tensor] = {}
    for edge in graph[: 2 * _MAX_TENSORS]:
        if not isinstance(edge, dict) or edge.get("left") != side:
            continue
        place, named = edge.get("left_tensor_id"), edge.get("right_tensor_id")
        tensor = by_id.get(named) if isinstance(named, int) else None
        if edge.get("right") != "norm_tensor" or tensor is None or not isinstance(place, int):
            return ()
        dims, name = tensor.get("size"), tensor.get("url")
        if not (isinstance(dims, list) and all(type(d) is int and d > 0 for d in dims)):
            return ()
        found[place] = Tensor(name if isinstance(name, str) else "", tuple(dims))
    return tuple(found[place] for place in sorted(found))
