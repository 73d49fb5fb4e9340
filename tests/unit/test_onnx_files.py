"""Model files that are wrong, and the layouts that published decoders have."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from rkvlmd.engine import inspect, onnx_cache, onnx_common
from rkvlmd.engine.onnx_decoder import OnnxDecoder
from rkvlmd.engine.onnx_encoder import OnnxEncoder
from rkvlmd.engine.onnx_slice import slice_model
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import manifest as manifests
from rkvlmd.wire import child
from tests.fakes import tiny_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model.make_model(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "tiny")


def tree_of(folder: Path) -> dict[str, Any]:
    return manifests.to_builtins(manifests.parse((folder / manifests.FILE).read_bytes()))


def load(backend: Any, folder: Path, tree: dict[str, Any]) -> Any:
    backend.load(
        child.Load(folder=str(folder), manifest=tree, options={"threads": 1}), lambda *_: None
    )
    return backend


PARTS = [
    (OnnxEncoder, "vision_encoder.onnx", "encoders[0].file"),
    (OnnxDecoder, "embed_tokens.onnx", "decoder.files.embed.file"),
    (OnnxDecoder, "decoder_model_merged.onnx", "decoder.files.decoder.file"),
    (OnnxDecoder, "tokenizer.json", "tokenizer.file"),
]


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "other"])
@pytest.mark.parametrize(("backend", "name", "key"), PARTS)
def test_a_broken_file_is_named_with_its_key_and_without_its_path(
    folder: Path, backend: Any, name: str, key: str, damage: str
) -> None:
    path = folder / name
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(
            {"empty": b"", "cut": data[: len(data) * 2 // 3], "other": b"GIF89a"}[damage]
        )
    with pytest.raises(RkvlmdError) as caught:
        load(backend(), folder, tree_of(folder))
    message = caught.value.message
    assert caught.value.code == "invalid_model"
    assert message.startswith(f"{key}: {name} ")
    assert str(folder) not in message
    assert "ONNXRuntime" not in message


@pytest.mark.parametrize(
    ("backend", "change", "says"),
    [
        (OnnxEncoder, lambda t: t["encoders"][0].update(tokens=5), r"encoders\[0\].tokens.* 5.* 4"),
        (OnnxEncoder, lambda t: t["encoders"][0].update(width=40), r"encoders\[0\].width.* 40.* 32"),
        (OnnxEncoder, lambda t: t["encoders"][0].update(height=40), r"encoders\[0\].height.* 40.* 32"),
        (OnnxEncoder, lambda t: t["encoders"][0].update(layout="nhwc"), r"encoders\[0\].layout"),
        (OnnxEncoder, lambda t: t["encoders"][0].update(outputs=2), r"encoders\[0\].outputs.* 2.* 1"),
        (OnnxEncoder, lambda t: t["encoders"][0].update(embedding=32), r"embedding.* 32.* 64"),
        (OnnxDecoder, lambda t: t["decoder"].update(embedding=32), r"decoder.embedding.* 32.* 64"),
        (
            OnnxDecoder,
            lambda t: t["decoder"].update(kv_bytes_per_token=3),
            r"decoder.kv_bytes_per_token.* 3.* 768",
        ),
    ],
)  # fmt: skip
def test_a_shape_that_differs_is_named_with_both_sizes(
    folder: Path, backend: Any, change: Any, says: str
) -> None:
    tree = tree_of(folder)
    change(tree)
    with pytest.raises(RkvlmdError, match=says) as caught:
        load(backend(), folder, tree)
    assert caught.value.code == "invalid_model"


def test_a_file_of_another_kind_is_told(folder: Path) -> None:
    shutil.copyfile(folder / "vision_encoder.onnx", folder / "decoder_model_merged.onnx")
    with pytest.raises(RkvlmdError, match=r"decoder.*has no inputs_embeds, logits"):
        load(OnnxDecoder(), folder, tree_of(folder))
    shutil.copyfile(folder / "embed_tokens.onnx", folder / "vision_encoder.onnx")
    with pytest.raises(RkvlmdError, match=r"encoders\[0\].file: no input of four or five"):
        load(OnnxEncoder(), folder, tree_of(folder))


def test_inspect_reads_names_shapes_and_types(folder: Path) -> None:
    found = inspect.inspect(str(folder / "embed_tokens.onnx"))
    assert found["inputs"] == [
        {"name": "input_ids", "shape": ["batch_size", "sequence_length"], "type": "int64"}
    ]
    assert found["outputs"][0]["shape"][-1] == 64
    found = inspect.inspect(str(folder / "decoder_model_merged.onnx"))
    assert found["metadata"] == {"rkvlmd.kv_cache": "shared"}
    with pytest.raises(RkvlmdError):
        inspect.inspect(str(folder / "rkvlm.json"))


def test_idle_sessions_use_no_processor_time_for_waiting(folder: Path) -> None:
    session = onnx_common.open_session(folder / "vision_encoder.onnx", "x", 2)
    options = session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_slice_model_is_valid_onnx_and_cuts(dtype: Any) -> None:
    data = slice_model(np.dtype(dtype))
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    x = np.arange(2 * 3 * 5 * 4).reshape(2, 3, 5, 4).astype(dtype)
    ends = {"start": np.array([1]), "end": np.array([3])}
    assert np.array_equal(session.run(None, {"x": x, **ends})[0], x[:, :, 1:3])


def vision(path: Path, rank: int, outputs: int = 1, mask: bool = False) -> None:
    """Write an encoder whose row i of output j holds the mean of the picture, plus 10 i + j."""
    lead = [1] * (rank - 3)
    inputs = [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [*lead, 3, 8, 8])]
    if mask:
        inputs.append(
            helper.make_tensor_value_info(
                "pixel_attention_mask", TensorProto.BOOL, ["b", "n", "h", "w"]
            )
        )
    nodes = [helper.make_node("ReduceMean", ["pixel_values"], ["mean"], keepdims=0)]
    weights, outs = [], []
    for j in range(outputs):
        rows = np.full((1, 4, 6), j, np.float32) + 10 * np.arange(4, dtype=np.float32)[:, None]
        weights.append(onnx.numpy_helper.from_array(rows, f"rows{j}"))
        nodes.append(helper.make_node("Add", ["mean", f"rows{j}"], [f"out{j}"]))
        outs.append(helper.make_tensor_value_info(f"out{j}", TensorProto.FLOAT, [1, 4, 6]))
    save(path, nodes, inputs, outs, weights)


def save(path: Path, nodes: Any, inputs: Any, outputs: Any, weights: Any = ()) -> None:
    graph = helper.make_graph(nodes, "fake", inputs, outputs, list(weights))
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)


def encoder_tree(folder: Path, **changes: Any) -> dict[str, Any]:
    tree = tree_of(folder)
    entry = tree["encoders"][0] | {"width": 8, "height": 8, "tokens": 4, "embedding": 6}
    tree["encoders"] = [entry | changes]
    return tree


@pytest.mark.parametrize(("rank", "mask"), [(4, False), (5, False), (5, True)])
def test_pictures_of_rank_four_and_five_with_and_without_mask(
    folder: Path, rank: int, mask: bool
) -> None:
    vision(folder / "vision_encoder.onnx", rank, mask=mask)
    encoder = load(OnnxEncoder(), folder, encoder_tree(folder))
    for shape in ((3, 8, 8), (1, 3, 8, 8)):
        rows = encoder.encode(np.full(shape, 2, np.float32))
        assert rows.shape == (4, 6)
        assert rows.dtype == np.float32
        assert rows.flags.c_contiguous
        assert rows[:, 0].tolist() == [2, 12, 22, 32]


def test_a_file_whose_first_run_fails_is_not_a_model(folder: Path) -> None:
    path = folder / "vision_encoder.onnx"
    inputs = [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["n", 3, "h", "w"])]
    size = onnx.numpy_helper.from_array(np.array([7, 6]), "size")
    nodes = [helper.make_node("Reshape", ["pixel_values", "size"], ["rows"])]
    outs = [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["t", 6])]
    save(path, nodes, inputs, outs, [size])
    with pytest.raises(RkvlmdError, match=r"^encoders\[0\].file: its first run failed.$") as caught:
        load(OnnxEncoder(), folder, encoder_tree(folder))
    assert caught.value.code == "invalid_model"


def test_several_outputs_lie_side_by_side_in_each_row(folder: Path) -> None:
    vision(folder / "vision_encoder.onnx", 4, outputs=3)
    encoder = load(OnnxEncoder(), folder, encoder_tree(folder, outputs=3))
    rows = encoder.encode(np.zeros((3, 8, 8), np.float32))
    assert rows.shape == (4, 18)
    assert rows[1].tolist() == [10] * 6 + [11] * 6 + [12] * 6


def test_pixels_that_do_not_fit_or_give_no_numbers_are_engine_errors(folder: Path) -> None:
    vision(folder / "vision_encoder.onnx", 4)
    encoder = load(OnnxEncoder(), folder, encoder_tree(folder))
    for pixels in (np.zeros((3, 8, 9), np.float32), np.full((3, 8, 8), np.nan, np.float32)):
        with pytest.raises(RkvlmdError) as caught:
            encoder.encode(pixels)
        assert caught.value.code == "engine_error"


def bag_decoder(path: Path, kind: int, others: dict[str, tuple[int, list[Any]]]) -> None:
    """Write a decoder whose logits are the sum of all embeddings in its cache (64 tokens)."""
    shape = ["b", 1, "past", 64]
    inputs = [
        helper.make_tensor_value_info("inputs_embeds", kind, ["b", "s", 64]),
        *(helper.make_tensor_value_info(n, k, s) for n, (k, s) in others.items()),
    ]
    nodes = [
        helper.make_node("Unsqueeze", ["inputs_embeds", "one"], ["new"]),
        helper.make_node("ReduceSum", ["present.0.key", "two"], ["logits"], keepdims=0),
    ]
    outputs = [helper.make_tensor_value_info("logits", kind, ["b", 1, 64])]
    for part in ("key", "value"):
        past, present = f"past_key_values.0.{part}", f"present.0.{part}"
        inputs.append(helper.make_tensor_value_info(past, kind, shape))
        outputs.append(helper.make_tensor_value_info(present, kind, ["b", 1, "all", 64]))
        nodes.insert(1, helper.make_node("Concat", [past, "new"], [present], axis=2))
    ints = [onnx.numpy_helper.from_array(np.array([i]), n) for n, i in (("one", 1), ("two", 2))]
    save(path, nodes, inputs, outputs, ints)


BRANCH = {"use_cache_branch": (TensorProto.BOOL, [1])}
PLACES = {
    "attention_mask": (TensorProto.INT64, ["b", "t"]),
    "position_ids": (TensorProto.INT64, ["b", "s"]),
}


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16])
@pytest.mark.parametrize("others", [{}, PLACES, BRANCH, PLACES | BRANCH])
def test_decoders_with_and_without_the_usual_inputs(
    folder: Path, kind: int, others: dict[str, Any]
) -> None:
    path = folder / "decoder_model_merged.onnx"
    bag_decoder(path, kind, others)
    session = onnx_common.open_session(path, "x", 1)
    graph = onnx_cache.open_cache(session, onnx_cache.shape_of(session), 100)
    rows = np.eye(64, dtype=np.float32 if kind == TensorProto.FLOAT else np.float16)[None]
    run = ort.RunOptions()
    assert graph.step(rows[:, 3:5], run, logits=True)[:6].tolist() == [0, 0, 0, 1, 1, 0]
    assert graph.step(rows[:, 7:8], run, logits=False).size == 0
    found = graph.step(rows[:, 3:4], run, logits=True)
    assert found.dtype == np.float32
    assert (found[3], found[4], found[7]) == (2, 1, 1)
    graph.truncate(1)
    assert np.flatnonzero(graph.step(rows[:, 9:10], run, logits=True)).tolist() == [3, 9]
    graph.truncate(0)
    assert np.flatnonzero(graph.step(rows[:, 9:10], run, logits=True)).tolist() == [9]


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ({"encoder_hidden_states": (TensorProto.FLOAT, ["b"])}, "unknown inputs encoder_hidden"),
        ({"position_ids": (TensorProto.INT64, [3, "b", "s"])}, "decoder.rope: is plain"),
        ({"per_layer_inputs": (TensorProto.FLOAT, ["b"])}, "decoder.files.embed does not give"),
        ({"deepstack_features.0": (TensorProto.FLOAT, ["b"])}, "decoder.deepstack.* 0, .* is 1"),
    ],
)
def test_decoders_of_unknown_layouts_are_refused(
    folder: Path, others: dict[str, Any], says: str
) -> None:
    bag_decoder(folder / "decoder_model_merged.onnx", TensorProto.FLOAT, others)
    with pytest.raises(RkvlmdError, match=says):
        load(OnnxDecoder(), folder, tree_of(folder))


def patch_encoder(path: Path, grid: str = "image_grid_thw", values: int = 3 * 2 * 4 * 4) -> None:
    """Write an encoder whose row is the first value of four patches, 64 times, plus its grid's sum."""
    inputs = [
        helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["n", values]),
        helper.make_tensor_value_info(grid, TensorProto.INT64, [1, 3]),
    ]
    nodes = [
        helper.make_node("Reshape", ["pixel_values", "four"], ["rows"]),
        helper.make_node("Slice", ["rows", "zero", "width", "one"], ["cut"]),
        helper.make_node("ReduceSum", [grid], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["cut", "float"], ["features"]),
    ]
    outputs = [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["m", 64])]
    given = {"four": [-1, 4 * values], "zero": [0], "width": [64], "one": [1]}
    ints = [onnx.numpy_helper.from_array(np.array(v), n) for n, v in given.items()]
    save(path, nodes, inputs, outputs, ints)


