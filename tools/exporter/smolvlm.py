"""Exports a SmolVLM checkpoint folder as a model folder with its ``rkvlm.json``."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec

from rkvlmd.models import manifest as manifests

from . import llama, vision
from .graph import Precision
from .llama import Attention
from .weights import CheckpointError, Weights, read_json

FAMILY = "smolvlm"
#: Architectures whose folders are exported, by ``model_type``.
TYPES = {"smolvlm", "idefics3"}
#: PIL's numbers of resampling filters, as ``preprocessor_config.json`` has them.
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
VISION, EMBED, DECODER = "vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"
TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"


def export(
    source: Path,
    out: Path,
    *,
    name: str,
    attention: Attention = "gqa",
    precision: Precision = "none",
    description: str = "",
) -> manifests.Manifest:
    """Write the model folder ``out``; the same checkpoint gives the same bytes.

    Raises:
      CheckpointError: when the checkpoint is not complete or not of a known kind.

    """
    config = read_json(source, "config.json")
    if config.get("model_type") not in TYPES:
        raise CheckpointError(f"config.json: model_type {config.get('model_type')!r} is not known")
    eyes, text = vision.sizes(config), llama.sizes(config.get("text_config", {}))
    weights = Weights(source)
    out.mkdir(parents=True, exist_ok=True)
    vision.build(eyes, weights, _eyes(precision)).save(out / VISION)
    llama.build_embed(text, weights, precision).save(out / EMBED)
    metadata = llama.SHARED if attention == "gqa" else {}
    llama.build_decoder(text, weights, precision, attention).save(out / DECODER, metadata)
    _copy_tokenizer(source, out)
    made = _manifest(source, out, config, name, description, eyes, text)
    manifests.parse(msgspec.json.encode(made), name)
    text_form = json.dumps(_without_defaults(made), indent=2, ensure_ascii=False)
    (out / manifests.FILE).write_text(text_form + "\n", encoding="utf-8")
    return made


def _eyes(precision: Precision) -> Precision:
    """Vision is quantised to 8 bits at most: it runs once a picture and errors there add up."""
    return "int8" if precision == "int4" else precision


def _copy_tokenizer(source: Path, out: Path) -> None:
    if not (source / TOKENIZER).is_file():
        raise CheckpointError(f"{TOKENIZER} is missing")
    shutil.copyfile(source / TOKENIZER, out / TOKENIZER)
    (out / TEMPLATE).write_text(_template(source), encoding="utf-8")


def _template(source: Path) -> str:
    """Return the chat template: a file of its own, or inside a JSON file (older folders)."""
    path = source / TEMPLATE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        found = read_json(source, name, needed=False).get("chat_template")
        if isinstance(found, str):
            return found
    raise CheckpointError(f"{TEMPLATE} is missing")


def _manifest(
    source: Path,
    out: Path,
    config: dict[str, Any],
    name: str,
    description: str,
    eyes: vision.Vision,
    text: llama.Llama,
) -> manifests.Manifest:
    picture = read_json(source, "preprocessor_config.json")
    added = read_json(source, TOKENIZER).get("added_tokens", [])
    special = {t["content"]: t["id"] for t in added if t.get("special")}
    fake, image, whole = (
        _special(config, special, key, default)
        for key, default in (
            ("fake_image_token", "<fake_token_around_image>"),
            ("image_token", "<image>"),
            ("global_image_token", "<global-img>"),
        )
    )
    return manifests.Manifest(
        schema=1,
        name=name,
        family=FAMILY,
        description=description,
        encoders=(
            manifests.Encoder(
                engine="onnx",
                **_file(out, VISION),
                width=eyes.side,
                height=eyes.side,
                resize=manifests.Resize(
                    rule="stretch", resample=_resample(picture), antialias=True
                ),
                mean=_three(picture, "image_mean"),
                std=_three(picture, "image_std"),
                tokens=eyes.tokens,
                embedding=eyes.embedding,
            ),
        ),
        decoder=manifests.Decoder(
            engine="onnx",
            files={
                "embed": manifests.File(**_file(out, EMBED)),
                "decoder": manifests.File(**_file(out, DECODER)),
            },
            context=text.context,
            kv_bytes_per_token=text.kv_bytes_per_token,
            embedding=text.hidden,
        ),
        tokenizer=manifests.File(**_file(out, TOKENIZER)),
        template=manifests.File(**_file(out, TEMPLATE)),
        image=manifests.Tags(start=fake + whole, content=image, end=fake),
        marker=image,
        special_strings=tuple(special),
        stop_ids=_stop_ids(source, config),
        capabilities=("image", "multi_image"),
    )


def _special(config: dict[str, Any], special: dict[str, int], key: str, default: str) -> str:
    if default not in special:
        raise CheckpointError(f"{TOKENIZER}: no special token {default} ({key})")
    wanted = config.get(f"{key}_id")
    if wanted is not None and wanted != special[default]:
        raise CheckpointError(f"{TOKENIZER}: {default} is {special[default]}, not {wanted}")
    return default


def _stop_ids(source: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """Return the end-of-text tokens of the first file that names any."""
    generation = read_json(source, "generation_config.json", needed=False)
    for tree in (generation, config, config.get("text_config", {})):
        found = tree.get("eos_token_id")
        if found is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    raise CheckpointError("generation_config.json: no eos_token_id")


def _resample(picture: dict[str, Any]) -> Any:
    number = picture.get("resample", 1)  # SmolVLM's processor has lanczos as its default
    if number not in RESAMPLE:
        raise CheckpointError(f"preprocessor_config.json: resample {number} is not known")
    return RESAMPLE[number]


def _three(picture: dict[str, Any], key: str) -> tuple[float, float, float]:
    red, green, blue = picture.get(key, (0.5, 0.5, 0.5))
    return float(red), float(green), float(blue)


def _file(out: Path, name: str) -> dict[str, str]:
    with (out / name).open("rb") as file:
        return {"file": name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _without_defaults(made: manifests.Manifest) -> dict[str, Any]:
    """Return the manifest as JSON values, less empty and default parts at the top."""
    empty = manifests.to_builtins(
        manifests.Manifest(schema=1, name="x", family="x", decoder=made.decoder)
    )
    tree = manifests.to_builtins(made)
    keep = {"schema", "name", "family", "decoder"}
    return {k: v for k, v in tree.items() if k in keep or v != empty[k] or k == "marker"}
