"""The rows of a picture's views, put together as one block (``models.assembly``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np

from rkvlmd.engine import memfd
from rkvlmd.engine.backend import Rows
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import assembly
from rkvlmd.models import manifest as manifests
from rkvlmd.models.manifest import Manifest
from rkvlmd.wire import child

_KEY = "assembly.rows.file"


class Assembler:
    """Puts blocks together for one model; its own rows were read and checked before."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Read the file of the two rows, where the model has one.

        Raises:
          RkvlmdError: ``invalid_model`` when it is not what the manifest says.

        """
        self._manifest = manifest
        self._width = manifest.decoder.embedding
        self._own: Rows | None = None
        if manifest.assembly is not None and manifest.assembly.rows is not None:
            self._own = _read(folder / manifest.assembly.rows.file, self._width)

    @classmethod
    def of(cls, order: child.Load) -> Self | None:
        """Return that of a model which is being loaded, or ``None`` if it needs none.

        Raises:
          RkvlmdError: see ``__init__``.

        """
        if order.manifest.get("assembly") is None:
            return None
        return cls(Path(order.folder), manifests.from_builtins(order.manifest))

    def __call__(self, fds: Iterator[int], tiles: tuple[int, int], count: int) -> Rows:
        """Return float32 of shape (count, embedding) from the next memfds, one a view.

        Raises:
          memfd.MemoryFileError: they do not make as many rows.

        """
        runs = assembly.order(self._manifest, tiles)
        if sum(run.rows for run in runs) != count:
            raise memfd.MemoryFileError(f"tiles {tiles} do not make {count} rows")
        blocks = [
            memfd.map_array(
                next(fds), child.Tensor(shape=(encoder.tokens, self._width), dtype="float32")
            )
            for encoder in assembly.encoders(self._manifest, tiles)
        ]
        made: Rows = np.empty((count, self._width), np.float32)
        at = 0
        for run in runs:
            rows = self._own if run.view == assembly.FILE else blocks[run.view]
            assert rows is not None, "checked with the manifest"
            made[at : at + run.rows] = rows[run.start : run.start + run.rows]
            at += run.rows
        return made


def _read(path: Path, width: int) -> Rows:
    """Return float32 of shape (2, width): the end of a line, the end of a picture."""
    try:
        # Mapped, so that a wrong file of any size, or one whose header promises more than it holds,
        # takes no memory.
        found = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as exc:
        raise _wrong(width) from exc
    if (
        found.shape != (2, width)
        or found.dtype not in {np.dtype(np.float16), np.dtype(np.float32)}
        or not np.isfinite(found).all()
    ):
        raise _wrong(width)
    return found.astype(np.float32)


def _wrong(width: int) -> RkvlmdError:
    return RkvlmdError(
        "invalid_model",
        f"{_KEY}: must be an .npy file of 2 x {width} finite numbers in float16 or float32: the end"
        " of a line (image_newline), then the end of a picture (view_seperator).",
    )
