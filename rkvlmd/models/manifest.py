"""``rkvlm.json``: a model folder described as data.

The structures here are the format; ``rkvlmd/data/rkvlm.schema.json`` is the
JSON Schema made from them (``python -m rkvlmd.models.manifest``), and a test
holds the two together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from rkvlmd.errors import ManifestError
from rkvlmd.models import checks
from rkvlmd.models.answers import Defaults as Defaults
from rkvlmd.models.answers import Thinking as Thinking
from rkvlmd.models.tags import Tags as Tags
from rkvlmd.models.tags import Video as Video

FILE = "rkvlm.json"
SCHEMA = 1
#: Largest manifest that is read, bytes.
MAX_BYTES = 1 << 20

Positive = Annotated[int, msgspec.Meta(ge=1)]
Natural = Annotated[int, msgspec.Meta(ge=0)]
# Python's $ also matches before a final line feed.
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$(?!\n)")]
Lease = Literal["npu", "cpu"]


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Resize(_Strict, frozen=True, kw_only=True):
    """How a picture becomes one or more inputs of ``width`` x ``height`` pixels.

    One input: ``stretch`` ignores the aspect ratio; ``pad`` keeps it and fills
    a centred rectangle with ``fill`` (RGB), the picture's short side at least
    ``short`` pixels; ``crop`` makes the short side
    ``short`` pixels (0: as the input) and takes the centre; ``aspect`` keeps
    the ratio and makes each side a multiple of ``multiple`` with ``min_pixels``
    to ``max_pixels`` in all, for encoders of any size.

    Several: ``tiles`` cuts a grid of ``min_tiles`` to ``max_tiles`` inputs that
    suits the ratio, and puts the whole picture after them with ``thumbnail``
    (InternVL); ``split`` cuts as many inputs as a long side of ``longest``
    pixels has, and puts the whole picture after them (SmolVLM, Idefics3);
    ``slices`` puts the whole picture first, then at most ``max_tiles`` slices
    (MiniCPM-V); ``base_tiles`` cuts ``min_tiles`` to ``max_tiles`` tiles for
    the encoder with ``tile``, and pads the whole picture for this one
    (DeepSeek-OCR). ``aspect`` and ``slices`` with ``multiple``: sizes differ
    from picture to picture. ``cut_at`` ``high``: only a request with ``detail``
    ``high`` has its pictures cut, as each part costs an encode.
    """

    rule: Literal[
        "stretch", "pad", "crop", "aspect", "tiles", "split", "slices", "base_tiles"
    ] = "stretch"  # fmt: skip
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    antialias: bool = True
    fill: tuple[Natural, Natural, Natural] = (127, 127, 127)
    short: Natural = 0
    multiple: Natural = 0
    min_pixels: Natural = 0
    max_pixels: Natural = 0
    longest: Natural = 0
    min_tiles: Positive = 1
    max_tiles: Positive = 1
    thumbnail: bool = False
    cut_at: Literal["auto", "high"] = "auto"


class Patches(_Strict, frozen=True, kw_only=True):
    """An input of flattened patches, (patches, 3 x ``temporal`` x ``size`` x ``size``) floats.

    A patch is ``size`` pixels square; a picture is repeated ``temporal`` times.
    ``merge`` x ``merge`` neighbours are one row of the output, and follow each
    other in the input. The encoder is told the grid (t, h, w) in patches.
    """

    size: Positive
    temporal: Positive = 1
    merge: Positive = 1


class Encoder(_Strict, frozen=True, kw_only=True):
    """A vision encoder: pixels to ``tokens`` rows of ``embedding`` floats.

    ``mean`` and ``std`` are on the 0..1 scale; ``baked`` says that the file
    does them itself and wants uint8 (0..255). ``outputs``: with several, a
    row holds ``outputs`` x ``embedding`` floats. ``core_mask`` chooses NPU
    cores, one bit each, 0 for the library's choice; default all that the SoC has.
    Where the size differs from picture to picture, ``width``, ``height`` and
    ``tokens`` are those of the largest. ``tile``: sees only what the rule of
    another encoder cuts. ``projector`` is a second file that takes the rows of
    the first; ``data`` are the files that hold weights outside the ONNX file.
    Of several others the first is for ``detail`` ``auto``,
    the one with the fewest tokens for ``low``, with the most for ``high``.
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
    patches: Patches | None = None
    tile: bool = False
    tokens: Positive
    embedding: Positive
    outputs: Positive = 1
    projector: File | None = None
    data: tuple[File, ...] = ()
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


class CrossAttention(_Strict, frozen=True, kw_only=True):
    """What the encoder's key/value caches look like, for a decoder that attends to them.

    A row of such an encoder holds the keys of one token, ``layers`` x
    ``kv_heads`` x ``head_dim`` floats (its ``embedding``), then its values: it
    has two outputs. A picture is one token of the prompt. ``mask`` is what the
    library is told of a token that is there.
    """

    layers: Positive
    kv_heads: Positive
    head_dim: Positive
    mask: float = 1.0


