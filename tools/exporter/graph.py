"""Builds an ONNX graph node by node, with weights in the wanted precision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from . import quantize

Precision = Literal["none", "half", "int8", "int4"]
#: Opsets: 17 has LayerNormalization and is known to rknn-toolkit2.
OPSET = 17
IR_VERSION = 8
CONTRIB = "com.microsoft"
#: Weights with fewer values than this stay float32: they cost nothing.
LEAST_QUANTIZED = 4096
#: Weights of more bytes than this lie in a file of their own: a protobuf ends at 2 GiB.
MOST_INSIDE = 1 << 30
#: Tensors of fewer bytes stay in the graph: shapes are worked out from them.
LEAST_OUTSIDE = 1024


class Graph:
    """An ONNX graph under construction; every method returns the name of what it adds.

    ``precision``: ``none`` keeps float32, ``half`` stores matrices as float16
    and computes in float32, ``int8`` and ``int4`` compute with 8-bit inputs.
    """

    def __init__(self, name: str, precision: Precision = "none") -> None:
        self._name = name
        self._precision = precision
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._weights: dict[str, npt.NDArray[Any]] = {}
        self._count = 0

    def input(self, name: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> str:
        """Add an input of the graph."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> str:
        """Declare ``name`` an output of the graph."""
        self._outputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def add(self, op: str, *inputs: str, out: str = "", domain: str = "", **attrs: Any) -> str:
        """Add a node with one output."""
        return self.add_many(op, *inputs, outs=[out or self._fresh(op)], domain=domain, **attrs)[0]

    def add_many(
        self, op: str, *inputs: str, outs: Sequence[str], domain: str = "", **attrs: Any
    ) -> list[str]:
        """Add a node with the outputs ``outs``."""
        name = f"{op}_{len(self._nodes)}"
        self._nodes.append(
            helper.make_node(op, list(inputs), list(outs), name, domain=domain, **attrs)
        )
        return list(outs)

    def weight(self, name: str, values: npt.NDArray[Any]) -> str:
        """Add a constant tensor as it is; one name holds one tensor."""
        if name not in self._weights:
            self._weights[name] = np.array(values, order="C")  # keeps scalars scalar
        return name

    def ints(self, *values: int) -> str:
        """Add a constant int64 vector."""
        return self.weight("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def scalar(self, value: float) -> str:
        """Add a constant float32 number."""
        return self.weight(f"float_{value!r}", np.array(value, np.float32))

    def linear(
        self,
        x: str,
        name: str,
        weight: npt.NDArray[np.float32],
        bias: npt.NDArray[np.float32] | None = None,
        *,
        out: str = "",
    ) -> str:
        """Add ``x @ weight.T + bias``; ``weight`` is (outputs, inputs), as in a checkpoint."""
        first = "" if bias is not None else out
        y = self._matmul(x, name, weight, first)
        if bias is None:
            return y
        return self.add("Add", y, self.weight(f"{name}.bias", bias), out=out)

    def _matmul(self, x: str, name: str, weight: npt.NDArray[np.float32], out: str) -> str:
        precision = self._precision if weight.size >= LEAST_QUANTIZED else "none"
        if precision == "int4" and weight.shape[1] % quantize.BLOCK == 0:
            packed, scales = quantize.blocks(weight)
            return self.add(
                "MatMulNBits", x, self.weight(f"{name}.packed", packed),
                self.weight(f"{name}.scales", scales), out=out, domain=CONTRIB,
                K=weight.shape[1], N=weight.shape[0], bits=4, block_size=quantize.BLOCK,
                accuracy_level=4,
            )  # fmt: skip
        if precision in {"int8", "int4"}:
            rows, scales = quantize.rows(weight)
            zero = self.weight("int8_zero", np.zeros(1, np.int8))
            return self.add(
                "DynamicQuantizeMatMul", x, self.weight(f"{name}.int8", rows.T),
                self.weight(f"{name}.scales", scales), zero, out=out, domain=CONTRIB,
            )  # fmt: skip
        if precision == "half":
            stored = self.weight(f"{name}.half", weight.T.astype(np.float16))
            kept = self.add("Cast", stored, to=TensorProto.FLOAT)
        else:
            kept = self.weight(f"{name}.weight", weight.T)
        return self.add("MatMul", x, kept, out=out)

    def table(self, ids: str, name: str, rows: npt.NDArray[np.float32], *, out: str) -> str:
        """Add a look-up of rows of shape (count, size)."""
        if self._precision in {"int8", "int4"}:
            small, scales = quantize.rows(rows)
            picked = self.add("Gather", self.weight(f"{name}.int8", small), ids)
            scale = self.add("Gather", self.weight(f"{name}.scales", scales[:, None]), ids)
            return self.add("Mul", self.add("Cast", picked, to=TensorProto.FLOAT), scale, out=out)
        if self._precision == "half":
            half = self.add("Gather", self.weight(f"{name}.half", rows.astype(np.float16)), ids)
            return self.add("Cast", half, to=TensorProto.FLOAT, out=out)
        return self.add("Gather", self.weight(f"{name}.weight", rows), ids, out=out)

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> list[Path]:
        """Write the graph; the same graph gives the same bytes.

        Returns the file beside it that holds the weights, if they are too many.
        """
        beside = []
        if sum(values.nbytes for values in self._weights.values()) > MOST_INSIDE:
            beside.append(path.with_name(f"{path.name}_data"))
            weights = _outside(self._weights, beside[0])
        else:
            weights = [numpy_helper.from_array(v, k) for k, v in self._weights.items()]
        graph = helper.make_graph(
            self._nodes, self._name, self._inputs, self._outputs, weights
        )  # fmt: skip
        domains = {node.domain for node in self._nodes}
        opsets = [helper.make_opsetid("", OPSET)]
        if CONTRIB in domains:
            opsets.append(helper.make_opsetid(CONTRIB, 1))
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="rkvlmd"
        )
        for key, value in (metadata or {}).items():
            model.metadata_props.add(key=key, value=value)
        path.write_bytes(model.SerializeToString(deterministic=True))
        return beside

    def _fresh(self, op: str) -> str:
        self._count += 1
        return f"{op.lower()}_{self._count}"


def _outside(weights: dict[str, npt.NDArray[Any]], path: Path) -> list[onnx.TensorProto]:
    """Write weights to a file of their own; return what says where each one lies."""
    found = []
    with path.open("wb") as file:
        for name, values in weights.items():
            if values.nbytes < LEAST_OUTSIDE:
                found.append(numpy_helper.from_array(values, name))
                continue
            tensor = onnx.TensorProto(name=name, dims=values.shape)
            tensor.data_type = helper.np_dtype_to_tensor_dtype(values.dtype)
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": path.name, "offset": file.tell(), "length": values.nbytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            file.write(np.ascontiguousarray(values).tobytes())
            found.append(tensor)
    return found
