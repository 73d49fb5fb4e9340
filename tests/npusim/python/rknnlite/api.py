"""``rknnlite.api`` of a simulated board: what rknn-toolkit-lite2 2.5.0 does (fact 5.1a)."""

from __future__ import annotations

import json
import struct
import time
import traceback
from typing import Any

import numpy as np

from rknnlite import npu
from rknnlite.rows import caches_of, number_of, rows_of

#: What ``librknnrt.so`` reads (fact 7c: "Invalid RKNN model version 6").
MODEL_VERSION = 6
_BODY = 64


class RKNNLite:
    """One context; must not be used by two threads at a time, and not after ``release``."""

    NPU_CORE_AUTO = 0
    NPU_CORE_0 = 1
    NPU_CORE_1 = 2
    NPU_CORE_2 = 4
    NPU_CORE_0_1 = 3
    NPU_CORE_0_1_2 = 7
    NPU_CORE_ALL = 0xFFFF

    def __init__(self, verbose: bool = False, verbose_file: str | None = None) -> None:
        self.rknn_data: bytes | None = None
        self._model: dict[str, Any] | None = None
        self._released = self._busy = False

    def load_rknn(self, path: str, key_path: str | None = None) -> int:
        """Read the whole file and keep it; returns 0 even for rubbish."""
        self._alive("load_rknn")
        self.rknn_data = npu.read_file(path)
        return -1 if self.rknn_data is None else 0

    def init_runtime(
        self,
        target: str | None = None,
        device_id: str | None = None,
        async_mode: bool = False,
        core_mask: int = 0,
    ) -> int:
        self._alive("init_runtime")
        if target is not None:
            npu.misuse("5.1f", "on the board the target is None")
        try:
            return self._init(core_mask)
        except Exception:  # noqa: BLE001 - so does the real one
            npu.log(traceback.format_exc())
            return -1

    def _init(self, core_mask: int) -> int:
        kind = npu.fault("load")
        if kind:
            npu.log(f"E RKNN: init failed ({kind})")
            return -1
        driver = npu.setting("NPUSIM_DRIVER", "0.9.8")
        # Fact 5.3b: 0.9.8 is required; what an older one does is not said.
        if (
            tuple(map(int, driver.split("."))) < (0, 9, 8)
            and npu.setting("NPUSIM_OLD_DRIVER", "fails") == "fails"
        ):
            npu.log("E RKNN: failed to malloc npu memory")
            return -1
        model = parse(self.rknn_data or b"")
        platform = npu.setting("NPUSIM_PLATFORM", "RK3588").lower()
        if platform not in model["target_platform"]:
            npu.log(f"E RKNN: RKNN_ERR_TARGET_PLATFORM_UNMATCH: {platform}")
            return -1
        if not self._mask_fits(platform, core_mask):
            npu.log(f"E RKNN: The core mode {core_mask} is not supported currently")
            return -1
        if not npu.work(0, float(npu.setting("NPUSIM_ENCODER_LOAD_MS", "50")), "encoder_load"):
            return -1
        self._model = model["npusim"]
        npu.trace("encoder_init", core_mask=core_mask)
        return 0

    @staticmethod
    def _mask_fits(platform: str, core_mask: int) -> bool:
        # Fact 5.1c: 5 and 6 are rejected; RK3576 takes smaller masks for those it lacks.
        if platform not in {"rk3588", "rk3576"}:
            if core_mask != 0:
                npu.log("W RKNN: core masks are only supported by RK3588 and RK3576")
            return True
        return core_mask in {0, 1, 2, 3, 4, 7, 0xFFFF}

    def inference(
        self,
        inputs: list[Any],
        data_type: Any = None,
        data_format: Any = None,
        inputs_pass_through: Any = None,
        get_frame_id: bool = False,
        reuse_outputs: bool = False,
    ) -> list[Any] | None:
        self._alive("inference")
        if self._model is None:
            npu.log("E RKNN: inference before init_runtime")
            return None
        # Fact 5.1d: that the copy of the file can go after init is an inference [I].
        if self.rknn_data is None and npu.setting("NPUSIM_RKNN_DATA", "spare") == "needed":
            npu.log("E RKNN: there is no model")
            return None
        if self._busy:
            npu.misuse("5.1e", "a context is used by two threads at the same time")
        self._busy = True
        try:
            return self._infer(inputs, data_format)
        finally:
            self._busy = False

    def _infer(self, inputs: list[Any], data_format: Any) -> list[Any] | None:
        model = self._model
        assert model is not None
        if len(inputs) != 1 or not isinstance(inputs[0], np.ndarray):
            npu.misuse("5.1b", "inputs must be a list of one array")
        pixels = inputs[0]
        # Fact 3.1a: mean and deviation are in the file, so floats would be wrong pixels.
        if pixels.dtype != np.uint8 or not pixels.flags["C_CONTIGUOUS"]:
            npu.misuse("3.1a", f"pixels are {pixels.dtype}, or not contiguous")
        if data_format not in ("nhwc", ["nhwc"]):
            npu.misuse("5.1b", f"data_format is {data_format!r}")
        if pixels.shape != (1, model["height"], model["width"], 3):
            npu.log(f"E RKNN: the input shape {pixels.shape} is wrong")
            return None
        kind = npu.fault("encode")
        since = time.monotonic_ns()
        tokens, embed, outputs = model["tokens"], model["embed"], model["outputs"]
        number = number_of(pixels)
        if model.get("cross"):
            found = list(caches_of(number, tokens, *model["cross"]))
        else:
            rows = rows_of(number, tokens, embed, outputs).reshape(tokens, outputs, embed)
            found = [np.ascontiguousarray(rows[:, i]) for i in range(outputs)]
        spent = time.monotonic_ns() - since
        if kind == "none" or not npu.work(
            0, float(npu.setting("NPUSIM_ENCODE_MS", "208")), "encode", spent
        ):
            return None
        npu.trace("encode", picture=number, pixels=pixels.nbytes)
        if kind == "nan":
            found[-1].flat[0] = np.nan
        if kind == "shape":
            found[0] = found[0][:-1]
        if kind == "outputs":
            found = found[:-1]
        # Fact 3.1b: both shapes are seen.
        return [values[None] for values in found] if model["batched"] else found

    def get_sdk_version(self) -> str | None:
        # Fact 5.1g: seen in the emulated board, with rknn-toolkit-lite2 itself.
        line = "=" * 46
        return f"{line}\nRKNN VERSION:\n  API: 2.3.2 (npusim)\n  DRV: 0.9.8\n{line}"

    def list_support_target_platform(self, rknn_model: str | None = None) -> dict[str, Any]:
        data = npu.read_file(rknn_model) if rknn_model else None
        names = parse(data)["target_platform"] if data else ["rk3588", "rk3576", "rk3562"]
        return {"support_target_platform": names, "filled_target_platform": names}

    def list_devices(self) -> tuple[list[str], list[str]]:
        return [], []

    def release(self) -> None:
        self._released = True
        npu.trace("encoder_release")

    def _alive(self, what: str) -> None:
        if self._released:
            npu.misuse("5.1e", f"{what} after release")


def parse(data: bytes) -> dict[str, Any]:
    """Return the JSON at the end of a file, which also holds what the stand-in must know."""
    if data[:8] != b"RKNN\0\0\0\0":
        raise ValueError("no RKNN file")
    version, body = struct.unpack_from("<QQ", data, 8)
    if version > int(npu.setting("NPUSIM_RKNN_MODEL_VERSION", str(MODEL_VERSION))):
        raise ValueError(f"Invalid RKNN model version {version}")
    (length,) = struct.unpack_from("<Q", data, _BODY + body)
    if len(data) < _BODY + body + 8 + length:
        raise ValueError("the file is cut short")
    tree: dict[str, Any] = json.loads(data[_BODY + body + 8 :][:length])
    return tree
