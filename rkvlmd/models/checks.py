"""What the parts of a manifest must agree on, beyond the types of their fields."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from rkvlmd.models import assembly, families, rkllm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rkvlmd.models.manifest import Encoder, File, Manifest, Tags

#: The last IOMMU domain that the NPU's driver has (0.9.8), and the longest context of RKLLM.
MAX_DOMAIN, MAX_RKLLM_CONTEXT = 15, 16384
#: ``CPU0`` to ``CPU7`` of rkllm.h, and ``NPU_CORE_ALL`` of rknn-toolkit-lite2.
MAX_CPU_MASK, MAX_CORE_MASK = 0xFF, 0xFFFF
#: Largest factor of a LoRA adapter; usual ones are around 1.
MAX_SCALE = 1000
#: Largest finite float32.
MAX_FLOAT = 3.4e38
#: Longest side of an encoder's input, pixels; the published ones have up to 1024.
MAX_SIDE = 1 << 14
#: Most tiles of one picture; the published models cut 12 or fewer, SmolVLM up to 64.
MAX_TILES = 64
#: Rules that make several views of a picture.
CUTTING = frozenset({"tiles", "split", "slices", "base_tiles"})


def problems(m: Manifest, named: Mapping[str, File]) -> list[str]:
    """Return what does not fit together, each with its key; ``named`` are the files by key."""
    problems = []
    for key, entry in named.items():
        path = PurePosixPath(entry.file)
        if path.is_absolute() or ".." in path.parts or not entry.file:
            problems.append(f"{key}.file: must lie inside the model folder")
    if m.encoders and m.image is None and m.decoder.engine != "tower":
        problems.append("image: a model with encoders needs the tags of a picture")
    for i, encoder in enumerate(m.encoders):
        if m.decoder.cross_attention is None and encoder.embedding != m.decoder.embedding:
            problems.append(
                f"encoders[{i}].embedding: {encoder.embedding}, but decoder.embedding is"
                f" {m.decoder.embedding}"
            )
        if any(s <= 0 for s in encoder.std):
            problems.append(f"encoders[{i}].std: must be above 0")
        if max(encoder.width, encoder.height) > MAX_SIDE:
            problems.append(f"encoders[{i}].width, .height: must be at most {MAX_SIDE} pixels")
        if (encoder.core_mask or 0) > MAX_CORE_MASK:
            problems.append(f"encoders[{i}].core_mask: must be at most {MAX_CORE_MASK:#x}")
        if encoder.tokens >= m.decoder.context:
            problems.append(f"encoders[{i}].tokens: do not fit decoder.context")
        if max(encoder.resize.fill) > 255:
            problems.append(f"encoders[{i}].resize.fill: must be at most 255")
        problems += [f"encoders[{i}].{text}" for text in _check_resize(encoder)]
        if encoder.engine == "rknn" and not (encoder.baked and encoder.layout == "nhwc"):
            problems.append(
                f"encoders[{i}].baked, .layout: an rknn encoder takes uint8, channels last:"
                " baked = true, layout = nhwc"
            )
    need = {"onnx": {"embed", "decoder"}, "rkllm": {"model"}, "tower": {"text"}}[m.decoder.engine]
    if missing := need - set(m.decoder.files):
        problems.append(f"decoder.files: missing {', '.join(sorted(missing))}")
    if m.decoder.engine == "onnx":
        problems += [f"{k}: needed by the onnx engine" for k in ("tokenizer", "template")
                     if getattr(m, k) is None]  # fmt: skip
    elif m.decoder.engine == "tower":
        problems += ["tokenizer: needed by a text tower"] if m.tokenizer is None else []
    else:
        problems += _check_rkllm(m)
    problems += _check_cross_attention(m)
    if m.encoders and all(encoder.tile for encoder in m.encoders):
        problems.append("encoders: one at least must take whole pictures (tile = false)")
    cuts = any(encoder.resize.rule == "base_tiles" for encoder in m.encoders)
    if cuts and not any(encoder.tile for encoder in m.encoders):
        problems.append(
            "encoders: base_tiles needs an encoder with tile = true, which sees the tiles"
        )
    if m.decoder.deepstack and any(
        encoder.outputs != 1 + len(m.decoder.deepstack) for encoder in m.encoders
    ):
        problems.append("decoder.deepstack: one layer for each output after the first")
    if "image" in m.capabilities and not m.encoders:
        problems.append("capabilities: image without an encoder")
    if ("thinking" in m.capabilities) != (m.thinking is not None):
        problems.append("thinking: needs the capability of that name, which needs this section")
    if m.thinking is not None and (
        m.thinking.start in m.thinking.end or m.thinking.end in m.thinking.start
    ):
        problems.append("thinking.start, .end: must not be parts of each other")
    return problems + assembly.problems(m) + _check_embeddings(m)


def _check_embeddings(m: Manifest) -> list[str]:
    made = m.embeddings
    if made is None:
        return [f"{key}: embeddings are not described" for key, needs in (
            ("capabilities", "embeddings" in m.capabilities),
            ("decoder.engine", m.decoder.engine == "tower"),
        ) if needs]  # fmt: skip
    problems = []
    if "embeddings" not in m.capabilities:
        problems.append("embeddings: not among the capabilities")
    if not made.inputs:
        problems.append("embeddings.inputs: must name one kind at least")
    if "image" in made.inputs and not m.encoders:
        problems.append("embeddings.inputs: image without an encoder")
    if m.decoder.engine == "tower" and made.pictures != "rows":
        problems.append("embeddings.pictures: must be rows where the decoder is a text tower")
    if made.pictures == "rows" and any(encoder.outputs > 1 for encoder in m.encoders):
        problems.append("embeddings.pictures: rows need encoders with one output")
    return problems


def _check_resize(encoder: Encoder) -> list[str]:
    problems = []
    resize, side = encoder.resize, max(encoder.width, encoder.height)
    across = -(-resize.longest // side)
    if resize.min_tiles > resize.max_tiles or resize.max_tiles > MAX_TILES:
        problems.append(f"resize.min_tiles, .max_tiles: must be in order, and at most {MAX_TILES}")
    if resize.rule == "aspect":
        least, most = resize.min_pixels, resize.max_pixels
        if not resize.multiple or not resize.multiple**2 <= least <= most:
            problems.append(
                "resize.multiple, .min_pixels, .max_pixels: aspect needs all three, in order,"
                " and room for one multiple squared"
            )
    elif resize.cut_at != "auto" and resize.rule not in CUTTING:
        problems.append(f"resize.cut_at: means nothing to {resize.rule}, which cuts nothing")
    elif resize.multiple and resize.rule != "slices":
        problems.append(f"resize.multiple: means nothing to {resize.rule}")
    if resize.multiple and encoder.engine == "rknn":
        problems.append("resize.multiple: an rknn encoder has one size")
    if resize.rule == "split" and (
        encoder.width != encoder.height or not 1 <= across**2 <= MAX_TILES
    ):
        problems.append(f"resize.longest: must make 1 to {MAX_TILES} squares of the input's size")
    if resize.rule == "crop" and resize.short and resize.short < side:
        problems.append("resize.short: must be at least the input's sides")
    if encoder.tile and resize.rule not in {"stretch", "pad"}:
        problems.append("tile: such an encoder cuts nothing itself")
    return problems + _check_patches(encoder)


def _check_patches(encoder: Encoder) -> list[str]:
    resize, patches = encoder.resize, encoder.patches
    if patches is None:
        return []
    problems = []
    unit = patches.size * patches.merge
    sides = [resize.multiple] if resize.multiple else [encoder.width, encoder.height]
    if any(side % unit for side in sides):
        problems.append(f"patches: the sides must be multiples of {unit} pixels")
    most = resize.max_pixels if resize.rule == "aspect" else encoder.width * encoder.height
    if most // unit**2 > encoder.tokens:
        problems.append(f"tokens: must be at least {most // unit**2}, those of the largest picture")
    if encoder.baked or encoder.engine == "rknn":
        problems.append("patches: are floats of the onnx engine")
    return problems


def _check_library_views(m: Manifest) -> list[str]:
    """Check that the library can take what is cut: it puts the tags around each view itself."""
    problems: list[str] = []
    cutting = [e for e in m.encoders if e.resize.rule in CUTTING]
    if m.assembly is not None or m.decoder.input == "embeddings":
        # One place for all views, or rows in place of a text: the library cuts and puts nothing.
        return problems
    if cutting and m.image is not None and (m.image.start or m.image.end):
        problems.append(
            f"image.start, .end: must be empty for {cutting[0].resize.rule} with rkllm: the family"
            " writes them"
        )
    if cutting and m.image is not None:
        problems += _check_words(m.family, m.image, cutting[0].resize.rule)
    tiles = [e.tokens for e in m.encoders if e.tile]
    if any(e.resize.rule == "base_tiles" and e.tokens not in tiles for e in cutting):
        problems.append("encoders: rkllm needs as many tokens of a tile as of the whole picture")
    return problems


def _check_words(family: str, tags: Tags, rule: str) -> list[str]:
    """Check that a family's own words between views are none that the library expands."""
    # These know the manifest, and so must come after it.
    from rkvlmd.models import geometry, prompt

    if family not in families.known():
        return []
    place = geometry.Place(0, 0, 1, 1)
    cuts = geometry.Cuts((geometry.Cut(((1, 1),), place),) * 3, 1, 2, 0)
    words = "".join(i for i in families.get(family).layout(tags, cuts) if isinstance(i, str))
    return [
        f"decoder.input: must be embeddings for {rule} with this family: it writes {place} before"
        " a part of a picture, which librkllmrt takes for a picture itself. That needs"
        " decoder.files.embed (embed.npy: the checkpoint's table of token embeddings) and a"
        " tokenizer"
        for place in prompt.RKLLM_PLACES
        if place in words
    ]


