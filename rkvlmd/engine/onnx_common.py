"""What the ONNX backends share: opening sessions, thread settings, plain errors, warm-ups."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as _state

from rkvlmd.errors import RkvlmdError

#: What a run of ONNX Runtime raises: its own classes, which share no base, and RuntimeError.
RUN_ERRORS: tuple[type[Exception], ...] = (
    *(
        getattr(_state, name)
        for name in (
            "EPFail",
            "EngineError",
            "Fail",
            "InvalidArgument",
            "InvalidGraph",
            "InvalidProtobuf",
            "ModelLoaded",
            "NoModel",
            "NoSuchFile",
            "NotImplemented",
            "RuntimeException",
        )
        if hasattr(_state, name)
    ),
    RuntimeError,
)
#: What opening a file raises.
OPEN_ERRORS: tuple[type[Exception], ...] = (*RUN_ERRORS, ValueError, OSError)
#: ONNX Runtime's type names that may cross, as numpy types.
DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


def thread_count(options: dict[str, Any]) -> int:
    """Return how many threads a session may use: ``options["threads"]``, or one a core."""
    wanted = int(options.get("threads", 0))
    return wanted if wanted > 0 else max(1, len(os.sched_getaffinity(0)))


def open_session(path: Path, key: str, threads: int) -> ort.InferenceSession:
    """Open the ONNX file ``path`` that the manifest names at ``key``.

    Idle threads sleep instead of spinning: they cost nothing between requests,
    and where another process wants a core too, a spinning thread holds up the
    one it waits for. Measured on two cores beside a busy process, 135 M
    parameters at 4 bits: 134 tokens/s asleep, 72 spinning (30 steps x 8).

    Raises:
      RkvlmdError: ``invalid_model`` when the file is missing, cut short or not ONNX.

    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_mem_pattern = False  # shapes change from run to run
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not path.is_file():
        raise RkvlmdError("invalid_model", f"{key}: {path.name} is missing.")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except OPEN_ERRORS as exc:
        tell(f"{path.name}: {exc}")
        raise RkvlmdError(
            "invalid_model",
            f"{key}: {path.name} cannot be opened; it is cut short, damaged or not an ONNX file.",
        ) from exc


def tell(text: str) -> None:
    """Write a library's own words to standard error, where the owner's log is."""
    print(text, file=sys.stderr, flush=True)


def dtype_of(arg: Any, key: str) -> type[np.generic]:
    """Return the numpy type of a session's input or output.

    Raises:
      RkvlmdError: ``invalid_model`` for a type that no known layout uses.

    """
    found = DTYPES.get(arg.type)
    if found is None:
        raise RkvlmdError("invalid_model", f"{key}: {arg.name} has the type {arg.type}.")
    return found


def agree(key: str, what: str, file_says: Any, manifest_says: int) -> None:
    """Compare a static size of a file with the manifest; symbolic sizes agree with all.

    Raises:
      RkvlmdError: ``invalid_model`` that names the key and both sizes.

    """
    if isinstance(file_says, int) and file_says != manifest_says:
        raise RkvlmdError(
            "invalid_model",
            f"{key}: the manifest says {manifest_says}, but {what} of the file is {file_says}.",
        )


def unknown_inputs(key: str, names: Sequence[str]) -> RkvlmdError:
    """Return the error for inputs that no known layout has."""
    return RkvlmdError("invalid_model", f"{key}: unknown inputs {', '.join(sorted(names))}.")


def float32(value: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return ``value`` as float32 in C order, without a copy where it is that already."""
    return np.ascontiguousarray(value, dtype=np.float32)
