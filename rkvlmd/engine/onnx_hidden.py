"""Hidden states of an ONNX decoder: which output holds them, and a cache for one prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnxruntime as ort

from rkvlmd.engine import onnx_cache as caches
from rkvlmd.errors import RkvlmdError
from rkvlmd.models.manifest import Manifest
from rkvlmd.wire import child


def output(manifest: Manifest, sessions: Sequence[ort.InferenceSession]) -> str:
    """Return the name of the output with hidden states; empty where the model needs none.

    Raises:
      RkvlmdError: ``invalid_model`` when a file lacks what the manifest promises.

    """
    how = manifest.embeddings
    if how is None or not ("text" in how.inputs or how.pictures == "hidden"):
        return ""
    for session in sessions:
        if how.output not in {arg.name for arg in session.get_outputs()}:
            raise RkvlmdError(
                "invalid_model",
                f"embeddings.output: {caches.KEY} has no output {how.output}; export the model"
                " with its hidden states.",
            )
    return how.output


def graph(
    open_cache: Callable[[int], caches.CachedGraph], order: child.Embed, name: str
) -> caches.CachedGraph:
    """Return a graph with an empty cache for the order's tokens, whose steps give output ``name``.

    Raises:
      RkvlmdError: ``invalid_model`` where there is no such output.

    """
    if not name:
        raise RkvlmdError("invalid_model", "This model gives no hidden states.")
    made = open_cache(len(order.tokens))
    made.fetch = name
    return made
