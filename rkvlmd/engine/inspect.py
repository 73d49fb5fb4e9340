"""Reads the inputs and outputs of an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime as ort

from rkvlmd.engine import onnx_common as common


def inspect(path: str) -> dict[str, Any]:
    """Return the inputs, outputs and metadata of the ONNX file at ``path``.

    Inputs and outputs are lists of ``{"name", "shape", "type"}`` in the file's
    order; a symbolic size is its name, an unknown one ``None``. Weights are
    read, nothing is run.

    Raises:
      RkvlmdError: ``invalid_model`` when the file cannot be opened.

    """
    session = common.open_session(Path(path), "file", 1)
    meta = session.get_modelmeta()
    return {
        "file": Path(path).name,
        "inputs": [_describe(arg) for arg in session.get_inputs()],
        "outputs": [_describe(arg) for arg in session.get_outputs()],
        "producer": meta.producer_name,
        "metadata": dict(meta.custom_metadata_map),
        "libraries": {"onnxruntime": ort.__version__},
    }


def _describe(arg: Any) -> dict[str, Any]:
    return {
        "name": arg.name,
        "shape": list(arg.shape),
        "type": arg.type.removeprefix("tensor(").removesuffix(")"),
    }
