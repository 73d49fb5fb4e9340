"""Exports a checkpoint folder of any known family as a model folder with its ``rkvlm.json``."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from rkvlmd.models import families
from rkvlmd.models import manifest as manifests

from . import clip, llama
from .families import FAMILIES, Eyes, Family, Wish, decoder
from .graph import Precision
from .llama import Attention
from .weights import CheckpointError, Weights, read_json

VISION, EMBED, DECODER = "vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"
TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
#: What stands for a video in all Qwen models that see.
VIDEO = "<|video_pad|>"


def export(
    source: Path,
    out: Path,
    *,
    name: str,
    attention: Attention = "gqa",
    precision: Precision = "none",
    description: str = "",
    hidden: bool = False,
    context: int = 0,
    size: tuple[int, int] | None = None,
) -> manifests.Manifest:
    """Write the model folder ``out``; the same checkpoint gives the same bytes.

    ``hidden``: with the hidden states that embeddings are made of. ``context``
    limits the decoder's, tokens; 0 leaves it as the checkpoint says. ``size``,
    width and height in pixels, makes a vision encoder of that size alone of one
    that could take any.

    Raises:
      CheckpointError: when the checkpoint is not complete or not of a known kind.

    """
    config = read_json(source, "config.json")
    if config.get("model_type") == clip.KIND:
        if size or context:
            raise CheckpointError("--size, --context: a CLIP has its own")
        return _clip(source, out, config, name, description, precision)
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise CheckpointError(f"config.json: model_type {config.get('model_type')!r} is not known")
    weights = Weights(source)
    m = decoder(config, weights)
    if context:
        m = replace(m, context=min(m.context, context))
    picture = read_json(source, "preprocessor_config.json", needed=family.eyes is not None)
    wish = Wish(_eyes(precision), size)
    eyes = family.eyes and family.eyes(config, picture, m, weights, wish)
    if size and (eyes is None or (eyes.fields["width"], eyes.fields["height"]) != size):
        raise CheckpointError("--size: this family's encoder has a size of its own, or is none")
    out.mkdir(parents=True, exist_ok=True)
    data = {"embed": llama.build_embed(m, weights, precision).save(out / EMBED)}
    kind: Attention = "plain" if m.standard else attention
    metadata = llama.SHARED if kind == "gqa" else {}
    graph = llama.build_decoder(m, weights, precision, kind, hidden=hidden)
    data["decoder"] = graph.save(out / DECODER, metadata)
    _copy_tokenizer(source, out)
    encoders = () if eyes is None else (_encoder(out, picture, family, eyes),)
    made = _manifest(source, out, config, name, description, family, m, encoders)
    for key, files in data.items():
        made.decoder.files.update(
            {f"{key}_data": manifests.File(**_file(out, path.name)) for path in files}
        )
    if hidden:
        inputs = ("text", "image") if encoders else ("text",)
        made = msgspec.structs.replace(
            made,
            embeddings=manifests.Embeddings(inputs=inputs, output=llama.HIDDEN),  # type: ignore[arg-type]
            capabilities=(*made.capabilities, "embeddings"),
        )
    _write(out, made, name)
    return made


def _clip(
    source: Path,
    out: Path,
    config: dict[str, Any],
    name: str,
    description: str,
    precision: Precision,
) -> manifests.Manifest:
    """Write the folder of a CLIP: two towers, for embeddings alone."""
    picture, weights = read_json(source, "preprocessor_config.json"), Weights(source)
    if not (source / TOKENIZER).is_file():
        raise CheckpointError(f"{TOKENIZER} is missing")
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / TOKENIZER, out / TOKENIZER)
    graphs = clip.towers(config, weights, _eyes(precision))
    data = {file: graph.save(out / file) for file, graph in graphs.items()}
    added = read_json(source, TOKENIZER).get("added_tokens", [])
    made = clip.manifest(
        name,
        description,
        clip.described(config, picture),
        {file: _file(out, file) for file in (*graphs, TOKENIZER)},
        {file: [_file(out, path.name) for path in paths] for file, paths in data.items()},
        [t["content"] for t in added if t.get("special")],
    )
    _write(out, made, name)
    return made


def _write(out: Path, made: manifests.Manifest, name: str) -> None:
    manifests.parse(msgspec.json.encode(made), name)
    text_form = json.dumps(_without_defaults(made), indent=2, ensure_ascii=False)
    (out / manifests.FILE).write_text(text_form + "\n", encoding="utf-8")


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


def _encoder(out: Path, picture: dict[str, Any], family: Family, eyes: Eyes) -> manifests.Encoder:
    data = eyes.graph.save(out / VISION)
    file: dict[str, Any] = dict(_file(out, VISION))
    return manifests.Encoder(
        engine="onnx",
        **file,
        data=tuple(manifests.File(**_file(out, path.name)) for path in data),
        mean=_three(picture, "image_mean", family.mean),
        std=_three(picture, "image_std", family.std),
        **eyes.fields,
    )


def _manifest(
    source: Path,
    out: Path,
    config: dict[str, Any],
    name: str,
    description: str,
    family: Family,
    m: llama.Llama,
    encoders: tuple[manifests.Encoder, ...],
) -> manifests.Manifest:
    added = read_json(source, TOKENIZER).get("added_tokens", [])
    special = {t["content"]: t["id"] for t in added if t.get("special")}
    start, content, end = family.tags
    if encoders:
        _check_special(config, special, family)
    video = _video(source, config, special, family, encoders)
    can = ("image", "multi_image", *(("video",) if video is not None else ()))
    return manifests.Manifest(
        schema=1,
        name=name,
        family=family.name,
        description=description,
        encoders=encoders,
        decoder=manifests.Decoder(
            engine="onnx",
            files={
                "embed": manifests.File(**_file(out, EMBED)),
                "decoder": manifests.File(**_file(out, DECODER)),
            },
            context=m.context,
            kv_bytes_per_token=m.kv_bytes_per_token,
            embedding=m.hidden,
            rope="mrope" if m.sections else "plain",
            deepstack=tuple(range(m.deepstack)),
        ),
        tokenizer=manifests.File(**_file(out, TOKENIZER)),
        template=manifests.File(**_file(out, TEMPLATE)),
        image=manifests.Tags(start=start, content=content, end=end) if encoders else None,
        video=video,
        marker=family.marker or content or "<image>",
        special_strings=tuple(special),
        stop_ids=_stop_ids(source, config),
        capabilities=can if encoders else (),  # type: ignore[arg-type]
    )


def _video(
    source: Path,
    config: dict[str, Any],
    special: dict[str, int],
    family: Family,
    encoders: tuple[manifests.Encoder, ...],
) -> manifests.Video | None:
    """Return the tags of a video, for families whose patches are made of several frames."""
    made = families.get(family.name).film is not None and encoders and encoders[0].patches
    if not made or VIDEO not in special:
        return None
    said = read_json(source, "video_preprocessor_config.json", needed=False)
    size = said.get("size") or {}
    vision = config.get("vision_config", {})
    return manifests.Video(
        start=family.tags[0],
        content=VIDEO,
        end=family.tags[2],
        min_pixels=int(said.get("min_pixels") or size.get("shortest_edge") or 0),
        max_pixels=int(said.get("max_pixels") or size.get("longest_edge") or 0),
        # transformers has 4 where the configuration of Qwen2.5-VL says nothing; others have none.
        tokens_per_second=float(
            vision.get("tokens_per_second", 4) if family.name == "qwen2_5_vl" else 0
        ),
    )


def _check_special(config: dict[str, Any], special: dict[str, int], family: Family) -> None:
    """Compare the token that stands for a picture with the tokenizer's."""
    image = family.tags[1]
    if image not in special:
        raise CheckpointError(f"{TOKENIZER}: no special token {image}")
    wanted = next((config[key] for key in family.image_keys if key in config), None)
    if wanted is not None and wanted != special[image]:
        raise CheckpointError(f"{TOKENIZER}: {image} is {special[image]}, not {wanted}")


def _stop_ids(source: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """Return the end-of-text tokens of the first file that names any."""
    generation = read_json(source, "generation_config.json", needed=False)
    for tree in (generation, config, config.get("text_config", {})):
        found = tree.get("eos_token_id")
        if found is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    raise CheckpointError("generation_config.json: no eos_token_id")


def _three(
    picture: dict[str, Any], key: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    red, green, blue = picture.get(key) or default
    return float(red), float(green), float(blue)


def _file(out: Path, name: str) -> dict[str, str]:
    with (out / name).open("rb") as file:
        return {"file": name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _without_defaults(made: manifests.Manifest) -> dict[str, Any]:
    """Return the manifest as JSON values, less empty and default parts."""
    empty = manifests.to_builtins(
        manifests.Manifest(schema=1, name="x", family="x", decoder=made.decoder)
    )
    tree = manifests.to_builtins(made)
    keep = {"schema", "name", "family", "decoder"}
    return {k: v for k, v in tree.items() if k in keep or v != empty[k] or k == "marker"}