class Decoder(_Strict, frozen=True, kw_only=True):
    """A language decoder. ``files``: ``embed`` and ``decoder`` (ONNX), or ``model`` (RKLLM).

    Engine ``tower`` generates nothing: it is the text side of a model such as
    CLIP, for embeddings alone, an ONNX file ``text`` from token ids to vectors.

    ONNX with one file for an empty cache and one for a filled one: ``decoder``
    is the second, ``decoder_prefill`` the first. Files of weights outside the
    ONNX files have any other key, such as ``decoder_data``.

    ``context`` counts tokens, prompt and answer together. ``kv_bytes_per_token``
    is what one token costs in the key/value cache. For RKLLM: ``npu_cores``
    that the file was converted for, ``runtime_versions`` that it works with
    (empty: any), ``cpu_mask`` one bit a CPU, ``n_keep`` positions that stay
    when the window shifts, ``embed_flash`` reads the embeddings from storage;
    what is not given is the library's default. ``prompt_cache`` is the text
    with which prompts of this model begin, its template applied: it is
    computed once and kept in the state folder. ``input`` ``tokens`` gives the
    library a text model's tokens as our tokenizer makes them, not text.
    ``embeddings`` gives it rows, for models whose positions allow it:
    ``files`` then has ``embed``, an ``.npy`` of (vocabulary, embedding) in
    float16 or float32, or in int8 with ``embed_scale``, float32 one a row.
    ``rope``: ``mrope`` gives each token three positions (time, row, column).
    ``deepstack`` are the layers after which the second and further outputs of
    the encoder are added to the picture's places, one layer an output.
    ``multi_image_from`` is the first version of the RKLLM library that keeps
    several pictures of this model apart (empty: all that it works with do).
    ``cross_attention``: the model reads pictures beside its prompt.
    """

    engine: Literal["onnx", "rkllm", "tower"]
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
    input: Literal["text", "tokens", "embeddings"] = "text"
    rope: Literal["plain", "mrope"] = "plain"
    deepstack: tuple[Natural, ...] = ()
    multi_image_from: Annotated[
        str, msgspec.Meta(pattern=r"^(\d{1,3}\.\d{1,3}\.\d{1,3})?$(?!\n)")
    ] = ""
    cross_attention: CrossAttention | None = None
    lease: Lease = "cpu"


class Assembly(_Strict, frozen=True, kw_only=True):
    """All views of a picture are one block of rows (``models.assembly``; DeepSeek-OCR).

    ``square`` x ``square`` pixels of a view are one row. ``rows`` is an
    ``.npy`` file, (2, embedding) in float16 or float32: the end of a line and
    the end of a picture, where the encoder of whole pictures gives none itself.
    """

    square: Positive
    rows: File | None = None


class Embeddings(_Strict, frozen=True, kw_only=True):
    """What ``/v1/embeddings`` gives: one vector of ``decoder.embedding`` floats for each input.

    ``inputs`` says of what. Texts become the decoder's last hidden states, of
    the ``last`` token, the ``first``, or the ``mean`` of all; pictures too
    (``hidden``), or the ``rows`` of their encoder, pooled alike. ``normalise``
    brings the vector to length one. ``shorter``: its beginning is useful alone,
    so that a request may ask for fewer ``dimensions``. ``output`` names the
    output of an ONNX decoder that holds the hidden states; ``template`` is
    applied in place of the chat template. ``trained``: the model was trained to
    make vectors that are compared, as CLIP was; hidden states of a model that
    was trained to write are of some use, but nobody made them for search.
    """

    inputs: tuple[Literal["text", "image"], ...] = ("text",)
    pool: Literal["last", "first", "mean"] = "last"
    pictures: Literal["hidden", "rows"] = "hidden"
    normalise: bool = True
    shorter: bool = False
    trained: bool = False
    output: str = "hidden_states"
    template: File | None = None


class Manifest(_Strict, frozen=True, kw_only=True):
    """One model. ``marker`` is what the template writes at a picture's place.

    ``video`` are the tags of a model that takes frames as a video of its own;
    ``video_frames`` is the most frames that are sampled from one.
    ``thinking``: it may think aloud. ``special_strings`` are the strings that
    the tokenizer would take for special tokens, and that users must not be able to write. ``unverified``
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
    video: Video | None = None
    video_frames: Positive = 8
    embeddings: Embeddings | None = None
    assembly: Assembly | None = None
    marker: str = "<image>"
    special_strings: tuple[str, ...] = ()
    stop_ids: tuple[Natural, ...] = ()
    thinking: Thinking | None = None
    defaults: Defaults = msgspec.field(default_factory=Defaults)
    capabilities: tuple[
        Literal["image", "multi_image", "video", "tools", "thinking", "embeddings"], ...
    ] = ()
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
    problems = checks.problems(manifest, files(manifest))
    if problems:
        raise ManifestError(manifest.name, problems)
    return manifest


def files(manifest: Manifest) -> dict[str, File]:
    """Return every file that the manifest names, by its key."""
    found = {
        f"encoders[{i}]": File(file=e.file, sha256=e.sha256)
        for i, e in enumerate(manifest.encoders)
    }
    for i, e in enumerate(manifest.encoders):
        if e.projector is not None:
            found[f"encoders[{i}].projector"] = e.projector
        found |= {f"encoders[{i}].data[{n}]": data for n, data in enumerate(e.data)}
    found |= {f"decoder.files.{k}": v for k, v in manifest.decoder.files.items()}
    found |= {
        f"decoder.adapters[{i}]": File(file=a.file, sha256=a.sha256)
        for i, a in enumerate(manifest.decoder.adapters)
    }
    if manifest.assembly is not None and manifest.assembly.rows is not None:
        found["assembly.rows"] = manifest.assembly.rows
    if manifest.tokenizer is not None:
        found["tokenizer"] = manifest.tokenizer
    if manifest.template is not None:
        found["template"] = manifest.template
    if manifest.embeddings is not None and manifest.embeddings.template is not None:
        found["embeddings.template"] = manifest.embeddings.template
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
    return _sha256(manifest)


def preparation_key(encoder: Encoder) -> str:
    """Return a SHA-256 (hex) over all that makes the rows of a picture: pixels and encoder file."""
    return _sha256(encoder)


def _sha256(described: Manifest | Encoder) -> str:
    import hashlib  # brings OpenSSL, which an encoder child has no use for

    return hashlib.sha256(msgspec.json.encode(described, order="deterministic")).hexdigest()


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