def _check_rkllm(m: Manifest) -> list[str]:
    problems = []
    decoder = m.decoder
    # The runtime pins one thread a core of the NPU at least, and refuses fewer CPUs.
    if decoder.cpu_mask is not None and decoder.cpu_mask.bit_count() < decoder.npu_cores:
        problems.append(
            f"decoder.cpu_mask: has {decoder.cpu_mask.bit_count()} CPUs, but decoder.npu_cores is"
            f" {decoder.npu_cores}"
        )
    # What does not fit the library's fields would arrive as another number.
    if (decoder.cpu_mask or 0) > MAX_CPU_MASK:
        problems.append(f"decoder.cpu_mask: must be at most {MAX_CPU_MASK:#x}, one bit a CPU")
    if decoder.n_keep is not None and not -1 <= decoder.n_keep <= decoder.context:
        problems.append("decoder.n_keep: must be from -1 to decoder.context")
    if decoder.prompt_cache:
        problems += _check_prompt_cache(decoder.prompt_cache)
    if decoder.iommu_domain is not None and decoder.iommu_domain > MAX_DOMAIN:
        problems.append(f"decoder.iommu_domain: must be at most {MAX_DOMAIN}")
    if decoder.context > MAX_RKLLM_CONTEXT:
        problems.append(f"decoder.context: must be at most {MAX_RKLLM_CONTEXT} for rkllm")
    problems += _check_library_views(m)
    problems += [
        f"decoder.adapters[{i}].scale: must be from -{MAX_SCALE} to {MAX_SCALE}, and not nearer to"
        f" 0 than {rkllm.LEAST:g} unless it is 0"
        for i, adapter in enumerate(decoder.adapters)
        if adapter.scale and not rkllm.LEAST <= abs(adapter.scale) <= MAX_SCALE
    ]
    if len({adapter.name for adapter in decoder.adapters}) < len(decoder.adapters):
        problems.append("decoder.adapters: two have the same name")
    if decoder.adapters and decoder.prompt_cache:
        problems.append("decoder.prompt_cache: would be wrong for decoder.adapters")
    if decoder.input == "tokens" and (m.encoders or m.tokenizer is None or decoder.prompt_cache):
        problems.append("decoder.input: tokens need a tokenizer, no encoder and no prompt_cache")
    if decoder.input == "embeddings":
        if "embed" not in decoder.files or m.tokenizer is None:
            problems.append("decoder.input: embeddings need decoder.files.embed and a tokenizer")
        if any(encoder.outputs > 1 for encoder in m.encoders) or decoder.prompt_cache:
            problems.append("decoder.input: embeddings allow one output and no prompt_cache")
    return problems


