"""Folders as people download them: files of the NPU toolkits, and ONNX checkpoints."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BODY = 512


def trailer(
    takes: Sequence[tuple[str, Sequence[int]]],
    gives: Sequence[tuple[str, Sequence[int]]],
    *,
    platform: str = "rk3588",
    version: str = "2.5.0",
) -> dict[str, Any]:
    """Return the JSON at the end of an ``.rknn`` file, key by key as rknn-toolkit2 2.5.0 wrote it."""
    tensors = [
        {"dim_num": len(dims), "dtype": {"qnt_method": "", "qnt_type": "", "vx_type": ""},
         "size": list(dims), "tensor_id": i, "url": name}
        for i, (name, dims) in enumerate([*takes, *gives])
    ]  # fmt: skip
    edges = [
        {
            "left": side,
            "left_tensor_id": place,
            "right": "norm_tensor",
            "right_tensor_id": at + place,
        }
        for side, listed, at in (("input", takes, 0), ("output", gives, len(takes)))
        for place in range(len(listed))
    ]
    return {
        "connection": [], "const_tensor": [], "graph": edges, "input_num": len(takes),
        "name": "rknn model", "network_platform": "ONNX", "node_num": 1, "nodes": [],
        "norm_tensor": tensors, "norm_tensor_num": len(tensors), "ori_network_platform": "ONNX",
        "output_num": len(gives), "target_platform": [platform], "version": version,
        "virtual_tensor": [],
    }  # fmt: skip


def rknn(
    path: Path,
    width: int = 448,
    height: int = 448,
    *,
    tokens: int = 196,
    embedding: int = 2048,
    outputs: int = 1,
    leading: bool = False,
    tree: dict[str, Any] | None = None,
    **more: Any,
) -> Path:
    """Write a file that says it is an encoder; ``leading`` puts a 1 before its rows.

    ``tree`` is written in place of what is made of the other arguments; ``{}``
    is a file that says nothing.
    """
    dims = [1, tokens, embedding] if leading else [tokens, embedding]
    if tree is None:
        tree = trailer(
            [("pixel", [1, 3, height, width])], [(f"out{i}", dims) for i in range(outputs)], **more
        )
    text = json.dumps(tree).encode()
    head = b"RKNN\0\0\0\0" + struct.pack("<QQ", 6, BODY)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head.ljust(64, b"\0") + bytes(BODY) + struct.pack("<Q", len(text)) + text)
    return path


def rkllm(path: Path, size: int = 300) -> Path:
    """Write a file of the ending; it says nothing, as real ones do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<QQ", 0x4D4C4C52, 1) + bytes(size))
    return path


def tokenizer(path: Path, special: Sequence[str]) -> Path:
    """Write a tokenizer that has these special tokens, and one token for each byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    made.save(str(path))
    return path
