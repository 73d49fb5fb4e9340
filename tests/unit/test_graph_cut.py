"""One output cut out of an ONNX graph, with all that it needs and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from rkvlmd.engine.graph_cut import cut
from rkvlmd.engine.graph_header import NotOnnxError, read


def two(path: Path) -> Path:
    """Write a graph with two outputs, of which one goes through a branch with graphs inside."""

    def branch(name: str, weight: str) -> onnx.GraphProto:
        node = helper.make_node("Mul", ["a", weight], [name])
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, [2])
        return helper.make_graph([node], name, [], [value])

    nodes = [
        helper.make_node("Greater", ["a", "low"], ["each"]),
        helper.make_node("Gather", ["each", "first"], ["picked"], axis=0),
        helper.make_node("If", ["picked"], ["left"], then_branch=branch("yes", "two"),
                         else_branch=branch("no", "three")),
        helper.make_node("Add", ["b", "four"], ["sum"]),
        helper.make_node("Neg", ["sum"], ["right"]),
    ]  # fmt: skip
    values = {"low": 0.0, "two": 2.0, "three": 3.0, "four": 4.0}
    weights = [numpy_helper.from_array(np.array(v, np.float32), k) for k, v in values.items()]
    weights.append(numpy_helper.from_array(np.array(0, np.int64), "first"))

    def value(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [2])

    graph = helper.make_graph(
        nodes, "two", [value("a"), value("b")], [value("left"), value("right")], weights,
        value_info=[value("sum")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model.metadata_props.add(key="made", value="by hand")
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def run(path: Path, **given: list[float]) -> list[float]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {name: np.array(values, np.float32) for name, values in given.items()}
    (found,) = session.run(None, feeds)
    return [float(v) for v in found]


def test_each_half_computes_what_the_whole_did(tmp_path: Path) -> None:
    source = two(tmp_path / "two.onnx")
    before = source.read_bytes()
    cut(source, tmp_path / "left.onnx", "left")
    cut(source, tmp_path / "right.onnx", "right")
    assert source.read_bytes() == before
    assert run(tmp_path / "left.onnx", a=[1.0, 5.0]) == [2.0, 10.0]
    assert run(tmp_path / "left.onnx", a=[-1.0, 5.0]) == [-3.0, 15.0]
    assert run(tmp_path / "right.onnx", b=[1.0, 2.0]) == [-5.0, -6.0]


def test_what_the_other_half_needs_is_gone(tmp_path: Path) -> None:
    source = two(tmp_path / "two.onnx")
    for name, nodes, weights in (
        ("left", ["Greater", "Gather", "If"], {"low", "two", "three", "first"}),
        ("right", ["Add", "Neg"], {"four"}),
    ):
        cut(source, tmp_path / name, name)
        model = onnx.load(tmp_path / name)
        onnx.checker.check_model(model, full_check=True)
        assert [node.op_type for node in model.graph.node] == nodes
        assert {weight.name for weight in model.graph.initializer} == weights
        header = read(tmp_path / name)
        assert header.metadata == {"made": "by hand"}
        assert [value.name for value in header.outputs] == [name]
        assert len(header.inputs) == 1


@pytest.mark.parametrize(
    ("data", "says"),
    [(b"", "empty"), (b"no graph", "field"), (b"\x08\x08", "no graph"), (None, "computes middle")],
)
def test_what_cannot_be_cut(data: bytes | None, says: str, tmp_path: Path) -> None:
    source = tmp_path / "x.onnx"
    if data is None:
        two(source)
    else:
        source.write_bytes(data)
    with pytest.raises(NotOnnxError, match=says):
        cut(source, tmp_path / "y.onnx", "middle")


def test_a_file_that_is_cut_off_is_told(tmp_path: Path) -> None:
    whole = two(tmp_path / "two.onnx").read_bytes()
    source = tmp_path / "x.onnx"
    for end in range(1, len(whole), 7):
        source.write_bytes(whole[:end])
        with pytest.raises(NotOnnxError):
            cut(source, tmp_path / "y.onnx", "right")
