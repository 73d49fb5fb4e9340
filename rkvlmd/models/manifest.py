"""``rkvlm.json``: a model folder described as data.

The structures here are the format; ``rkvlmd/data/rkvlm.schema.json`` is the
JSON Schema made from them (``python -m rkvlmd.models.manifest``), and a test
holds the two together.
"""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import msgspec

from rkvlmd.errors import ManifestError

FILE = "rkvlm.json"
SCHEMA = 1
#: Largest manifest that is read, bytes.
MAX_BYTES = 1 << 20
#: The last IOMMU domain that the NPU's driver has (0.9.8), and the longest context of RKLLM.
MAX_DOMAIN, MAX_RKLLM_CONTEXT = 15, 16384

Positive = Annotated[int, msgspec.Meta(ge=1)]
Natural = Annotated[int, msgspec.Meta(ge=0)]
# Python's $ also matches before a final line feed.
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$(?!\n)")]
Lease = Literal["npu", "cpu"]


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Resize(_Strict, frozen=True, kw_only=True):
    """How a picture becomes ``width`` x ``height`` pixels.

    ``stretch`` ignores the aspect ratio; ``pad`` keeps it and fills a centred
    square with ``fill`` (RGB).
    """

    rule: Literal["stretch", "pad"] = "stretch"
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    antialias: bool = True
    fill: tuple[Natural, Natural, Natural] = (127, 127, 127)


class Encoder(_Strict, frozen=True, kw_only=True):
    """A vision encoder: pixels to ``tokens`` rows of ``embedding`` floats.

    ``mean`` and ``std`` are on the 0..1 scale; ``baked`` says that the file
    does them itself and wants uint8 (0..255). ``outputs``: with several, a
    row holds ``outputs`` x ``embedding`` floats. ``core_mask`` chooses NPU
    cores, one bit each, 0 for the library's choice; default all that the SoC has.
    """

    modality: Literal["image"] = "image"
    engine: Literal["onnx", "rknn"]
    file: str
    sha256: Digest
    width: Positive
    height: Positive
    resize: Resize = msgspec.field(default_factory=Resize)
    colour: Literal["rgb", "bgr"] = "rgb"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    baked: bool = False
    layout: Literal["nchw", "nhwc"] = "nchw"
    tokens: Positive
    embedding: Positive
    outputs: Positive = 1
    core_mask: Natural | None = None
    lease: Lease = "cpu"


class File(_Strict, frozen=True, kw_only=True):
    """A file of the folder and its SHA-256 (hex)."""

    file: str
    sha256: Digest


class Adapter(_Strict, frozen=True, kw_only=True):
    """A LoRA adapter of the decoder; a request chooses it as ``MODEL:NAME``."""

    name: Name
    file: str
    sha256: Digest
    scale: float = 1.0


class Decoder(_Strict, frozen=True, kw_only=True):
    """A language decoder. ``files``: ``embed`` and ``decoder`` (ONNX), or ``model`` (RKLLM).

    ``context`` counts tokens, prompt and answer together. ``kv_bytes_per_token``
    is what one token costs in the key/value cache. For RKLLM: ``npu_cores``
    that the file was converted for, ``runtime_versions`` that it works with
    (empty: any), ``cpu_mask`` one bit a CPU, ``n_keep`` positions that stay
    when the window shifts, ``embed_flash`` reads the embeddings from storage;
    what is not given is the library's default. ``prompt_cache`` is the text
    with which prompts of this model begin, its template applied: it is
    computed once and kept in the state folder. ``input`` ``embeddings`` gives
    the library rows instead of text, for models whose positions allow it:
    ``files`` then has ``embed``, an ``.npy`` of (vocabulary, embedding) in
    float16 or float32, or in int8 with ``embed_scale``, float32 one a row.
    """

    engine: Literal["onnx", "rkllm"]
    files: dict[str, File]
    context: Positive
    kv_bytes_per_token: Natural = 0
    embedding: Positive
    npu_cores: Natural = 0
    runtime_versions: tuple[str, ...] = ()
    iommu_domain: Natural | None = None
    cpu_mask: Positive | None = None
    n_keep: int | None = None
    embed_flash: bool | None = None
    adapters: tuple[Adapter, ...] = ()
    prompt_cache: str = ""
    input: Literal["text", "embeddings"] = "text"
    lease: Lease = "cpu"