def patched(folder: Path, **patches: int) -> dict[str, Any]:
    tree = tree_of(folder)
    tree["encoders"][0]["patches"] = {"size": 4, "temporal": 2, "merge": 2} | patches
    return tree


@pytest.mark.parametrize("name", ["image_grid_thw", "grid_thw"])
def test_flattened_patches_come_with_their_grid(folder: Path, name: str) -> None:
    patch_encoder(folder / "vision_encoder.onnx", name)
    encoder = load(OnnxEncoder(), folder, patched(folder))
    pixels = np.arange(24 * 96, dtype=np.float32).reshape(24, 96)
    rows = encoder.encode(pixels, (1, 4, 6))
    assert rows.shape == (6, 64)
    assert rows[:, 0].tolist() == [i * 4 * 96 + 11 for i in range(6)]
    for grid, wrong in (
        (None, pixels),
        ((1, 4, 5), pixels),
        ((1, 3, 8), pixels),
        ((1, 4, 6), pixels[:, :9]),
    ):
        with pytest.raises(RkvlmdError, match="grid") as caught:
            encoder.encode(wrong, grid)
        assert caught.value.code == "engine_error"


def test_a_file_of_other_patches_is_named_with_both_sizes(folder: Path) -> None:
    patch_encoder(folder / "vision_encoder.onnx")
    with pytest.raises(RkvlmdError, match=r"encoders\[0\].patches.* 216.* 96"):
        load(OnnxEncoder(), folder, patched(folder, size=6))
    with pytest.raises(RkvlmdError, match="no input of four or five"):
        load(OnnxEncoder(), folder, tree_of(folder))


def test_files_beside_the_model_are_part_of_it(folder: Path) -> None:
    tree = tree_of(folder)
    data = {"file": "vision_encoder.onnx_data", "sha256": "0" * 64}
    tree["encoders"][0].update(data=[data], projector=data | {"file": "projector.onnx"})
    found = manifests.file_problems(manifests.from_builtins(tree), folder)
    assert found == [
        "encoders[0].projector.file: projector.onnx is missing",
        "encoders[0].data[0].file: vision_encoder.onnx_data is missing",
    ]
    with pytest.raises(
        RkvlmdError, match=r"encoders\[0\].projector.file: projector.onnx is missing"
    ):
        load(OnnxEncoder(), folder, tree)
