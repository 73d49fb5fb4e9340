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


@dataclass(frozen=True, slots=True)
class Trailer:
    """What the file says of itself.

    ``state``: ``read``; ``other`` has not the magic; ``short`` ends before its
    own lengths say; ``unknown`` is laid out in another way; ``unreadable``.
    """

    state: Literal["read", "other", "short", "unknown", "unreadable"]
    platforms: tuple[str, ...] = ()
    toolkit: str | None = None
    outputs: int | None = None


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
    )
