"""Vision encoders on ONNX Runtime: pixels to embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from rkvlmd.engine import onnx_common as common
from rkvlmd.engine.backend import Progress, Rows
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import manifest as manifests
from rkvlmd.wire import child

#: The input that says which pixels are the picture: all of them here.
MASK = "pixel_attention_mask"


class OnnxEncoder:
    """``EncoderBackend`` over a ``vision_encoder.onnx``.

    Takes ``pixel_values`` of rank 4 (picture, channels, height, width; or
    channels last) or 5 (batch, picture, channels, height, width), and
    ``pixel_attention_mask`` where the file has one.
    """

    def __init__(self) -> None:
        self._session: ort.InferenceSession | None = None
        self._entry: manifests.Encoder | None = None
        self._mask: tuple[int, ...] = ()
        self._key = ""

    def load(self, order: child.Load, progress: Progress) -> dict[str, Any]:
        """Open the file, compare its shapes with the manifest, run it once.

        Raises:
          RkvlmdError: ``invalid_model``.

        """
        manifest = manifests.from_builtins(order.manifest)
        if order.part >= len(manifest.encoders):
            raise RkvlmdError("invalid_model", f"encoders: there is no encoder {order.part}.")
        entry, self._key = manifest.encoders[order.part], f"encoders[{order.part}]"
        threads = common.thread_count(order.options)
        progress(0.0, f"opening {Path(entry.file).name}")
        session = common.open_session(Path(order.folder) / entry.file, f"{self._key}.file", threads)
        self._check(session, entry)
        self._session, self._entry = session, entry
        progress(0.7, "first run")
        shape = _chw(entry)
        try:
            rows = self._run(np.zeros(shape, np.uint8 if entry.baked else np.float32))
        except RkvlmdError as exc:
            raise RkvlmdError("invalid_model", f"{self._key}.file: its first run failed.") from exc
        self._compare(rows, entry)
        return {
            "libraries": {"onnxruntime": ort.__version__},
            "threads": threads,
            "pixels": list(_pixels(session, self._key).shape),
            "tokens": entry.tokens,
            "embedding": entry.embedding,
        }

    def encode(self, pixels: npt.NDArray[Any]) -> Rows:
        """Return the rows of one picture, float32 of shape (tokens, outputs x embedding).

        ``pixels`` has the layout of the manifest, with or without a leading
        dimension of size one. A file with several outputs gives them side by
        side in each row.

        Raises:
          RkvlmdError: ``engine_error`` when pixels or rows are not what the model promises.

        """
        entry = self._entry
        assert entry is not None, "load comes first"
        if pixels.size != 3 * entry.width * entry.height:
            raise RkvlmdError(
                "engine_error",
                f"The picture has {pixels.size} values, but the encoder takes"
                f" 3 x {entry.height} x {entry.width}.",
            )
        outputs = self._run(pixels)
        if any(not np.isfinite(rows).all() for rows in outputs):
            raise RkvlmdError("engine_error", "The vision encoder's output is not a number.")
        rows = outputs[0] if len(outputs) == 1 else np.stack(outputs, axis=1)
        return common.float32(rows.reshape(entry.tokens, -1))

    def _run(self, pixels: npt.NDArray[Any]) -> list[Rows]:
        session, entry = self._session, self._entry
        assert session is not None
        assert entry is not None
        arg = _pixels(session, self._key)
        chw = _chw(entry)
        lead = len(arg.shape) - len(chw)
        value = pixels.reshape((1,) * lead + chw)
        value = np.ascontiguousarray(value, dtype=common.dtype_of(arg, self._key))
        feeds: dict[str, npt.NDArray[Any]] = {arg.name: value}
        if self._mask:
            feeds[MASK] = np.ones(self._mask, np.bool_)
        try:
            found = session.run(None, feeds)
        except common.RUN_ERRORS as exc:
            common.tell(f"vision encoder: {exc}")
            raise RkvlmdError("engine_error", "The vision encoder failed.") from exc
        return [common.float32(rows.reshape(-1, rows.shape[-1])) for rows in found[: entry.outputs]]

    def _check(self, session: ort.InferenceSession, entry: manifests.Encoder) -> None:
        pixels = _pixels(session, self._key)
        others = {arg.name: arg for arg in session.get_inputs() if arg.name != pixels.name}
        if unknown := set(others) - {MASK}:
            raise common.unknown_inputs(f"{self._key}.file", list(unknown))
        if MASK in others:
            ones = (1,) * (len(others[MASK].shape) - 2)
            self._mask = (*ones, entry.height, entry.width)
        sizes = dict(zip(entry.layout[1:], list(pixels.shape)[-3:], strict=True))
        common.agree(f"{self._key}.layout ({entry.layout})", "the channels", sizes["c"], 3)
        common.agree(f"{self._key}.height", "the height", sizes["h"], entry.height)
        common.agree(f"{self._key}.width", "the width", sizes["w"], entry.width)
        if len(session.get_outputs()) < entry.outputs:
            common.agree(f"{self._key}.outputs", "the number of outputs",
                         len(session.get_outputs()), entry.outputs)  # fmt: skip
        for out in session.get_outputs()[: entry.outputs]:
            common.agree(f"{self._key}.embedding", "the row", out.shape[-1], entry.embedding)

    def _compare(self, outputs: list[Rows], entry: manifests.Encoder) -> None:
        for rows in outputs:
            common.agree(f"{self._key}.embedding", "the row", rows.shape[1], entry.embedding)
            common.agree(f"{self._key}.tokens", "the number of rows", rows.shape[0], entry.tokens)


def _pixels(session: ort.InferenceSession, key: str) -> Any:
    """Return the input that takes the picture: ``pixel_values``, or the first of rank 4 or 5."""
    args = session.get_inputs()
    named = [a for a in args if a.name == "pixel_values"] or args
    for arg in named:
        if len(arg.shape) in {4, 5}:
            return arg
    raise RkvlmdError("invalid_model", f"{key}.file: no input of four or five dimensions.")


def _chw(entry: manifests.Encoder) -> tuple[int, int, int]:
    if entry.layout == "nchw":
        return (3, entry.height, entry.width)
    return (entry.height, entry.width, 3)
