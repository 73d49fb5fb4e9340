"""``rkvlmctl show``: what clients may expect of a model; no daemon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkvlmd.ctl import places, render
from rkvlmd.ctl.client import CtlError

if TYPE_CHECKING:
    from rkvlmd.models.catalog import Entry
    from rkvlmd.models.manifest import Embeddings, Encoder, Manifest
    from rkvlmd.models.templates import Template

#: Pictures for which the number of tokens is told, pixels.
EXAMPLES = ((640, 480), (1920, 1080), (4000, 3000))
_CATALOGUE = ("model", "family", "engines", "installed")
_RULES = {
    "stretch": "stretched", "pad": "padded", "crop": "cut to its middle",
    "aspect": "in its own ratio", "tiles": "in tiles", "split": "in parts",
    "slices": "padded, and in slices", "base_tiles": "padded, and in tiles",
}  # fmt: skip


#: What is said of vectors of a model that was trained to write.
UNTRAINED = (
    "the model was not trained for search: compare with a model that was before you rely on them"
)


def run(name: str | None, config: Path | None, models: Path | None, *, as_json: bool) -> int:
    """Show one model, or list the catalogue.

    Raises:
      CtlError: there is no such model, installed or known.

    """
    known, broken = places.catalogue()
    installed = _installed(config, models)
    if name is None:
        rows = [_row(t, installed) for t in known.values()]
        if as_json:
            print(json.dumps({"models": rows, "warnings": broken}))
        else:
            shown = [row | {"engines": ", ".join(row["engines"])} for row in rows]
            print(render.table(shown, _CATALOGUE, colour=False))
            for text in broken:
                print(f"warning: {render.plain(text)}")
        return 0
    if name in installed:
        told = of_model(installed[name])
    elif "/" in name:
        from rkvlmd.ctl import checking

        told = of_model(_open(checking.find(name, config, models)))
    elif name in known:
        told = of_template(known[name])
    else:
        have = ", ".join(installed) or "none"
        message = (
            f"there is no model {name}; installed are: {have}; rkvlmctl show lists the catalogue"
        )
        raise CtlError(message, code="model_not_found", param="NAME")
    print(json.dumps(told) if as_json else for_people(told))
    return 0


def _installed(config: Path | None, models: Path | None) -> dict[str, Entry]:
    from rkvlmd.models import catalog

    return catalog.scan(places.models_folder(config, models), demo=True)[0]


def _open(folder: Path) -> Entry:
    from rkvlmd.errors import ManifestError
    from rkvlmd.models import catalog

    try:
        return catalog.open_folder(folder)
    except ManifestError as exc:
        raise CtlError("; ".join(exc.problems), code="invalid_model", param="NAME") from None


def _row(template: Template, installed: dict[str, Entry]) -> dict[str, Any]:
    return {
        "model": template.model,
        "title": template.title,
        "family": template.family,
        "engines": list(template.engines()),
        "installed": template.model in installed,
    }


def of_model(entry: Entry) -> dict[str, Any]:
    """Return what is to be told of an installed model; keys as ``--json`` prints them."""
    manifest = entry.manifest
    decoder = manifest.decoder
    told: dict[str, Any] = {
        "name": entry.name,
        "description": manifest.description,
        "family": manifest.family,
        "folder": str(entry.folder),
        "engines": _engines(manifest),
        "library_versions": list(decoder.runtime_versions),
        "context": decoder.context,
        "answer_tokens": manifest.defaults.max_tokens,
        "capabilities": list(manifest.capabilities),
        "answers": manifest.decoder.engine != "tower",
        "pictures": _pictures(manifest),
        "video": _video(manifest),
        "embeddings": _embeddings(manifest),
        "thinking": _thinking(manifest),
        "adapters": [f"{entry.name}:{adapter.name}" for adapter in decoder.adapters],
        "tokens_counted": manifest.tokenizer is not None,
        "template": manifest.template.file if manifest.template else f"of family {manifest.family}",
        "files_bytes": entry.bytes,
        "cache_bytes": decoder.kv_bytes_per_token * decoder.context,
        "unverified": list(manifest.unverified),
        "installed": True,
    }
    told["warnings"] = _warnings(manifest)
    return told


def _thinking(manifest: Manifest) -> dict[str, Any] | None:
    """Return whether the model thinks aloud by itself, ``None`` as its answer where it may."""
    if manifest.thinking is None:
        return None
    unasked = manifest.defaults.enable_thinking
    if unasked is None and (manifest.template is None or manifest.thinking.system):
        unasked = False  # so do the templates of families, and models that are told in words
    return {"unasked": unasked}


def _embeddings(manifest: Manifest) -> dict[str, Any]:
    """Return what ``/v1/embeddings`` makes, or ``why`` it makes nothing."""
    how = manifest.embeddings
    if how is None:
        if manifest.decoder.engine == "onnx":
            why = "the decoder's file gives no hidden states; tools/export_onnx --hidden makes one"
        else:
            why = "rkvlm.json has no section embeddings"
        return {"of": [], "dimensions": 0, "why": why}
    return {
        "of": list(how.inputs),
        "dimensions": manifest.decoder.embedding,
        "trained": how.trained,
        "from": _origin(manifest, how),
    }


def _origin(manifest: Manifest, how: Embeddings) -> str:
    if manifest.decoder.engine == "tower":
        return "towers for texts and for pictures"
    which = {"last": "the last token", "first": "the first token", "mean": "all tokens"}[how.pool]
    return f"hidden states of {which}"


def _engines(manifest: Manifest) -> list[str]:
    return list(dict.fromkeys([*(e.engine for e in manifest.encoders), manifest.decoder.engine]))


def _pictures(manifest: Manifest) -> dict[str, Any] | None:
    """Return what becomes of pictures; ``None`` where the model takes none."""
    from rkvlmd.models import assembly, views

    if not manifest.encoders:
        return None
    examples = []
    for width, height in EXAMPLES:
        plan = views.plan(manifest, width, height)
        examples.append({
            "width": width, "height": height, "tokens": plan.tokens, "inputs": len(plan.views),
            "low": views.plan(manifest, width, height, "low").tokens,
            "high": views.plan(manifest, width, height, "high").tokens,
        })  # fmt: skip
    return {
        "several": "multi_image" in manifest.capabilities,
        "several_from": manifest.decoder.multi_image_from,
        "sizes": [_size(encoder) for encoder in manifest.encoders],
        "block": assembly.says(manifest),
        "tokens": examples,
        "most": (manifest.decoder.context - 1) // max(1, min(e["tokens"] for e in examples)),
    }


def _size(encoder: Encoder) -> str:
    rule = _RULES[encoder.resize.rule]
    if encoder.resize.rule == "aspect":
        return f"up to {encoder.resize.max_pixels} pixels, {rule}"
    if encoder.tile:
        return f"tiles of {encoder.width}x{encoder.height}"
    asked = " where a request says detail high" if encoder.resize.cut_at == "high" else ""
    return f"{encoder.width}x{encoder.height}, {rule}{asked}"


def _video(manifest: Manifest) -> dict[str, Any] | None:
    if "video" not in manifest.capabilities:
        return None
    from rkvlmd.models import films

    native = manifest.video is not None
    if native and manifest.decoder.engine == "onnx":
        native = films.of(manifest) is not None
    return {"native": native, "frames": manifest.video_frames}


def _warnings(manifest: Manifest) -> list[str]:
    found = [f"{key}: nobody has confirmed this value" for key in manifest.unverified]
    if manifest.tokenizer is None:
        found.append("tokenizer: there is none, so usage and context are estimated")
    since = manifest.decoder.multi_image_from
    if since and "multi_image" in manifest.capabilities:
        found.append(f"several pictures: only with librkllmrt.so {since} or later")
    return found


def of_template(template: Template) -> dict[str, Any]:
    """Return what the catalogue knows of a model that is not installed."""
    match = template.match
    return {
        "name": template.model,
        "description": template.title,
        "family": template.family,
        "checkpoint": template.checkpoint,
        "engines": list(template.engines()),
        "library_versions": list(template.versions("rkllm")),
        "capabilities": list(template.manifest.get("capabilities", [])),
        "answers": template.family != "clip",
        "encoder_sizes": [f"{w}x{h}" for w, h in match.sizes],
        "encoder_tokens": [match.tokens.of(w, h) for w, h in match.sizes] if match.tokens else [],
        "encoder_outputs": match.outputs if match.tokens else 0,
        "embedding": match.embedding,
        "embeddings": template.manifest.get("embeddings"),
        "sources": dict(template.sources),
        "unverified": list(template.unverified),
        "warnings": [f"{key}: nobody has confirmed this value" for key in template.unverified],
        "installed": False,
    }


def for_people(told: dict[str, Any]) -> str:
    """Return what is told, in lines."""
    lines = [f"{told['name']}: {told['description'] or told['family']}"]
    if not told["installed"]:
        lines.append("not installed; this is what the catalogue knows")

    def row(title: str, text: str) -> None:
        lines.append(f"  {title:<14}{text}")

    row("family", told["family"])
    versions = ", ".join(told["library_versions"])
    row("engines", ", ".join(told["engines"]) + (f"; librkllmrt.so {versions}" if versions else ""))
    can = [*(["text"] if told["answers"] else []), *told["capabilities"]]
    row("can", ", ".join(can))
    if told["installed"]:
        _installed_rows(told, row)
    else:
        row("published as", told["checkpoint"])
        pairs = zip(told["encoder_sizes"], told["encoder_tokens"], strict=True)
        row("encoders", ", ".join(f"{size} ({count} tokens)" for size, count in pairs) or "none")
    lines += [f"warning: {text}" for text in told["warnings"]]
    return "\n".join(render.plain(line) for line in lines)


def _vectors(made: dict[str, Any]) -> str:
    if not made["of"]:
        return f"none: {made['why']}"
    kinds = {"text": "texts", "image": "pictures"}
    of = " and ".join(kinds[kind] for kind in made["of"])
    text = f"of {of}, {made['dimensions']} floats, from {made['from']}"
    return text if made["trained"] else f"{text}; {UNTRAINED}"


def _installed_rows(told: dict[str, Any], row: Any) -> None:
    together = "prompt and answer together" if told["answers"] else "one text"
    row("context", f"{told['context']} tokens, {together}")
    pictures = told["pictures"]
    if pictures is None:
        row("pictures", "none")
    else:
        several = f"yes, {pictures['most']} at most" if pictures["several"] else "no"
        row("pictures", "; ".join(pictures["sizes"]))
        if pictures["block"]:
            row("given as", pictures["block"])
        row("several", several if told["answers"] else "no; one vector a picture")
        if not told["answers"]:
            pictures = pictures | {"tokens": []}
        same = len({(e["tokens"], e["low"], e["high"]) for e in pictures["tokens"]}) == 1
        for example in pictures["tokens"][: 1 if same else None]:
            size = "any size" if same else f"{example['width']}x{example['height']}"
            low = f", detail low {example['low']}" if example["low"] != example["tokens"] else ""
            high = f", high {example['high']}" if example["high"] != example["tokens"] else ""
            row("tokens", f"{example['tokens']} for a picture of {size}{low}{high}")
    if told["video"]:
        way = "natively" if told["video"]["native"] else "as pictures with their times"
        row("video", f"{told['video']['frames']} frames, {way}")
    row("embeddings", _vectors(told["embeddings"]))
    if told["thinking"]:
        ways = {True: "unless told not to", False: "when asked to", None: "as its template has it"}
        row("thinks", f"{ways[told['thinking']['unasked']]} (enable_thinking)")
    if told["adapters"]:
        row("adapters", ", ".join(told["adapters"]))
    row(
        "memory",
        f"{render.size(told['files_bytes'])} of files, {render.size(told['cache_bytes'])} of cache",
    )
    row("template", told["template"])
    row("tokens are", "counted" if told["tokens_counted"] else "estimated")
