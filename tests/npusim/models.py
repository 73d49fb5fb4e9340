"""Writes the files that the simulator takes for models, and reads its trace."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.npusim.python.rknnlite.rows import caches_of, number_of, rows_of

__all__ = ["caches_of", "number_of", "rows_of"]

#: The first 256 bytes of a model file (fact 1.6f).
HEADER = struct.pack("<QQ", 0x4D4C4C52, 1) + bytes(240)
QWEN = (
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip


def rkllm(
    path: Path,
    *,
    specials: Iterable[str] | dict[str, int] = QWEN,
    byte_ids: Sequence[int] = (),
    header: bytes = HEADER,
    cut: int = 0,
    **keys: Any,
) -> Path:
    """Write a model file; ``keys`` are those of ``src/model.h``.

    ``specials`` are the special tokens, with their ids where those matter;
    ``byte_ids`` the ids of 256 one-byte tokens, to agree with a tokenizer.
    ``cut`` bytes are missing at the end.
    """
    if not isinstance(specials, dict):
        specials = {text: 150_000 + i for i, text in enumerate(specials)}
    lines = [f"{key}={_plain(value)}" for key, value in keys.items()]
    lines += [f"special={number}:{_plain(text)}" for text, number in specials.items()]
    if byte_ids:
        lines.append("byte_ids=" + ",".join(map(str, byte_ids)))
    data = header + "\n".join([*lines, "end", ""]).encode()
    path.write_bytes(data[: len(data) - cut])
    return path


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    return str(value).replace("\\", "\\\\").replace("\n", "\\n")


def rknn(
    path: Path,
    *,
    width: int,
    height: int,
    tokens: int,
    embed: int,
    outputs: int = 1,
    platform: str = "rk3588",
    version: int = 6,
    batched: bool = False,
    cross: Sequence[int] = (),
    body: int = 1000,
    cut: int = 0,
) -> Path:
    """Write a file for the encoder stand-in, laid out as the files of rknn-toolkit2 2.5.0.

    ``cross`` are layers, heads and dimension of an encoder whose two outputs
    are key/value caches.
    """
    tree = {
        "target_platform": [platform],
        "version": "2.5.0",
        "input_num": 1,
        "output_num": outputs,
        "npusim": {
            "width": width, "height": height, "tokens": tokens, "embed": embed,
            "outputs": outputs, "batched": batched, "cross": list(cross),
        },
    }  # fmt: skip
    text = json.dumps(tree).encode()
    head = b"RKNN\0\0\0\0" + struct.pack("<QQ", version, body)
    data = head.ljust(64, b"\0") + bytes(body) + struct.pack("<Q", len(text)) + text
    path.write_bytes(data[: len(data) - cut])
    return path


def sum_of(rows: npt.NDArray[np.float32]) -> str:
    """Return what an answer says of a picture's rows: a checksum over those of its rows."""
    total = 0
    for row in np.ascontiguousarray(rows, np.float32):
        total = zlib.crc32(struct.pack("<I", zlib.crc32(row.tobytes())), total)
    return f"{total:08x}"


def cross_sum(caches: Sequence[tuple[Any, Any]], mask: float = 1.0) -> str:
    """Return what an answer says of the caches of all pictures, keys and values in turn."""
    keys, values = (np.concatenate(blocks, axis) for blocks, axis in zip(
        zip(*caches, strict=True), (1, 3), strict=True
    ))  # fmt: skip
    tokens = keys.shape[1]
    whole = (keys, values, np.full(tokens, mask, np.float32), np.arange(tokens, dtype=np.int32))
    return f"{zlib.crc32(b''.join(np.ascontiguousarray(a).tobytes() for a in whole)):08x}"


def text_sum(text: str) -> str:
    """Return what an answer says of a prompt."""
    return f"{zlib.crc32(text.encode()):08x}"


def answer(text: str) -> dict[str, str]:
    """Return the parts of an answer of the kind ``report``."""
    return dict(part.split("=", 1) for part in text.split(" ") if "=" in part)


def read_trace(path: Path, event: str = "") -> list[dict[str, Any]]:
    """Return the events of a trace, or those of one kind."""
    if not path.exists():
        return []
    # Another process may be writing its line right now.
    whole, _, _ = path.read_text(errors="replace").rpartition("\n")
    found = [json.loads(line) for line in whole.splitlines()]
    return [e for e in found if not event or e["ev"] == event]
