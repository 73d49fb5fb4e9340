"""Reading an ONNX file's head: what ONNX Runtime says, without loading weights."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from rkvlmd.engine import graph_header
from rkvlmd.engine.inspect import inspect, prompts
from rkvlmd.errors import RkvlmdError
from rkvlmd.models.catalog import DEMO


def graph(path: Path, **save: object) -> Path:
    """Write a graph with every kind of size, old-style weights among its inputs."""
    weight = numpy_helper.from_array(np.zeros((4, 8), np.float32), "w")
    made = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"]),
             helper.make_node("Cast", ["y"], ["z"], to=TensorProto.FLOAT16)],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, None, 4]),
             helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 8])],
            [helper.make_tensor_value_info("z", TensorProto.FLOAT16, ["batch", 3, None, 8])],
            [weight],
        ),
        producer_name="someone",
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )  # fmt: skip
    helper.set_model_props(made, {"key": "value"})
    onnx.save(made, str(path), **save)
    return path


def test_it_says_what_the_runtime_says(tmp_path: Path) -> None:
    path = graph(tmp_path / "g.onnx")
    session = ort.InferenceSession(str(path))
    found = inspect(str(path))
    for ours, theirs in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
        assert [(v["name"], v["shape"], f"tensor({v['type']})") for v in found[ours]] == [
            (arg.name, arg.shape, arg.type) for arg in theirs
        ]
    assert (found["producer"], found["metadata"]) == ("someone", {"key": "value"})
    assert found["external"] == []


def test_it_names_the_files_of_weights_and_does_not_need_them(tmp_path: Path) -> None:
    path = graph(
        tmp_path / "g.onnx", save_as_external_data=True, location="g.data", size_threshold=0
    )
    (tmp_path / "g.data").unlink()
    found = inspect(str(path))
    assert found["external"] == ["g.data"]
    assert [v["name"] for v in found["inputs"]] == ["x"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("header") / "x.onnx"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_bytes_that_are_no_model_are_refused_and_nothing_else_happens(
    place: Path, data: st.DataObject
) -> None:
    whole = (DEMO / "embed_tokens.onnx").read_bytes()[:400]
    size = data.draw(st.integers(0, len(whole)))
    at = data.draw(st.integers(0, max(0, size - 1)))
    made = bytearray(whole[:size])
    if made:
        made[at] = data.draw(st.integers(0, 255))
    place.write_bytes(made)
    with contextlib.suppress(graph_header.NotOnnxError):
        graph_header.read(place)


@pytest.mark.parametrize("content", [b"", b"\0", b"hello, world", b"\x3a\xff\xff\xff\xff\x0f"])
def test_other_files_are_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(RkvlmdError, match=r"x\.onnx is no ONNX model"):
        inspect(str(tmp_path / "x.onnx"))
    with pytest.raises(RkvlmdError, match=r"y\.onnx cannot be read"):
        inspect(str(tmp_path / "y.onnx"))


def test_prompts_of_a_folder_are_tried(tmp_path: Path) -> None:
    found = prompts(str(DEMO))
    assert found["counted"]
    # 64 image tokens and three tags.
    assert found["picture"] == 67
    with pytest.raises(RkvlmdError, match=r"rkvlm\.json cannot be read"):
        prompts(str(tmp_path))
    (tmp_path / "rkvlm.json").write_text("{}")
    with pytest.raises(RkvlmdError, match="missing required field"):
        prompts(str(tmp_path))
