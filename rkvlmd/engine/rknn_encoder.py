"""Vision encoders on the NPU, through rknn-toolkit-lite2: pixels to embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rknnlite.api import RKNNLite

from rkvlmd.board import driver, rknn
from rkvlmd.board import soc as socs
from rkvlmd.board.root import Root
from rkvlmd.engine import rkllm_cross
from rkvlmd.engine.backend import Grid, Progress, Rows
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import manifest as manifests
from rkvlmd.wire import child

#: Tokens that are copied and checked at a time.
_TOKENS = 32
#: The core mask that takes all cores, by their number; with one core the library chooses.
ALL_CORES = {1: 0b000, 2: 0b011, 3: 0b111}


class RknnEncoder:
    """``EncoderBackend`` over an ``.rknn`` file, which has its mean and deviation inside.

    A call of the library that fails prints why and returns a code or
    ``None``; it raises nothing.
    """

    def __init__(self) -> None:
        self._lite: Any = None
        self._entry: manifests.Encoder
        self._key = ""
        self._beside: manifests.CrossAttention | None = None

    def load(self, order: child.Load, progress: Progress) -> dict[str, Any]:
        """Open the file on the NPU, run it once, compare its shapes with the manifest.

        Raises:
          RkvlmdError: ``invalid_model`` for the file, ``model_failed`` where
            the library does not start.

        """
        manifest = manifests.from_builtins(order.manifest)
        if order.part >= len(manifest.encoders):
            raise RkvlmdError("invalid_model", f"encoders: there is no encoder {order.part}.")
        self._entry, self._key = manifest.encoders[order.part], f"encoders[{order.part}]"
        self._beside = manifest.decoder.cross_attention
        path = Path(order.folder) / self._entry.file
        soc = socs.read(Root(), order.options.get("soc", "")).soc
        progress(0.0, f"reading {path.name}")
        trailer = self._check_file(path, soc)
        lite = RKNNLite()
        self._check_platforms(lite, path, soc)
        if lite.load_rknn(str(path)) != 0:
            raise self._invalid(f"{path.name} cannot be read.")
        progress(0.4, f"loading {path.name}")
        mask = self._core_mask(soc)
        if lite.init_runtime(core_mask=mask) != 0:
            lite.release()
            if old := driver.too_old(driver.read(Root()).version):
                raise RkvlmdError("model_failed", old)
            raise self._invalid(
                f"the NPU does not take {path.name}; the library's log says why"
                " (rkvlmctl doctor shows what is missing)."
            )
        self._lite = lite
        progress(0.7, "first run")
        entry = self._entry
        self._compare(self._first_run(np.zeros((1, entry.height, entry.width, 3), np.uint8)))
        return {
            "libraries": {"librknnrt": _version(lite)},
            "toolkit": trailer.toolkit,
            "core_mask": mask,
            "file_released": lite.rknn_data is None,
            "tokens": entry.tokens,
            "embedding": entry.embedding,
            "outputs": entry.outputs,
        }

    def encode(self, pixels: npt.NDArray[Any], grid: Grid | None = None) -> Rows:
        """Return the rows of one picture, float32 of shape (tokens, outputs x embedding).

        ``pixels`` are uint8, channels last, with or without a leading
        dimension of size one. Row i holds the outputs of token i, one after
        the other.

        Raises:
          RkvlmdError: ``engine_error`` when pixels or outputs are not what the model promises.

        """
        made: list[Rows] = []

        def rows() -> Rows:
            made.append(np.empty(self.rows_shape, np.float32))
            return made[0]

        self.encode_into(pixels, grid, rows)
        return made[0]

    @property
    def rows_shape(self) -> tuple[int, int]:
        """The shape of every picture's rows."""
        entry, beside = self._entry, self._beside
        if beside is not None:
            return entry.tokens, rkllm_cross.width(beside)
        return entry.tokens, entry.outputs * entry.embedding

    def encode_into(
        self, pixels: npt.NDArray[Any], grid: Grid | None, rows: Callable[[], Rows]
    ) -> object:
        """Write the rows of one picture into ``rows()``, of ``rows_shape``; see ``encode``."""
        entry = self._entry
        if pixels.size != 3 * entry.width * entry.height or pixels.dtype != np.uint8:
            raise RkvlmdError(
                "engine_error",
                f"The picture has {pixels.size} values of type {pixels.dtype.name}, but the"
                f" encoder takes {entry.height} x {entry.width} x 3 of type uint8.",
            )
        found = self._run(pixels.reshape(1, entry.height, entry.width, 3))
        if self._beside is not None:
            whole = rows()
            rkllm_cross.rows_of(found, self._beside, entry.tokens, whole)
            for at in range(0, entry.tokens, _TOKENS):
                _check_finite(whole[at : at + _TOKENS])
            return found
        outputs = [_rows(values) for values in found]
        wanted = (entry.tokens, entry.embedding)
        for output in outputs:
            if output.shape != wanted:
                raise RkvlmdError(
                    "engine_error",
                    f"The vision encoder gave {' x '.join(map(str, output.shape))} values instead"
                    f" of {entry.tokens} x {entry.embedding}.",
                )
        place = rows().reshape(entry.tokens, len(outputs), entry.embedding)
        # A few tokens at a time, which are checked while the processor has them at hand.
        for at in range(0, entry.tokens, _TOKENS):
            for i, output in enumerate(outputs):
                part = output[at : at + _TOKENS]
                place[at : at + _TOKENS, i] = part
                _check_finite(part)
        return found, outputs

    def _first_run(self, pixels: npt.NDArray[np.uint8]) -> list[Any]:
        """Run without the library's own copy of the whole file, which it needs no more after init.

        That is what its source looks like; where it fails, the copy stays.
        """
        kept, self._lite.rknn_data = self._lite.rknn_data, None
        try:
            return self._run(pixels)
        except RkvlmdError:
            self._lite.rknn_data = kept
            return self._run(pixels)

    def _run(self, pixels: npt.NDArray[np.uint8]) -> list[Any]:
        """Return the first ``outputs`` outputs as the library gives them."""
        found = self._lite.inference(inputs=[np.ascontiguousarray(pixels)], data_format=["nhwc"])
        if found is None:
            raise RkvlmdError("engine_error", "The vision encoder failed.")
        if len(found) < self._entry.outputs:
            raise RkvlmdError(
                "engine_error",
                f"The vision encoder gave {len(found)} outputs instead of {self._entry.outputs}.",
            )
        return list(found[: self._entry.outputs])

    # --- what is checked at a load ----------------------------------------------------

    def _check_file(self, path: Path, soc: socs.Soc | None) -> rknn.Trailer:
        """Read the end of the file, where it says for which SoC it is; unknown forms pass."""
        if not path.is_file():
            raise self._invalid(f"{path.name} is missing.")
        trailer = rknn.read(path)
        if trailer.state == "other":
            raise self._invalid(f"{path.name} is no .rknn file.")
        if trailer.state == "short":
            raise self._invalid(f"{path.name} is cut short.")
        self._fits(path, trailer.platforms, soc)
        outputs = trailer.outputs
        if outputs is not None and outputs < self._entry.outputs:
            raise RkvlmdError(
                "invalid_model",
                f"{self._key}.outputs: the manifest says {self._entry.outputs}, but the file has"
                f" {outputs}.",
            )
        return trailer

    def _check_platforms(self, lite: Any, path: Path, soc: socs.Soc | None) -> None:
        """Ask the library for which SoCs the file is; works without an NPU."""
        try:
            said = lite.list_support_target_platform(rknn_model=str(path))
        except Exception as exc:  # noqa: BLE001 - advice alone: the load itself decides
            print(f"list_support_target_platform: {exc!r}", flush=True)
            return
        names = said.get("support_target_platform") if isinstance(said, dict) else None
        if isinstance(names, list | tuple):
            self._fits(path, tuple(str(name).lower() for name in names), soc)

    def _fits(self, path: Path, platforms: tuple[str, ...], soc: socs.Soc | None) -> None:
        if soc is not None and platforms and soc.platform not in platforms:
            raise self._invalid(
                f"{path.name} is converted for {', '.join(platforms)}, but this is {soc.name};"
                " npu.soc can name another."
            )

    def _core_mask(self, soc: socs.Soc | None) -> int:
        if self._entry.core_mask is not None:
            return self._entry.core_mask
        return ALL_CORES.get(soc.cores, 0) if soc is not None else 0

    def _compare(self, outputs: list[Any]) -> None:
        entry = self._entry
        if self._beside is not None:
            try:
                rkllm_cross.rows_of(outputs, self._beside, entry.tokens)
            except RkvlmdError as exc:
                raise self._invalid(exc.message) from exc
            return
        for rows in map(_rows, outputs):
            for key, file_says, manifest_says in (
                ("tokens", rows.shape[0], entry.tokens),
                ("embedding", rows.shape[1], entry.embedding),
            ):
                if file_says != manifest_says:
                    raise RkvlmdError(
                        "invalid_model",
                        f"{self._key}.{key}: the manifest says {manifest_says}, but the file gives"
                        f" {file_says}.",
                    )

    def _invalid(self, text: str) -> RkvlmdError:
        return RkvlmdError("invalid_model", f"{self._key}.file: {text}")


def _rows(values: Any) -> Rows:
    """Return an output as (tokens, embedding): [196, 2048] and [1, 64, 3584] are both seen."""
    array = np.asarray(values, dtype=np.float32)
    shape = [n for n in array.shape if n > 1]
    columns = array.shape[-1] if array.ndim else 1
    return array.reshape(-1, columns if columns > 1 else (shape[-1] if shape else 1))


def _check_finite(rows: Rows) -> None:
    """Check that every value is a number.

    The sum of the squares is none if one of them is not, and takes a quarter of the time; large
    numbers may be too much for it.
    """
    flat = rows.reshape(-1)
    if not np.isfinite(np.dot(flat, flat)) and not np.isfinite(flat).all():
        raise RkvlmdError("engine_error", "The vision encoder's output is not a number.")


def _version(lite: Any) -> str:
    """Return what the library says of itself, on one line."""
    try:
        said = lite.get_sdk_version()
    except Exception:  # noqa: BLE001 - shown to the owner, needed by nobody
        said = None
    # It frames what it says with lines of equals signs.
    return " ".join(word for word in str(said).split() if word.strip("=")) if said else ""