def _check_prompt_cache(text: str) -> list[str]:
    """Check that the library finds no place of a picture in a text that goes there as it is."""
    from rkvlmd.models import prompt  # knows the manifest, and so must come after it

    return [
        f"decoder.prompt_cache: must not hold {place}, which librkllmrt takes for a picture or sound"
        for place in prompt.RKLLM_PLACES
        if place in text
    ]


def _check_cross_attention(m: Manifest) -> list[str]:
    shape = m.decoder.cross_attention
    if shape is None:
        return []
    problems = []
    if not abs(shape.mask) <= MAX_FLOAT:
        problems.append(
            f"decoder.cross_attention.mask: must be from -{MAX_FLOAT:g} to {MAX_FLOAT:g}"
        )
    floats = shape.layers * shape.kv_heads * shape.head_dim
    for i, encoder in enumerate(m.encoders):
        if (encoder.engine, encoder.outputs, encoder.embedding) != ("rknn", 2, floats):
            problems.append(
                f"encoders[{i}].engine, .outputs, .embedding: cross_attention needs rknn, 2 and"
                f" layers x kv_heads x head_dim = {floats}"
            )
    if m.decoder.engine != "rkllm" or m.decoder.input != "text" or m.decoder.prompt_cache:
        problems.append(
            "decoder.cross_attention: is for rkllm, with input = text and no prompt_cache"
        )
    return problems
