"""A model's own embedding table: prompts as rows instead of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rkvlmd.engine.backend import Rows
from rkvlmd.errors import RkvlmdError
from rkvlmd.models.manifest import Manifest
from rkvlmd.wire.child import Span

_KEY = "decoder.files.embed.file"


class Table:
    """Rows of (vocabulary, embedding), read from storage as they are needed."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Map the files that the manifest names.

        Raises:
          RkvlmdError: ``invalid_model`` when they are not what it says.

        """
        files = manifest.decoder.files
        self._rows = _open(folder / files["embed"].file, _KEY)
        embedding = manifest.decoder.embedding
        if self._rows.ndim != 2 or self._rows.shape[1] != embedding:
            raise RkvlmdError(
                "invalid_model",
                f"{_KEY}: has the shape {self._rows.shape}, but decoder.embedding is {embedding}.",
            )
        self._scale: npt.NDArray[Any] | None = None
        if self._rows.dtype == np.int8:
            if "embed_scale" not in files:
                raise RkvlmdError("invalid_model", f"{_KEY}: int8 needs decoder.files.embed_scale.")
            self._scale = _open(
                folder / files["embed_scale"].file, "decoder.files.embed_scale.file"
            )
            if self._scale.shape != (len(self._rows),) or self._scale.dtype != np.float32:
                raise RkvlmdError(
                    "invalid_model",
                    "decoder.files.embed_scale.file: must be float32, one for each row.",
                )
        elif self._rows.dtype not in {np.dtype(np.float16), np.dtype(np.float32)}:
            raise RkvlmdError(
                "invalid_model",
                f"{_KEY}: must be float16, float32 or int8, not {self._rows.dtype}.",
            )

    def __call__(self, tokens: Sequence[int], spans: Sequence[Span], rows: Sequence[Rows]) -> Rows:
        """Return float32 of shape (tokens, embedding), pictures put in at their spans.

        Raises:
          RkvlmdError: ``engine_error`` for what does not fit.

        """
        ids = np.asarray(tokens, np.int64)
        if not len(ids) or ids.min() < 0 or ids.max() >= len(self._rows):
            raise RkvlmdError("engine_error", "The prompt has a token that the model lacks.")
        found: Rows = self._rows[ids].astype(np.float32)
        if self._scale is not None:
            found *= self._scale[ids, None]
        for span, values in zip(spans, rows, strict=True):
            if values.shape != (span.count, found.shape[1]) or span.start + span.count > len(found):
                raise RkvlmdError("engine_error", "A picture does not fit its place.")
            found[span.start : span.start + span.count] = values
        return np.ascontiguousarray(found)


def _open(path: Path, key: str) -> npt.NDArray[Any]:
    try:
        found: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as exc:
        print(f"{path.name}: {exc}", flush=True)
        raise RkvlmdError("invalid_model", f"{key}: {path.name} is no .npy file.") from exc
    return found
