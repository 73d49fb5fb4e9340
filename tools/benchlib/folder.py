"""A model folder for scripted engines: a real tokenizer and template, and files nobody opens."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

_TEMPLATE = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"


def make(parent: Path, name: str, *, context: int) -> Path:
    """Write the folder ``name`` below ``parent``: one token a byte, ``context`` tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder = parent / name
    folder.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<image>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    for file in ("vision.onnx", "embed.onnx", "decoder.onnx"):
        (folder / file).write_bytes(file.encode())

    def entry(file: str) -> dict[str, str]:
        digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        return {"file": file, "sha256": digest}

    shape = {"width": 16, "height": 16, "tokens": 4, "embedding": 8}
    manifest = {
        "schema": 1,
        "name": name,
        "family": "smolvlm",
        "encoders": [{"engine": "onnx", **entry("vision.onnx"), **shape}],
        "decoder": {
            "engine": "onnx",
            "files": {"embed": entry("embed.onnx"), "decoder": entry("decoder.onnx")},
            "context": context,
            "embedding": 8,
            "kv_bytes_per_token": 64,
        },
        "tokenizer": entry("tokenizer.json"),
        "template": entry("chat_template.jinja"),
        "image": {"content": "<image>"},
        "capabilities": ["image"],
    }
    (folder / "rkvlm.json").write_text(json.dumps(manifest))
    return folder
