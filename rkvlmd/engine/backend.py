"""What a library must be able to do to sit in a child.

A backend is built, loaded once and used by one worker thread. ``abort`` alone
is called from the main thread while the worker runs. A backend raises
``RkvlmdError`` for what a client or an owner can understand; anything else is
a bug, and ends the child.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rkvlmd.wire import child

Rows = npt.NDArray[np.float32]
#: Frames, rows and columns of patches.
Grid = tuple[int, int, int]
Progress = Callable[[float, str], None]
Say = Callable[[child.FromChild], None]


class EncoderBackend(Protocol):
    """Pixels to embeddings."""

    def load(self, order: child.Load, progress: Progress) -> dict[str, Any]:
        """Open the model; return what ``ready`` tells (library versions, shapes)."""
        ...

    def encode(self, pixels: npt.NDArray[Any], grid: Grid | None = None) -> Rows:
        """Return float32 rows of shape (image tokens, outputs x embedding size), C order.

        ``grid`` comes with flattened patches (``Encoder.patches``).
        """
        ...


class DecoderBackend(Protocol):
    """Tokens and embeddings to text."""

    def load(self, order: child.Load, progress: Progress) -> dict[str, Any]:
        """Open the model; return what ``ready`` tells (library versions, shapes)."""
        ...

    def generate(self, order: child.Generate, rows: Sequence[Rows], say: Say) -> child.GenerateDone:
        """Say ``prefilled`` once, ``text`` per token; return the end. ``rows`` one per span."""
        ...

    def abort(self) -> None:
        """Make a running ``generate`` return soon with reason ``aborted``; thread-safe."""
        ...
