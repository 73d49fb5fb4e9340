"""Vision encoders on ONNX Runtime: pixels to embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from rkvlmd.engine import onnx_common as common
from rkvlmd.engine.backend import Grid, Progress, Rows
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import manifest as manifests
from rkvlmd.wire import child

#: The input that says which pixels are the picture: all of them here.
MASK = "pixel_attention_mask"
#: Names of the input that takes the grid of flattened patches, int64 of shape (1, 3).
GRIDS = ("image_grid_thw", "grid_thw")
#: The output of CLIP's vision tower that is compared; its hidden states may stand before it.
VECTOR = "image_embeds"


class OnnxEncoder:
    """``EncoderBackend`` over a ``vision_encoder.onnx``, and a file of its projector.

    Takes ``pixel_values`` of rank 4 (picture, channels, height, width; or
    channels last) or 5 (batch, picture, channels, height, width), and
    ``pixel_attention_mask`` where the file has one; or flattened patches
    (patches, values) and their grid.
    """

    def __init__(self) -> None:
        self._session: ort.InferenceSession
        self._projector: ort.InferenceSession | None = None
        self._entry: manifests.Encoder | None = None
        self._masked = False
        self._grid = ""
        #: Names of the outputs that are asked for; ``None`` for all.
        self._wanted: list[str] | None = None
        self._key = ""

    def load(self, order: child.Load, progress: Progress) -> dict[str, Any]:
        """Open the files, compare their shapes with the manifest, run them once.

        Raises:
          RkvlmdError: ``invalid_model``.

        """
        manifest = manifests.from_builtins(order.manifest)
        if order.part >= len(manifest.encoders):
            raise RkvlmdError("invalid_model", f"encoders: there is no encoder {order.part}.")
        entry, self._key = manifest.encoders[order.part], f"encoders[{order.part}]"
        threads = common.thread_count(order.options)
        folder = Path(order.folder)
        progress(0.0, f"opening {Path(entry.file).name}")
        self._session = common.open_session(folder / entry.file, f"{self._key}.file", threads)
        if entry.projector is not None:
            progress(0.6, f"opening {Path(entry.projector.file).name}")
            key = f"{self._key}.projector.file"
            self._projector = common.open_session(folder / entry.projector.file, key, threads)
        self._check(entry)
        self._entry = entry
        progress(0.7, "first run")
        self._first_run(entry)
        return {
            "libraries": {"onnxruntime": ort.__version__},
            "threads": threads,
            "pixels": list(_pixels(self._session, self._key, entry).shape),
            "tokens": entry.tokens,
            "embedding": entry.embedding,
        }

    def encode(self, pixels: npt.NDArray[Any], grid: Grid | None = None) -> Rows:
        """Return the rows of one picture, float32 of shape (tokens, outputs x embedding).

        ``pixels`` has the layout of the manifest, with or without a leading
        dimension of size one; or (patches, values), with their ``grid``. A file
        with several outputs gives them side by side in each row.

        Raises:
          RkvlmdError: ``engine_error`` when pixels or rows are not what the model promises.

        """
        entry = self._entry
        assert entry is not None, "load comes first"
        if entry.patches is not None:
            tokens = _tokens(entry.patches, pixels.shape, grid)
        elif pixels.size == 3 * entry.width * entry.height:
            tokens = entry.tokens
        else:
            raise RkvlmdError(
                "engine_error",
                f"The picture has {pixels.size} values, but the encoder takes"
                f" 3 x {entry.height} x {entry.width}.",
            )
        outputs = self._run(entry, pixels, grid)
        if any(not np.isfinite(rows).all() for rows in outputs):
            raise RkvlmdError("engine_error", "The vision encoder's output is not a number.")
        if any(len(rows) != tokens for rows in outputs):
            raise RkvlmdError("engine_error", "The vision encoder gave another number of rows.")
        rows = outputs[0] if len(outputs) == 1 else np.stack(outputs, axis=1)
        return common.float32(rows.reshape(tokens, -1))

    def _first_run(self, entry: manifests.Encoder) -> None:
        kind = np.uint8 if entry.baked else np.float32
        grid, tokens = None, entry.tokens
        if entry.patches is not None:
            merge = entry.patches.merge
            grid, tokens = (1, merge, merge), 1
            shape: tuple[int, ...] = (merge * merge, _values(entry.patches))
        else:
            shape = _chw(entry)
        try:
            outputs = self._run(entry, np.zeros(shape, kind), grid)
        except RkvlmdError as exc:
            raise RkvlmdError("invalid_model", f"{self._key}.file: its first run failed.") from exc
        for rows in outputs:
            common.agree(f"{self._key}.embedding", "the row", rows.shape[1], entry.embedding)
            common.agree(f"{self._key}.tokens", "the number of rows", len(rows), tokens)

    def _run(
        self, entry: manifests.Encoder, pixels: npt.NDArray[Any], grid: Grid | None
    ) -> list[Rows]:
        arg = _pixels(self._session, self._key, entry)
        if entry.patches is None:
            chw = _chw(entry)
            pixels = pixels.reshape((1,) * (len(arg.shape) - len(chw)) + chw)
        feeds: dict[str, npt.NDArray[Any]] = {
            arg.name: np.ascontiguousarray(pixels, dtype=common.dtype_of(arg, self._key))
        }
        if self._masked:
            ones = (1,) * (len(arg.shape) - 3)
            feeds[MASK] = np.ones((*ones, entry.height, entry.width), np.bool_)
        if self._grid:
            feeds[self._grid] = np.array([grid], np.int64)
        try:
            found = self._session.run(self._wanted, feeds)
            if self._projector is not None:
                found = self._project(self._projector, found[0])
        except common.RUN_ERRORS as exc:
            common.tell(f"vision encoder: {exc}")
            raise RkvlmdError("engine_error", "The vision encoder failed.") from exc
        return [common.float32(rows.reshape(-1, rows.shape[-1])) for rows in found[: entry.outputs]]

    def _project(
        self, projector: ort.InferenceSession, rows: npt.NDArray[Any]
    ) -> list[npt.NDArray[Any]]:
        arg = projector.get_inputs()[0]
        lead = (1,) * (len(arg.shape) - 2)
        value = rows.reshape(*lead, -1, rows.shape[-1])
        kind = common.dtype_of(arg, f"{self._key}.projector")
        found: list[npt.NDArray[Any]] = projector.run(None, {arg.name: value.astype(kind)})
        return found

    def _check(self, entry: manifests.Encoder) -> None:
        pixels = _pixels(self._session, self._key, entry)
        others = {arg.name: arg for arg in self._session.get_inputs() if arg.name != pixels.name}
        self._masked = MASK in others
        self._grid = next((name for name in GRIDS if name in others), "")
        if unknown := set(others) - {MASK, self._grid}:
            raise common.unknown_inputs(f"{self._key}.file", list(unknown))
        if entry.patches is None:
            sizes = dict(zip(entry.layout[1:], list(pixels.shape)[-3:], strict=True))
            common.agree(f"{self._key}.layout ({entry.layout})", "the channels", sizes["c"], 3)
            common.agree(f"{self._key}.height", "the height", sizes["h"], entry.height)
            common.agree(f"{self._key}.width", "the width", sizes["w"], entry.width)
        else:
            common.agree(f"{self._key}.patches", "the number of values of a patch",
                         pixels.shape[1], _values(entry.patches))  # fmt: skip
        last = self._projector or self._session
        if len(last.get_outputs()) < entry.outputs:
            common.agree(f"{self._key}.outputs", "the number of outputs",
                         len(last.get_outputs()), entry.outputs)  # fmt: skip
        given = last.get_outputs()
        if self._projector is None and (named := [a for a in given if a.name == VECTOR]):
            given, self._wanted = named, [VECTOR]
        for out in given[: entry.outputs]:
            common.agree(f"{self._key}.embedding", "the row", out.shape[-1], entry.embedding)


def _pixels(session: ort.InferenceSession, key: str, entry: manifests.Encoder) -> Any:
    """Return the input that takes the picture: ``pixel_values``, or the first that can."""
    args = session.get_inputs()
    named = [a for a in args if a.name == "pixel_values"] or args
    ranks = {4, 5} if entry.patches is None else {2}
    for arg in named:
        if len(arg.shape) in ranks and arg.name not in GRIDS:
            return arg
    wanted = "two dimensions" if entry.patches else "four or five dimensions"
    raise RkvlmdError("invalid_model", f"{key}.file: no input of {wanted}.")


def _tokens(patches: manifests.Patches, shape: tuple[int, ...], grid: Grid | None) -> int:
    """Return how many rows flattened patches become."""
    count = 0 if grid is None else grid[0] * grid[1] * grid[2]
    if grid is None or shape != (count, _values(patches)):
        raise RkvlmdError("engine_error", "The picture's patches and its grid do not agree.")
    if grid[1] % patches.merge or grid[2] % patches.merge or count == 0:
        raise RkvlmdError("engine_error", "The picture's grid cannot be merged.")
    return int(count // patches.merge**2)


def _values(patches: manifests.Patches) -> int:
    return 3 * patches.temporal * patches.size**2


def _chw(entry: manifests.Encoder) -> tuple[int, int, int]:
    if entry.layout == "nchw":
        return (3, entry.height, entry.width)
    return (entry.height, entry.width, 3)
