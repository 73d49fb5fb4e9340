"""Hidden states of the last layer: what one run gives for ``/v1/embeddings``."""

from __future__ import annotations

from typing import Any

import numpy as np

from rkvlmd.engine.backend import Rows
from rkvlmd.engine.rkllm_session import Session, infer_param
from rkvlmd.engine.rkllm_types import Mode, State
from rkvlmd.errors import RkvlmdError

#: What the callback answers to have the library give its buffer back, from 1.3.0 on.
RELEASE = 2


class Hidden:
    """A sink for ``Session.run``: copies the payload, which ends with the callback.

    The first event may have no payload, and FINISH may never come.
    """

    def __init__(self, answer: int) -> None:
        self._answer = answer
        #: float32 of shape (tokens, embedding), ``None`` until it has come.
        self.rows: Rows | None = None
        self.events = 0
        self.failed = False

    def __call__(self, state: State, result: Any) -> int:
        """Take one event."""
        self.events += 1
        if state is State.ERROR:
            self.failed = True
        if state is not State.NORMAL or result is None:
            return 0
        layer = result.last_hidden_layer
        if not layer.hidden_states or layer.num_tokens < 1 or layer.embd_size < 1:
            return 0
        shape = (layer.num_tokens, layer.embd_size)
        self.rows = np.ctypeslib.as_array(layer.hidden_states, shape).copy()
        return self._answer


def states(session: Session, value: Any, *, embedding: int, lora: str = "") -> Rows:
    """Run an input once for its hidden states, float32 of shape (tokens or fewer, embedding).

    Raises:
      RkvlmdError: ``context_length_exceeded`` where the library refuses the
        input without a word, else ``engine_error``.

    """
    # Before 1.3.0 no answer gives the buffer back: these versions keep it.
    sink = Hidden(RELEASE if session.library.layout.per_run else 0)
    infer = infer_param(
        session.library, Mode.LAST_HIDDEN_LAYER, lora=lora.encode() if lora else None
    )
    rc = session.run(value, infer, sink)
    if rc != 0 and sink.events == 0:
        raise RkvlmdError(
            "context_length_exceeded", "The input does not fit the model's context.", param="input"
        )
    rows = sink.rows
    if rc != 0 or sink.failed or rows is None:
        raise RkvlmdError("engine_error", "The RKLLM runtime failed on this request.")
    if rows.shape[1] != embedding or not np.isfinite(rows).all():
        raise RkvlmdError(
            "engine_error",
            f"The RKLLM runtime gave hidden states of {rows.shape[1]} values that are no {embedding}"
            " numbers.",
        )
    return rows