class Tags(_Strict, frozen=True, kw_only=True):
    """What stands around a picture in the prompt; ``content`` is repeated per image token."""

    start: str = ""
    content: str
    end: str = ""


class Defaults(_Strict, frozen=True, kw_only=True):
    """Used where a request says nothing."""

    max_tokens: Positive | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] = 0.0
    top_k: Natural = 0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=2)] = 1.0
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] = 0.0


class Manifest(_Strict, frozen=True, kw_only=True):
    """One model. ``marker`` is what the template writes at a picture's place.

    ``special_strings`` are the strings that the tokenizer would take for
    special tokens, and that users must not be able to write. ``unverified``
    names the keys whose value nobody has confirmed.
    """

    schema: Literal[1]
    name: Name
    family: Name
    description: str = ""
    encoders: tuple[Encoder, ...] = ()
    decoder: Decoder
    tokenizer: File | None = None
    template: File | None = None
    image: Tags | None = None
    marker: str = "<image>"
    special_strings: tuple[str, ...] = ()
    stop_ids: tuple[Natural, ...] = ()
    defaults: Defaults = msgspec.field(default_factory=Defaults)
    capabilities: tuple[Literal["image", "multi_image", "video", "tools", "thinking"], ...] = ()
    unverified: tuple[str, ...] = ()


def parse(data: bytes, name: str = "model") -> Manifest:
    """Parse and check the bytes of a manifest.

    Raises:
      ManifestError: with every problem that could be told apart, each with its key.

    """
    if len(data) > MAX_BYTES:
        raise ManifestError(name, [f"{FILE}: more than {MAX_BYTES} bytes"])
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ManifestError(name, [f"{FILE}: {exc}"]) from exc
    problems = list(_check(manifest))
    if problems:
        raise ManifestError(manifest.name, problems)
    return manifest


def _check(m: Manifest) -> list[str]:
    problems = []
    for key, entry in files(m).items():
        path = PurePosixPath(entry.file)
        if path.is_absolute() or ".." in path.parts or not entry.file:
            problems.append(f"{key}.file: must lie inside the model folder")
    if m.encoders and m.image is None:
        problems.append("image: a model with encoders needs the tags of a picture")
    for i, encoder in enumerate(m.encoders):
        if encoder.embedding != m.decoder.embedding:
            problems.append(
                f"encoders[{i}].embedding: {encoder.embedding}, but decoder.embedding is"
                f" {m.decoder.embedding}"
            )
        if any(s <= 0 for s in encoder.std):
            problems.append(f"encoders[{i}].std: must be above 0")
        if encoder.tokens >= m.decoder.context:
            problems.append(f"encoders[{i}].tokens: do not fit decoder.context")
        if max(encoder.resize.fill) > 255:
            problems.append(f"encoders[{i}].resize.fill: must be at most 255")
        if encoder.engine == "rknn" and not (encoder.baked and encoder.layout == "nhwc"):
            problems.append(
                f"encoders[{i}].baked, .layout: an rknn encoder takes uint8, channels last:"
                " baked = true, layout = nhwc"
            )
    need = {"onnx": {"embed", "decoder"}, "rkllm": {"model"}}[m.decoder.engine]
    if missing := need - set(m.decoder.files):
        problems.append(f"decoder.files: missing {', '.join(sorted(missing))}")
    if m.decoder.engine == "onnx":
        problems += [f"{k}: needed by the onnx engine" for k in ("tokenizer", "template")
                     if getattr(m, k) is None]  # fmt: skip
    else:
        problems += _check_rkllm(m)
    if "image" in m.capabilities and not m.encoders:
        problems.append("capabilities: image without an encoder")
    return problems


