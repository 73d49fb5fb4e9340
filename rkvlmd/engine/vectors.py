"""An ``embed`` order: from tokens and rows to the vector of one input."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from rkvlmd.engine import pooling
from rkvlmd.engine.backend import Rows
from rkvlmd.errors import RkvlmdError
from rkvlmd.models.manifest import Embeddings
from rkvlmd.wire import child


def described(manifest: dict[str, Any]) -> Embeddings | None:
    """Return the section ``embeddings`` of a manifest that came in a frame."""
    found = manifest.get("embeddings")
    return None if found is None else msgspec.convert(found, Embeddings)


def embed(
    backend: Any, order: child.Embed, rows: Sequence[Rows], how: Embeddings | None
) -> child.EmbedDone:
    """Return the end of the order.

    Raises:
      RkvlmdError: ``invalid_model`` when the model or its engine makes no
        vectors, and what the backend raises.

    """
    if how is None:
        raise RkvlmdError("invalid_model", "This model makes no embeddings.")
    began = time.monotonic()
    blocks: Sequence[Rows]
    tokens = len(order.tokens)
    if rows and how.pictures == "rows":
        blocks = rows
        tokens = tokens or sum(len(block) for block in rows)
    else:
        make = getattr(backend, "embed", None)
        if make is None:
            raise RkvlmdError(
                "invalid_model", "The engine of this model gives no hidden states for embeddings."
            )
        blocks = [make(order, rows)]
        tokens = tokens or len(blocks[0])
    made = pooling.vector(blocks, how, order.size)
    return child.EmbedDone(
        id=order.id,
        vector=pooling.text(made),
        size=len(made),
        tokens=tokens,
        seconds=time.monotonic() - began,
        recycle=bool(getattr(backend, "recycle", False)),
    )
