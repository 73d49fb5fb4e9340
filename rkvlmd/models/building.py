"""From a model of the catalogue and the files of a folder to a manifest; pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rkvlmd.models import published
from rkvlmd.models.answers import Thinking
from rkvlmd.models.matching import Tower
from rkvlmd.models.templates import Template, merged

#: Context of an ONNX model for which neither a file nor the owner says one, tokens: what memory
#: allows is usually less than what the model was trained for.
ONNX_CONTEXT = 4096
#: What the chat template is written as that a folder has not as a file.
TEMPLATE = "chat_template.jinja"
#: More special strings than any published tokenizer has; longer lists are cut.
MAX_SPECIAL = 4096


@dataclass(frozen=True, slots=True)
class Text:
    """What the folder has for text.

    ``special`` are the special tokens of ``tokenizer`` with their ids, ``None``
    without one. ``template`` is a file's name, ``thinks`` whether it writes the
    usual tags of thoughts. ``stop_ids`` as configuration files say them.
    """

    tokenizer: str | None = None
    special: Mapping[str, int] | None = None
    template: str | None = None
    stop_ids: tuple[int, ...] = ()
    thinks: bool = False


@dataclass(frozen=True, slots=True)
class Parts:
    """The files that become a model, and what is known of them.

    ``decoder`` are the decoder's files by the manifest's keys. ``external``
    maps an ONNX file to the files that hold its weights. ``config`` and
    ``picture`` are the checkpoint's own files, ``film`` is that of its videos. ``hidden`` (floats of an
    embedding), ``kv_bytes`` a token and ``longest`` (tokens, as trained) are ``None`` where no
    file says them;
    ``context`` is the owner's word. ``outputs`` are the names of what an ONNX
    decoder gives. ``separators`` is the file of the two rows of an ``assembly``.
    ``cuts`` are files that are not there yet: parts of an ONNX file of the
    folder, each with one of its outputs.
    """

    decoder: Mapping[str, str]
    towers: tuple[Tower, ...] = ()
    projector: str | None = None
    external: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    text: Text = field(default_factory=Text)
    config: Mapping[str, Any] = field(default_factory=dict)
    picture: Mapping[str, Any] = field(default_factory=dict)
    film: Mapping[str, Any] = field(default_factory=dict)
    hidden: int | None = None
    kv_bytes: int | None = None
    longest: int | None = None
    context: int | None = None
    outputs: tuple[str, ...] = ()
    separators: str | None = None
    cuts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    text_alone: bool = False


@dataclass(frozen=True, slots=True)
class Note:
    """What could not be determined: the key, what was done, and how to supply it."""

    key: str
    says: str
    todo: str = ""


class _Maker:
    def __init__(self, template: Template, engine: str, parts: Parts) -> None:
        self.template, self.engine, self.parts = template, engine, parts
        self.known = template.known(engine)
        self.notes: list[Note] = []
        self.unverified: list[str] = []
        #: Tokens of the decoder, set before its encoders are made.
        self.context = ONNX_CONTEXT

    def unsure(self, key: str, says: str, todo: str) -> None:
        self.notes.append(Note(key, says, todo))
        self.unverified.append(key)


def build(
    template: Template, name: str, parts: Parts, digest: Callable[[str], str]
) -> tuple[dict[str, Any], list[Note]]:
    """Return the manifest as JSON values, and what is not certain about it.

    ``digest`` gives the SHA-256 (hex) of a file of the folder.
    """
    engine = "npu" if "model" in parts.decoder else "onnx"
    maker = _Maker(template, engine, parts)
    known = dict(maker.known)
    common, about = known.pop("encoder", {}), known.pop("decoder", {})
    tree: dict[str, Any] = {
        "schema": 1,
        "name": name,
        "family": template.family,
        "description": template.title,
    } | known
    tree["decoder"] = _decoder(maker, about, digest)
    maker.context = tree["decoder"]["context"]
    towers = parts.towers
    if towers and not parts.text_alone:
        tree["encoders"] = [
            _encoder(maker, i, tower, common, digest) for i, tower in enumerate(towers)
        ]
        if "video" in tree and engine == "onnx":
            tree["video"] = tree["video"] | published.video(parts.config, parts.film)
        if "assembly" in tree and parts.separators is not None:
            tree["assembly"] = tree["assembly"] | {"rows": _file(parts.separators, digest)}
    else:
        for key in ("image", "video", "video_frames", "marker", "assembly"):
            tree.pop(key, None)
        sees = {"image", "multi_image", "video"}
        tree["capabilities"] = [c for c in tree.get("capabilities", ()) if c not in sees]
    _embeddings(maker, tree)
    _text(maker, tree, digest)
    doubts = [
        key
        for key in _doubts(maker, len(tree.get("encoders", ())))
        if (key != "decoder.input" or "input" in tree["decoder"])
        and (not key.startswith("embeddings") or "embeddings" in tree)
    ]
    tree["unverified"] = list(dict.fromkeys([*doubts, *maker.unverified]))
    return tree, maker.notes


def _embeddings(maker: _Maker, tree: dict[str, Any]) -> None:
    """Leave out what these files cannot give: states that no output holds, absent pictures."""
    how = tree.get("embeddings")
    if how is None:
        return
    kept = [kind for kind in how.get("inputs", ("text",)) if kind != "image" or "encoders" in tree]
    output = how.get("output", "hidden_states")
    if "decoder" in maker.parts.decoder and output not in maker.parts.outputs:
        kept = []
    if kept:
        tree["embeddings"] = how | {"inputs": kept}
    else:
        del tree["embeddings"]
        tree["capabilities"] = [c for c in tree["capabilities"] if c != "embeddings"]


def _encoder(
    maker: _Maker, i: int, tower: Tower, common: Mapping[str, Any], digest: Callable[[str], str]
) -> dict[str, Any]:
    match, parts = maker.template.match, maker.parts
    key = f"encoders[{i}]"
    made: dict[str, Any] = {
        "engine": tower.engine,
        "file": tower.file,
        "sha256": digest(tower.file),
    }
    if tower.engine == "rknn":
        made |= {"baked": True, "layout": "nhwc", "lease": "npu"}
    made = merged(made, common)
    if maker.engine == "onnx":
        said = published.encoder(maker.template.family, parts.config, parts.picture, maker.context)
        made = merged(made, said)
    elif tower.engine == "onnx":
        made = merged(made, _beside_npu(maker, key, tower))
    whole = not tower.patches and tower.width is not None and tower.height is not None
    if "patches" in made and whole:
        # A tower that was exported for one size of pixels, as those of the NPU are.
        patches = made.pop("patches")
        unit = patches["size"] * patches.get("merge", 1)
        assert tower.width is not None
        assert tower.height is not None
        made["resize"] = {"rule": "pad", "resample": made["resize"].get("resample", "bicubic")}
        made["tokens"] = max(1, (tower.width // unit) * (tower.height // unit))
    if tower.width is not None and tower.height is not None:
        made |= {"width": tower.width, "height": tower.height}
    elif "width" not in made:
        made |= dict(zip(("width", "height"), match.sizes[0], strict=True))
        if maker.engine == "npu" and tower.engine == "onnx":
            maker.notes.append(_any_size(key, tower, made["width"], made["height"]))
        if tower.engine == "rknn":
            size = f"{made['width']}x{made['height']}"
            says = f"{tower.file} does not say how many pixels it takes; {size} is assumed"
            maker.unsure(f"{key}.width", says, "give the right size with --size WIDTHxHEIGHT")
    assert match.tokens is not None
    if tower.tokens is not None:
        made["tokens"] = tower.tokens
    else:
        made.setdefault("tokens", match.tokens.of(made["width"], made["height"]))
        if tower.engine == "rknn":
            says = f"{tower.file} does not say how many rows it gives; {made['tokens']} are assumed"
            maker.unsure(f"{key}.tokens", says, "the first load compares it with the library")
    if match.tile is not None and (made["width"], made["height"]) == match.tile:
        # It sees what the rule of the other one cuts, as it is.
        resize = made.pop("resize", {})
        kept = {k: resize[k] for k in ("resample", "antialias") if k in resize}
        made |= {"tile": True, "resize": {"rule": "stretch"} | kept}
    made["embedding"] = tower.embedding or match.embedding
    if "outputs" not in made:
        made["outputs"] = match.outputs
    if tower.outputs is not None and tower.engine == "rknn":
        made["outputs"] = tower.outputs
    if i == 0 and parts.projector is not None:
        made["projector"] = _file(parts.projector, digest)
    data = [
        *parts.external.get(tower.file, ()),
        *(parts.external.get(parts.projector or "", ()) if i == 0 else ()),
    ]
    if data:
        made["data"] = [_file(file, digest) for file in data]
    return made


def _beside_npu(maker: _Maker, key: str, tower: Tower) -> dict[str, Any]:
    """Return the keys of an ONNX encoder whose decoder is an ``.rkllm``.

    Its pictures keep the size and the rule of the NPU's encoders, because the
    library takes pictures of one size; its file wants what the checkpoint's
    processor gives: floats, normalised, for some towers as flattened patches.
    """
    parts = maker.parts
    about = maker.template.known("onnx").get("encoder", {})
    said = published.encoder(maker.template.family, parts.config, parts.picture, maker.context)
    keys = ["mean", "std", "colour", "outputs", *(["patches"] if tower.patches else [])]
    made = {k: v for k in keys if (v := said.get(k, about.get(k))) is not None}
    if "mean" not in made:
        says = f"nobody says how the pixels for {tower.file} are normalised; 0..1 is assumed"
        todo = "put the preprocessor_config.json of the original model into the folder"
        maker.unsure(f"{key}.mean", says, todo)
    maker.notes.append(_on_the_cpu(key, tower))
    return made


def _on_the_cpu(key: str, tower: Tower) -> Note:
    size = f"{tower.width}x{tower.height}" if tower.width else "WIDTHxHEIGHT"
    return Note(
        f"{key}.engine",
        f"{tower.file} runs on the CPU, which takes seconds a picture on a board; the decoder runs"
        " on the NPU",
        f"to have it on the NPU too, convert it with rknn-toolkit2 on a PC (an ONNX file of one"
        f" size comes from tools/export_onnx CHECKPOINT --size {size}), put the .rknn into the"
        " folder and import again with --replace",
    )


def _any_size(key: str, tower: Tower, width: int, height: int) -> Note:
    return Note(
        f"{key}.width",
        f"{tower.file} takes pictures of several sizes, the decoder's library one: {width}x{height}",
        "another one with --size WIDTHxHEIGHT",
    )


def _decoder(
    maker: _Maker, about: Mapping[str, Any], digest: Callable[[str], str]
) -> dict[str, Any]:
    parts, template = maker.parts, maker.template
    rkllm = maker.engine == "npu"
    made: dict[str, Any] = {
        "engine": "rkllm" if rkllm else "tower" if "text" in parts.decoder else "onnx",
        "files": {key: _file(file, digest) for key, file in parts.decoder.items()},
        "lease": "npu" if rkllm else "cpu",
        "embedding": parts.hidden or template.match.embedding,
    } | dict(about)
    if not rkllm:
        made |= published.decoder(parts.config)
    if parts.towers and parts.towers[0].embedding is not None and "embedding" not in about:
        made["embedding"] = parts.towers[0].embedding
    if made.get("input") == "embeddings" and (
        "embed" not in parts.decoder or parts.text.tokenizer is None
    ):
        del made["input"]
        says = "the library is given text; rows of embeddings would need a table and a tokenizer"
        todo = "put embed.npy (vocabulary x embedding) and tokenizer.json into the folder"
        maker.notes.append(Note("decoder.input", says, todo))
    if rkllm and (versions := template.versions("rkllm")):
        made.setdefault("runtime_versions", list(versions))
    for key, file in parts.decoder.items():
        for n, data in enumerate(parts.external.get(file, ())):
            made["files"][f"{key}_data{n}" if n else f"{key}_data"] = _file(data, digest)
    if parts.kv_bytes is not None:
        made["kv_bytes_per_token"] = parts.kv_bytes
    if parts.context is not None:
        made["context"] = parts.context
    elif rkllm:
        says = (
            f"an .rkllm file does not say for which context it was converted;"
            f" {made.setdefault('context', 4096)} tokens are assumed"
        )
        maker.unsure("decoder.context", says, "give the right number with --context TOKENS")
    elif parts.longest is not None:
        made["context"] = min(parts.longest, made.get("context", ONNX_CONTEXT))
        if made["context"] < parts.longest:
            says = (
                f"the model knows {parts.longest} tokens; {made['context']} are used, to keep"
                " its cache small"
            )
            maker.notes.append(Note("decoder.context", says, "give more with --context TOKENS"))
    else:
        made.setdefault("context", ONNX_CONTEXT)
        says = f"config.json says no context; {made['context']} tokens are assumed"
        maker.unsure("decoder.context", says, "give the right number with --context TOKENS")
    return made


def _text(maker: _Maker, tree: dict[str, Any], digest: Callable[[str], str]) -> None:
    parts, text, template = maker.parts, maker.parts.text, maker.template
    origin = f" of {template.checkpoint}" if template.checkpoint else " of the original model"
    if text.tokenizer is not None:
        tree["tokenizer"] = _file(text.tokenizer, digest)
        special = text.special or {}
        # The tokenizer inside an .rkllm may know more than the file beside it.
        more = tree.get("special_strings", ()) if "model" in parts.decoder else ()
        tree["special_strings"] = list(dict.fromkeys([*special, *more]))[:MAX_SPECIAL]
        content = tree.get("image", {}).get("content")
        if content and content not in special:
            says = f"{text.tokenizer} has no special token {content!r}, which stands for a picture"
            todo = f"is it the tokenizer{origin}? put the right one into the folder"
            maker.unsure("image.content", says, todo)
    else:
        says = "there is no tokenizer.json: tokens of a prompt are estimated, not counted"
        todo = f"put the tokenizer.json{origin} into the folder and import again with --replace"
        maker.notes.append(Note("tokenizer", says, todo))
    if "text" in parts.decoder:
        return  # a tower writes nothing, and its prompt is what its family says
    if text.template is not None:
        tree["template"] = _file(text.template, digest)
    else:
        if "model" not in parts.decoder:  # the ONNX engine wants a file, which an import writes
            tree["template"] = _file(TEMPLATE, digest)
        says = f"there is no chat template in the folder: the one of the family {template.family}"
        todo = f"if answers look wrong, put the chat_template.jinja{origin} into the folder"
        maker.notes.append(Note("template", f"{says} is used", todo))
    if text.thinks and "thinking" not in tree:
        tree["thinking"] = {"start": Thinking().start, "end": Thinking().end}
        tree["capabilities"] = [*tree.get("capabilities", ()), "thinking"]
    if text.stop_ids:
        tree["stop_ids"] = list(text.stop_ids)
    elif "stop_ids" not in tree and "model" not in parts.decoder:
        says = "no file says which tokens end an answer"
        maker.unsure("stop_ids", says, "put generation_config.json into the folder, or edit it in")


def _doubts(maker: _Maker, encoders: int) -> list[str]:
    """Return the catalogue's unverified keys as keys of this manifest."""
    found: list[str] = []
    for key in maker.template.unverified:
        above, _, rest = key.partition(".")
        if above in {"npu", "onnx"}:
            if above != maker.engine:
                continue
            key, (above, _, rest) = rest, rest.partition(".")
        if above == "match" or (above in {"image", "video", "marker"} and not encoders):
            continue
        if above == "encoder":
            found += [f"encoders[{i}]" + (f".{rest}" if rest else "") for i in range(encoders)]
        elif not (key == "decoder.kv_bytes_per_token" and maker.parts.kv_bytes is not None):
            found.append(key)
    return found


def _file(file: str, digest: Callable[[str], str]) -> dict[str, str]:
    return {"file": file, "sha256": digest(file)}
