"""What a library must be able to do to sit in a child.

A backend is built, loaded once and used by one worker thread. ``abort`` alone
is called from the main thread while the worker runs. A backend raises
``RkvlmdError`` for what a client or an owner can understand; anything else is
a bug, and ends the child.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

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


@runtime_checkable
class InPlaceEncoder(EncoderBackend, Protocol):
    """An encoder that can put its rows where they are wanted."""

    @property
    def rows_shape(self) -> tuple[int, int] | None:
        """The shape of every picture's rows, where that is known since the load."""
        ...

    def encode_into(
        self, pixels: npt.NDArray[Any], grid: Grid | None, rows: Callable[[], Rows]
    ) -> object:
        """Fill all of ``rows()``, an array of ``rows_shape``; ask for it as late as possible.

        What is returned is kept until the rows are on their way: freeing
        megabytes takes time.
        """
        ...


class DecoderBackend(Protocol):
    """Tokens and embeddings to text.

    One with a true ``in_callback`` says what it says while its library waits.
    """

    def load(self, order: child.Load, progress: Progress) -> dict[str, Any]:
        """Open the model; return what ``ready`` tells (library versions, shapes)."""
        ...

    def generate(self, order: child.Generate, rows: Sequence[Rows], say: Say) -> child.GenerateDone:
        """Say ``prefilled`` once, ``text`` per token; return the end. ``rows`` one per span."""
        ...

    def abort(self) -> None:
        """Make a running ``generate`` return soon with reason ``aborted``; thread-safe."""
        ...