def _check_rkllm(m: Manifest) -> list[str]:
    problems = []
    decoder = m.decoder
    # The runtime pins one thread a core of the NPU at least, and refuses fewer CPUs.
    if decoder.cpu_mask is not None and decoder.cpu_mask.bit_count() < decoder.npu_cores:
        problems.append(
            f"decoder.cpu_mask: has {decoder.cpu_mask.bit_count()} CPUs, but decoder.npu_cores is"
            f" {decoder.npu_cores}"
        )
    if decoder.iommu_domain is not None and decoder.iommu_domain > MAX_DOMAIN:
        problems.append(f"decoder.iommu_domain: must be at most {MAX_DOMAIN}")
    if decoder.context > MAX_RKLLM_CONTEXT:
        problems.append(f"decoder.context: must be at most {MAX_RKLLM_CONTEXT} for rkllm")
    if len({adapter.name for adapter in decoder.adapters}) < len(decoder.adapters):
        problems.append("decoder.adapters: two have the same name")
    if decoder.adapters and decoder.prompt_cache:
        problems.append("decoder.prompt_cache: would be wrong for decoder.adapters")
    if decoder.input == "embeddings":
        if "embed" not in decoder.files or m.tokenizer is None:
            problems.append("decoder.input: embeddings need decoder.files.embed and a tokenizer")
        if any(encoder.outputs > 1 for encoder in m.encoders) or decoder.prompt_cache:
            problems.append("decoder.input: embeddings allow one output and no prompt_cache")
    return problems


def files(manifest: Manifest) -> dict[str, File]:
    """Return every file that the manifest names, by its key."""
    found = {
        f"encoders[{i}]": File(file=e.file, sha256=e.sha256)
        for i, e in enumerate(manifest.encoders)
    }
    found |= {f"decoder.files.{k}": v for k, v in manifest.decoder.files.items()}
    found |= {
        f"decoder.adapters[{i}]": File(file=a.file, sha256=a.sha256)
        for i, a in enumerate(manifest.decoder.adapters)
    }
    if manifest.tokenizer is not None:
        found["tokenizer"] = manifest.tokenizer
    if manifest.template is not None:
        found["template"] = manifest.template
    return found


def to_builtins(manifest: Manifest | Encoder) -> dict[str, Any]:
    """Return a manifest, or an encoder of one, as plain JSON values, for a frame or a file."""
    built: dict[str, Any] = msgspec.to_builtins(manifest)
    return built


def from_builtins(tree: dict[str, Any]) -> Manifest:
    """Undo ``to_builtins``."""
    return msgspec.convert(tree, Manifest)


def digest(manifest: Manifest) -> str:
    """Return a SHA-256 (hex) that changes with anything the manifest says, hashes included."""
    return hashlib.sha256(msgspec.json.encode(manifest, order="deterministic")).hexdigest()


def preparation_key(encoder: Encoder) -> str:
    """Return a SHA-256 (hex) over all that makes the rows of a picture: pixels and encoder file."""
    return hashlib.sha256(msgspec.json.encode(encoder, order="deterministic")).hexdigest()


def file_problems(manifest: Manifest, folder: Path) -> list[str]:
    """Return which files are missing or empty; reads no contents."""
    problems = []
    for key, entry in files(manifest).items():
        path = folder / entry.file
        if not path.is_file():
            problems.append(f"{key}.file: {entry.file} is missing")
        elif path.stat().st_size == 0:
            problems.append(f"{key}.file: {entry.file} is empty")
    return problems


def json_schema() -> bytes:
    """Return the JSON Schema of ``rkvlm.json``, indented."""
    schema = msgspec.json.schema(Manifest)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "rkvlm.json"
    return msgspec.json.format(msgspec.json.encode(schema), indent=2) + b"\n"


if __name__ == "__main__":
    import sys

    sys.stdout.buffer.write(json_schema())
