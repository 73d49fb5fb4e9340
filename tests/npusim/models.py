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

#: The first 256 bytes of a model file (fact sheet 1.6).
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
    **keys: Any,
) -> Path:
    """Write a model file; ``keys`` are those of ``src/model.h``.

    ``specials`` are the special tokens, with their ids where those matter;
    ``byte_ids`` the ids of 256 one-byte tokens, to agree with a tokenizer.
    """
    if not isinstance(specials, dict):
        specials = {text: 150_000 + i for i, text in enumerate(specials)}
    lines = [f"{key}={_plain(value)}" for key, value in keys.items()]
    lines += [f"special={number}:{_plain(text)}" for text, number in specials.items()]
    if byte_ids:
        lines.append("byte_ids=" + ",".join(map(str, byte_ids)))
    path.write_bytes(HEADER + "\n".join([*lines, "end", ""]).encode())
    return path


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    return str(value).replace("\\", "\\\\").replace("\n", "\\n")


def rows_of(picture: int, tokens: int, embed: int, outputs: int = 1) -> npt.NDArray[np.float32]:
    """Return the rows of a picture as the encoder stand-in makes them, marks included.

    Shape (tokens, outputs x embed): row i holds the outputs of token i one
    after the other. Each part begins with 7000 + output, the picture's number,
    the row and a checksum over the rest.
    """
    rest = np.random.default_rng(picture).standard_normal(
        (tokens, outputs, embed), dtype=np.float32
    )
    for row in range(tokens):
        for output in range(outputs):
            part = rest[row, output]
            total = zlib.crc32(part[4:].tobytes()) & 0xFFFFFF
            part[:4] = (7000 + output, picture & 0xFFFFFF, row, total)
    return rest.reshape(tokens, outputs * embed)


def sum_of(rows: npt.NDArray[np.float32]) -> str:
    """Return what an answer says of a picture's rows: a checksum over those of its rows."""
    total = 0
    for row in np.ascontiguousarray(rows, np.float32):
        total = zlib.crc32(struct.pack("<I", zlib.crc32(row.tobytes())), total)
    return f"{total:08x}"


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
    found = [json.loads(line) for line in path.read_text(errors="replace").splitlines()]
    return [e for e in found if not event or e["ev"] == event]
