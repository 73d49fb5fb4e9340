"""Rows of a checkpoint as ``.npy`` files: its table of embeddings, and what stands between lines.

``embed.npy`` is for models that are given rows in place of a text (manifest: ``decoder.files``),
``separators.npy`` for those whose tiles become one block (``assembly.rows``).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .weights import CheckpointError, Weights, read_json

#: Rows of the table that are in memory at a time; 3584 floats each are 15 MB.
BLOCK = 1024
TABLE, NEWLINE, SEPARATOR = "embed_tokens.weight", "image_newline", "view_seperator"
#: Keys of ``config.json`` by which a checkpoint multiplies its embeddings: the table alone would
#: be wrong. Gemma does so without a key.
SCALES = ("scale_emb", "embedding_multiplier")


def main(argv: list[str] | None = None) -> int:
    """Write what a checkpoint has; return the exit status (0 done, 1 failed, 2 usage)."""
    parser = argparse.ArgumentParser(prog="model_rows", description=__doc__)
    parser.add_argument("model", type=Path, help="checkpoint folder (config.json, safetensors)")
    parser.add_argument("out", type=Path, help="folder to write into, beside the model's files")
    args = parser.parse_args(argv)
    try:
        for line in write(args.model, args.out):
            print(line)
    except (CheckpointError, OSError) as exc:
        print(f"model_rows: {exc}", file=sys.stderr)
        return 1
    return 0


def write(folder: Path, out: Path) -> Iterator[str]:
    """Write the files and yield what was written.

    Raises:
      CheckpointError: the checkpoint has no such rows, or they cannot be used as they are.

    """
    config = read_json(folder, "config.json")
    weights = Weights(folder)
    newline, separator = weights.ending(NEWLINE), weights.ending(SEPARATOR)
    if newline and separator:
        rows = np.stack([weights.get(newline).ravel(), weights.get(separator).ravel()])
        np.save(out / "separators.npy", _finite(rows, newline))
        yield f"separators.npy: {newline}, {separator}, {rows.shape[1]} floats each"
    table = weights.ending(TABLE)
    if table is None:
        raise CheckpointError(f"the weights have no {TABLE}")
    text = config.get("text_config", config)
    kind = str(config.get("model_type", ""))
    if kind.startswith("gemma") or any(text.get(key, 1) != 1 for key in SCALES):
        if newline and separator:
            return
        raise CheckpointError(f"a model of the kind {kind} multiplies its embeddings: no embed.npy")
    words, width = weights.shape(table)
    half = out / "embed.npy.part"
    # A table may have gigabytes: it is written as it is read.
    made = np.lib.format.open_memmap(half, mode="w+", dtype=np.float16, shape=(words, width))
    try:
        for start, rows in weights.blocks(table, BLOCK):
            with np.errstate(over="ignore"):
                half_rows = rows.astype(np.float16)
            made[start : start + len(rows)] = _finite(half_rows, table)
        made.flush()
        os.replace(half, out / "embed.npy")
    finally:
        half.unlink(missing_ok=True)
    yield f"embed.npy: {table}, {words} x {width} in float16"


def _finite(rows: npt.NDArray[np.floating], name: str) -> npt.NDArray[np.floating]:
    if not np.isfinite(rows).all():
        raise CheckpointError(f"{name} has values that float16 does not hold")
    return rows
