"""Model folders for the simulated board, as they would lie on a real one: manifest and files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from rkvlmd.engine.detok import _table
from tests.npusim import models as files

SPECIALS = (*files.QWEN, "<|endoftext|>")
#: The ChatML of Qwen; the library puts the tags of a picture, so the template writes its place.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}{% if p.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}"
)
MARKER = "<|vision_start|><|image_pad|><|vision_end|>"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
IDS = {c: i for i, c in enumerate(ALPHABET)} | {s: 256 + i for i, s in enumerate(SPECIALS)}
#: The id of each byte.
BYTE_IDS = [IDS[c] for c, _ in sorted(_table().items(), key=lambda item: item[1])]
EMBED, SIDE, MERGE = 16, 64, 32
TOKENS = (SIDE // MERGE) ** 2


def tokenizer() -> Tokenizer:
    """Return a tokenizer of which each byte is a token."""
    made = Tokenizer(models.BPE(vocab={c: IDS[c] for c in ALPHABET}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(s, special=True) for s in SPECIALS])
    return made


def write(
    folder: Path,
    *,
    outputs: int = 1,
    vision: bool = True,
    count_tokens: bool = True,
    video: bool = False,
    cross: tuple[int, int, int] | None = None,
    model: dict[str, Any] | None = None,
    vision_file: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write a folder; ``changes`` are of the manifest (one level deep for ``decoder``).

    ``model`` changes the ``.rkllm`` file, ``vision_file`` the ``.rknn``.
    ``cross`` are layers, heads and dimension of a model with cross attention.
    """
    folder.mkdir(parents=True)
    embed = EMBED
    if cross is not None:
        shape = dict(zip(("layers", "kv_heads", "head_dim"), cross, strict=True))
        outputs, embed = 2, cross[0] * cross[1] * cross[2]
        changes["decoder"] = {"cross_attention": shape} | changes.get("decoder", {})
        model = {"cross": True, "outputs": 1, "merge": 0, **shape, **(model or {})}
        vision_file = {"cross": cross, **(vision_file or {})}
    files.rkllm(
        folder / "language.rkllm",
        specials={s: IDS[s] for s in SPECIALS},
        byte_ids=BYTE_IDS,
        **{
            "embed": EMBED, "outputs": outputs, "merge": MERGE if vision else 0,
            "signed_rows": True, "eos": IDS["<|im_end|>"], **(model or {}),
        },
    )  # fmt: skip
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHATML)
    if vision:
        files.rknn(
            folder / "vision.rknn",
            **{
                "width": SIDE, "height": SIDE, "tokens": TOKENS, "embed": embed,
                "outputs": outputs, **(vision_file or {}),
            },
        )  # fmt: skip
    (folder / "rkvlm.json").write_text(json.dumps(manifest(
        folder, outputs=outputs, vision=vision, count_tokens=count_tokens, video=video,
        embed=embed, **changes,
    )))  # fmt: skip
    return folder


def manifest(
    folder: Path,
    *,
    outputs: int = 1,
    vision: bool = True,
    count_tokens: bool = True,
    video: bool = False,
    embed: int = EMBED,
    **changes: Any,
) -> dict[str, Any]:
    """Return the manifest of a folder whose files are there."""

    def entry(file: str) -> dict[str, str]:
        return {"file": file, "sha256": hashlib.sha256((folder / file).read_bytes()).hexdigest()}

    built: dict[str, Any] = {
        "schema": 1,
        "name": folder.name,
        "family": "smolvlm",
        "decoder": {
            "engine": "rkllm",
            "files": {"model": entry("language.rkllm")},
            "context": 2048,
            "embedding": EMBED,
            "npu_cores": 3,
            "kv_bytes_per_token": 64,
            "lease": "npu",
        },
        "template": entry("chat_template.jinja"),
        "marker": MARKER,
        "special_strings": list(SPECIALS),
        "stop_ids": [IDS["<|im_end|>"], IDS["<|endoftext|>"]],
    }
    if count_tokens:
        built["tokenizer"] = entry("tokenizer.json")
    if vision:
        built["encoders"] = [{
            "engine": "rknn", **entry("vision.rknn"), "width": SIDE, "height": SIDE,
            "resize": {"rule": "pad", "resample": "bilinear", "fill": [128, 128, 128]},
            "baked": True, "layout": "nhwc", "tokens": TOKENS, "embedding": embed,
            "outputs": outputs, "lease": "npu",
        }]  # fmt: skip
        built["image"] = {
            "start": "<|vision_start|>", "content": "<|image_pad|>", "end": "<|vision_end|>"
        }  # fmt: skip
        built["capabilities"] = ["image", "multi_image"]
    if video:
        built["video"] = {
            "start": "<|vision_start|>", "content": "<|video_pad|>", "end": "<|vision_end|>"
        }  # fmt: skip
        built["capabilities"].append("video")
    built["decoder"] |= changes.pop("decoder", {})
    return built | changes
