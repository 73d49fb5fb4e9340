"""Text towers on ONNX Runtime (CLIP and its kin): token ids to a vector, for embeddings alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from rkvlmd.engine import onnx_common as common
from rkvlmd.engine.backend import Progress, Rows, Say
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import manifest as manifests
from rkvlmd.wire import child

KEY = "decoder.files.text"
IDS, MASK = "input_ids", "attention_mask"
#: The output with the projected vector, as published exports name it; else the first.
OUTPUT = "text_embeds"


class OnnxTower:
    """``DecoderBackend`` that generates nothing: ``embed`` gives the tower's output.

    The file takes ``input_ids`` of shape (batch, places), and
    ``attention_mask`` where it has one. Where the number of places is fixed,
    shorter texts are filled up with their last token, the end of text, which
    is where such towers look.
    """

    def __init__(self) -> None:
        self._session: ort.InferenceSession
        self._context = 0
        self._size = 0
        self._output = ""

    def load(self, order: child.Load, progress: Progress) -> dict[str, Any]:
        """Open the file, compare it with the manifest, run it once.

        Raises:
          RkvlmdError: ``invalid_model``.

        """
        manifest = manifests.from_builtins(order.manifest)
        name = manifest.decoder.files["text"].file
        threads = common.thread_count(order.options)
        progress(0.0, f"opening {Path(name).name}")
        session = common.open_session(Path(order.folder) / name, f"{KEY}.file", threads)
        inputs = {arg.name: arg for arg in session.get_inputs()}
        if unknown := set(inputs) - {IDS, MASK}:
            raise common.unknown_inputs(KEY, list(unknown))
        if IDS not in inputs:
            raise RkvlmdError("invalid_model", f"{KEY}: the file has no {IDS}.")
        common.agree("decoder.context", IDS, inputs[IDS].shape[-1], manifest.decoder.context)
        outputs = [arg.name for arg in session.get_outputs()]
        self._output = OUTPUT if OUTPUT in outputs else outputs[0]
        self._session, self._context = session, manifest.decoder.context
        self._size = manifest.decoder.embedding
        progress(0.7, "first run")
        try:
            rows = self._run([0])
        except RkvlmdError as exc:
            raise RkvlmdError("invalid_model", f"{KEY}: its first run failed.") from exc
        common.agree("decoder.embedding", self._output, rows.shape[-1], self._size)
        return {
            "libraries": {"onnxruntime": ort.__version__},
            "threads": threads,
            "context": self._context,
            "embedding": self._size,
        }

    def embed(self, order: child.Embed, rows: Sequence[Rows]) -> Rows:
        """Return the tower's output for a text, float32 of shape (1 or places, embedding).

        Raises:
          RkvlmdError: ``context_length_exceeded``, ``engine_error``;
            ``invalid_request`` when there are pictures in the text.

        """
        if rows:
            raise RkvlmdError(
                "invalid_request", "This model takes a text or a picture, not both in one input."
            )
        if not 0 < len(order.tokens) <= self._context:
            raise RkvlmdError(
                "context_length_exceeded",
                f"This model takes texts of 1 to {self._context} tokens, but the input has"
                f" {len(order.tokens)}.",
                param="input",
            )
        return self._run(order.tokens)

    def generate(self, order: child.Generate, rows: Sequence[Rows], say: Say) -> child.GenerateDone:
        """Refuse: there is nothing here that could write a text."""
        raise RkvlmdError("invalid_request", "This model makes embeddings; it writes no text.")

    def abort(self) -> None:
        """Nothing: a run is short and ends by itself."""

    def _run(self, tokens: Sequence[int]) -> Rows:
        feeds: dict[str, npt.NDArray[Any]] = {}
        for arg in self._session.get_inputs():
            places = arg.shape[-1] if isinstance(arg.shape[-1], int) else len(tokens)
            if arg.name == IDS:
                values = [*tokens, *[tokens[-1]] * (places - len(tokens))]
            else:
                values = [int(i < len(tokens)) for i in range(places)]
            feeds[arg.name] = np.array([values], common.dtype_of(arg, KEY))
        try:
            found = self._session.run([self._output], feeds)[0]
        except common.RUN_ERRORS as exc:
            common.tell(f"text tower: {exc}")
            raise RkvlmdError("engine_error", "The text tower failed.") from exc
        return common.float32(found.reshape(-1, found.shape[-1]))[: len(tokens)]
