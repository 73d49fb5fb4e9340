"""The layouts in which checkpoints are published, made of an exported folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rkvlmd.models import manifest as manifests

DECODER, VISION = "decoder_model_merged.onnx", "vision_encoder.onnx"
Layout = Callable[[Path], None]


def unmerged(folder: Path, *, single: bool = False) -> None:
    """Write one file for an empty cache and one for a filled one; ``single``: place by place."""
    model = onnx.load(folder / DECODER)
    pasts = [i for i in model.graph.input if i.name.startswith("past_key_values.")]
    first = onnx.ModelProto()
    first.CopyFrom(model)
    kept = [i for i in first.graph.input if not i.name.startswith("past_key_values.")]
    del first.graph.input[:]
    first.graph.input.extend(kept)
    for past in pasts:
        sizes = [d.dim_value or 1 for d in past.type.tensor_type.shape.dim]
        empty = np.zeros((1, sizes[1], 0, sizes[3]), np.float32)
        first.graph.initializer.append(numpy_helper.from_array(empty, past.name))
    onnx.save(first, folder / "decoder_model.onnx")
    if single:
        for arg in model.graph.input:
            if arg.name == "inputs_embeds":
                arg.type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(model, folder / "decoder_with_past_model.onnx")
    (folder / DECODER).unlink()
    files = {"decoder": "decoder_with_past_model.onnx", "decoder_prefill": "decoder_model.onnx"}
    edit(folder, decoder_files=files)


def single_steps(folder: Path) -> None:
    """As ``unmerged``, with a file for one place at a time."""
    unmerged(folder, single=True)


def branched(folder: Path) -> None:
    """Write a merged decoder with ``use_cache_branch``, whose first branch takes no cache."""
    model = onnx.load(folder / DECODER)
    model.graph.input.append(
        helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    )
    # A branch may ignore the cache; so the places before are forgotten where it is not taken.
    zero = numpy_helper.from_array(np.array([0], np.int64), "branch_zero")
    end = numpy_helper.from_array(np.array([1 << 40], np.int64), "branch_end")
    axis = numpy_helper.from_array(np.array([2], np.int64), "branch_axis")
    model.graph.initializer.extend([zero, end, axis])
    nodes = [helper.make_node("Where", ["use_cache_branch", "branch_end", "branch_zero"], ["kept"])]
    for past in [i.name for i in model.graph.input if i.name.startswith("past_key_values.")]:
        for node in model.graph.node:
            node.input[:] = [f"{past}.kept" if name == past else name for name in node.input]
        cut = ["branch_zero", "kept", "branch_axis"]
        nodes.append(helper.make_node("Slice", [past, *cut], [f"{past}.kept"]))
    for number, node in enumerate(nodes):
        model.graph.node.insert(number, node)
    onnx.save(model, folder / DECODER)
    edit(folder)


def outside(folder: Path) -> None:
    """Put the weights of all files into files of their own."""
    data: dict[str, str] = {}
    keys = {"decoder_data": DECODER, "embed_data": "embed_tokens.onnx", "encoder": VISION}
    for key, name in keys.items():
        onnx.save(
            onnx.load(folder / name), folder / name, save_as_external_data=True,
            location=f"{name}_data", size_threshold=1024, all_tensors_to_one_file=True,
        )  # fmt: skip
        data[key] = f"{name}_data"
    beside = data.pop("encoder")
    edit(folder, decoder_files=data, encoder_data=[beside])


def halved(folder: Path) -> None:
    """Compute in float16, with inputs and outputs of float16."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    for name in (DECODER, VISION, "embed_tokens.onnx"):
        onnx.save(convert_float_to_float16(onnx.load(folder / name)), folder / name)
    tree = json.loads((folder / manifests.FILE).read_text())
    tree["decoder"]["kv_bytes_per_token"] //= 2
    (folder / manifests.FILE).write_text(json.dumps(tree))
    edit(folder)


def projected(folder: Path) -> None:
    """Put the last product of the encoder, the projector, into a file of its own."""
    model = onnx.load(folder / VISION)
    graph = model.graph
    last = next(node for node in graph.node if graph.output[0].name in node.output)
    weights = {i.name: i for i in graph.initializer}
    assert last.op_type == "MatMul", last.op_type
    rows, kept = last.input[0], weights[last.input[1]]
    wide, narrow = kept.dims
    out = helper.make_tensor_value_info("image_features", TensorProto.FLOAT, ["n", narrow])
    inside = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", wide])
    node = helper.make_node("MatMul", ["features", kept.name], ["image_features"])
    made = helper.make_graph([node], "projector", [inside], [out], [kept])
    onnx.save(_like(model, made), folder / "projector.onnx")
    graph.node.remove(last)
    graph.initializer.remove(kept)
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(rows, TensorProto.FLOAT, ["n", "m", wide]))
    onnx.save(model, folder / VISION)
    edit(folder, projector="projector.onnx")


def four_rows(folder: Path) -> None:
    """Take the place beside time, row and column: four rows of positions."""
    model = onnx.load(folder / DECODER)
    for node in model.graph.node:
        node.input[:] = ["positions.three" if i == "position_ids" else i for i in node.input]
    cut = {"four_start": [1], "four_end": [4], "four_axis": [0]}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.array(v, np.int64), k) for k, v in cut.items()
    )
    model.graph.node.insert(
        0, helper.make_node("Slice", ["position_ids", *cut], ["positions.three"])
    )
    for arg in model.graph.input:
        if arg.name == "position_ids":
            arg.type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, folder / DECODER)
    edit(folder)


def stacked(folder: Path) -> None:
    """Take all deepstack features as one input."""
    model = onnx.load(folder / DECODER)
    names = [i.name for i in model.graph.input if i.name.startswith("deepstack_features.")]
    kept = [i for i in model.graph.input if i.name not in names]
    shape = [len(names), "batch_size", "sequence_length", 64]
    kept.append(helper.make_tensor_value_info("deepstack_embeds", TensorProto.FLOAT, shape))
    del model.graph.input[:]
    model.graph.input.extend(kept)
    for number, name in enumerate(names):
        index = numpy_helper.from_array(np.array(number, np.int64), f"stack.{number}")
        model.graph.initializer.append(index)
        node = helper.make_node("Gather", ["deepstack_embeds", index.name], [name], axis=0)
        model.graph.node.insert(0, node)
    onnx.save(model, folder / DECODER)
    edit(folder)


def _like(model: onnx.ModelProto, graph: onnx.GraphProto) -> onnx.ModelProto:
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def edit(
    folder: Path,
    *,
    decoder_files: dict[str, str] | None = None,
    encoder_data: list[str] | None = None,
    projector: str = "",
) -> None:
    """Write the manifest again, with the files as they are now."""
    tree: dict[str, Any] = json.loads((folder / manifests.FILE).read_text())
    for key, name in (decoder_files or {}).items():
        tree["decoder"]["files"][key] = {"file": name}
    for encoder in tree.get("encoders", ()):
        encoder["data"] = [{"file": name} for name in encoder_data or ()]
        encoder["projector"] = {"file": projector} if projector else None

    def fill(node: Any) -> None:
        if isinstance(node, dict):
            if "file" in node:
                data = (folder / node["file"]).read_bytes()
                node["sha256"] = hashlib.sha256(data).hexdigest()
            node = list(node.values())
        if isinstance(node, list):
            for value in node:
                fill(value)

    fill(tree)
    (folder / manifests.FILE).write_text(json.dumps(tree))
