"""What the daemon and its children say to each other, as frames (``wire.frames``).

A child says ``hello`` at once. Engine children (encoder, decoder) then get one
``load`` and answer with ``progress`` and ``ready`` or ``failed`` (id 0); a prep
child is ready after ``hello``. From then on each order carries an ``id`` and
ends in exactly one ``*_done`` or ``failed`` with that id; a child works on one
order at a time. ``beat`` comes from the child's main thread, once a second
while an order or a load is in hand. ``abort`` names an order that runs; the
child still ends it, a generation with ``generate_done`` and reason ``aborted``.

Pixels, embeddings and pictures cross as sealed memfds beside the frame; its
``fds`` counts them. End of file on the socket means: leave.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar, get_args

import msgspec

from rkvlmd.wire.child_prep import Frames as Frames
from rkvlmd.wire.child_prep import Laid as Laid
from rkvlmd.wire.child_prep import Picture as Picture
from rkvlmd.wire.child_prep import PictureDone as PictureDone
from rkvlmd.wire.child_prep import Render as Render
from rkvlmd.wire.child_prep import RenderDone as RenderDone
from rkvlmd.wire.child_prep import Video as Video
from rkvlmd.wire.child_prep import VideoDone as VideoDone
from rkvlmd.wire.child_prep import View as View
from rkvlmd.wire.message import Message, Natural
from rkvlmd.wire.message import Tensor as Tensor
from rkvlmd.wire.thinking import Thinking

PROTOCOL = 1

# --- daemon -> child ---------------------------------------------------------------


class Load(Message, frozen=True, tag="load", kw_only=True):
    """Load a model's part. ``folder`` is the model's directory.

    ``manifest`` is the whole ``rkvlm.json`` as parsed (``models.manifest``);
    ``part`` the index into ``encoders`` (an encoder child). ``options`` come
    from the settings: ``threads``; for the NPU engines also ``library``,
    ``layout``, ``soc``, ``sampling`` (section ``npu``) and ``state`` (the
    state folder).
    """

    folder: str
    manifest: dict[str, Any]
    part: Natural = 0
    options: dict[str, Any] = msgspec.field(default_factory=dict)


class Encode(Message, frozen=True, tag="encode", kw_only=True):
    """Encoder: one memfd of pixels in, ``encode_done`` with one memfd of rows out.

    ``grid`` is (time, rows, columns) in patches, for encoders of flattened patches.
    """

    id: int
    pixels: Tensor
    grid: tuple[int, int, int] | None = None


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """Where a view's rows go: ``count`` tokens from ``start``; ``key`` identifies them.

    ``grid`` is (time, rows, columns) in tokens, where the encoder has one.
    ``video`` numbers the videos of a prompt: the view is a frame of that one,
    and the frames of one video follow each other (RKLLM, as a video of its own);
    ``time`` is then its position on the video's time axis (``models.positions``).
    ``tiles``: the rows of several views, one memfd each, become one block
    (``models.assembly``): so many rows and columns of tiles, then the whole picture.
    """

    start: Natural
    count: Natural
    key: str
    grid: tuple[int, int, int] | None = None
    video: Natural | None = None
    time: Natural = 0
    tiles: tuple[Natural, Natural] | None = None


class Generate(Message, frozen=True, tag="generate", kw_only=True):
    """Decoder: one memfd of float32 rows per span (more where it has ``tiles``), in order.

    ``tokens`` is the whole conversation with the image tokens expanded; the
    child reuses what its cache already holds. ``sampling`` has every field of
    ``messages.Sampling`` filled in; ``stop`` are strings.

    For RKLLM, ``prompt`` is the conversation as text with ``<image>`` at each
    picture's place; without a tokenizer ``tokens`` is empty and ``count`` an
    estimate of how many there are. ``adapter`` names one of the manifest's.
    Within thoughts, which ``thinking`` describes, nothing stops the answer.
    """

    id: int
    tokens: list[int]
    prompt: str = ""
    count: Natural = 0
    adapter: str = ""
    spans: list[Span] = msgspec.field(default_factory=list)
    max_tokens: int
    stop: list[str] = msgspec.field(default_factory=list)
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    thinking: Thinking | None = None


class Embed(Message, frozen=True, tag="embed", kw_only=True):
    """Decoder: the vector of one input of ``/v1/embeddings``; ends in ``embed_done``.

    ``tokens``, ``prompt``, ``count``, ``adapter``, ``spans`` and the memfds are
    those of ``generate``. ``size`` asks for the first so many floats of the
    vector, 0 for all of it. What is pooled, and how, is in the manifest's
    ``embeddings``.
    """

    id: int
    tokens: list[int]
    prompt: str = ""
    count: Natural = 0
    adapter: str = ""
    spans: list[Span] = msgspec.field(default_factory=list)
    size: Natural = 0


class Abort(Message, frozen=True, tag="abort", kw_only=True):
    """End order ``id`` early."""

    id: int


# --- child -> daemon ---------------------------------------------------------------


class Hello(Message, frozen=True, tag="hello", kw_only=True):
    """First frame of every child. ``libraries`` maps names to versions."""

    pid: int
    role: str
    protocol: int = PROTOCOL
    libraries: dict[str, str] = msgspec.field(default_factory=dict)


class Beat(Message, frozen=True, tag="beat", kw_only=True):
    """The child's main thread turns."""


class Progress(Message, frozen=True, tag="progress", kw_only=True):
    """How far a load is, 0..1, and what it is doing."""

    fraction: float
    doing: str


class Ready(Message, frozen=True, tag="ready", kw_only=True):
    """The load is done. ``info`` is shown by ``rkvlmctl status`` (shapes, versions)."""

    info: dict[str, Any] = msgspec.field(default_factory=dict)


class EncodeDone(Message, frozen=True, tag="encode_done", kw_only=True):
    """One memfd: float32 rows, shape (image tokens, embedding size)."""

    id: int
    rows: Tensor
    seconds: float


class Prefilled(Message, frozen=True, tag="prefilled", kw_only=True):
    """The prompt is in the cache. ``cached`` of its tokens were there before."""

    id: int
    prompt: int
    cached: int
    seconds: float


class Text(Message, frozen=True, tag="text", kw_only=True):
    """The next piece of whole characters (may be empty); ``tokens`` generated since the last."""

    id: int
    text: str
    tokens: int = 1


class Perf(msgspec.Struct, frozen=True, kw_only=True):
    """What the RKLLM runtime measured itself; ``memory_mb`` is the child's peak."""

    prefill_tokens: int
    prefill_ms: float
    generate_tokens: int
    generate_ms: float
    memory_mb: float


class GenerateDone(Message, frozen=True, tag="generate_done", kw_only=True):
    """``completion`` counts generated tokens, the end-of-text token left out.

    From RKLLM also: ``prompt`` and ``cached`` where the end knows better than
    the beginning, ``ignored`` the sampling parameters that had no effect,
    ``recycle`` that this child should be replaced, because its library leaks.

    ``held`` names the blocks of ``conversation`` that the key/value cache holds now
    (``wire.prefix``), empty where that is not known; ``forgot`` are conversations
    that it holds no more.
    """

    id: int
    reason: Literal["stop", "length", "aborted"]
    completion: int
    seconds: float
    prompt: int | None = None
    cached: int | None = None
    ignored: list[str] = msgspec.field(default_factory=list)
    recycle: bool = False
    perf: Perf | None = None
    conversation: Natural = 0
    held: list[str] = msgspec.field(default_factory=list)
    forgot: list[Natural] = msgspec.field(default_factory=list)


class EmbedDone(Message, frozen=True, tag="embed_done", kw_only=True):
    """``vector``: base64 of ``size`` float32, little endian; ``tokens`` of the input, counted.

    ``recycle`` as in ``generate_done``.
    """

    id: int
    vector: str
    size: int
    tokens: int
    seconds: float
    recycle: bool = False


class Failed(Message, frozen=True, tag="failed", kw_only=True):
    """An order that failed in a way that leaves the child well.

    ``code`` is a key of ``errors.CODES``; ``message`` is fit for a client.
    """

    id: int = 0
    code: str
    message: str


ToChild = Load | Picture | Video | Frames | Render | Encode | Generate | Embed | Abort
FromChild = (
    Hello | Beat | Progress | Ready | PictureDone | VideoDone | RenderDone | EncodeDone | Prefilled
    | Text | GenerateDone | EmbedDone | Failed
)  # fmt: skip


_Kind = TypeVar("_Kind", bound=Message)


def _tag(kind: type[Message]) -> str:
    return str(kind.__struct_config__.tag)


_TO_CHILD: dict[str, type[ToChild]] = {_tag(kind): kind for kind in get_args(ToChild)}
_FROM_CHILD: dict[str, type[FromChild]] = {_tag(kind): kind for kind in get_args(FromChild)}


def parse_to_child(message: dict[str, Any]) -> ToChild:
    """Check a frame from the daemon; raises ``msgspec.ValidationError``."""
    return msgspec.convert(message, _kind(message, _TO_CHILD))


def parse_from_child(message: dict[str, Any]) -> FromChild:
    """Check a frame from a child; raises ``msgspec.ValidationError``."""
    return msgspec.convert(message, _kind(message, _FROM_CHILD))


def _kind(message: dict[str, Any], kinds: dict[str, type[_Kind]]) -> type[_Kind]:
    """Look the type up by its tag: msgspec would take a union apart again for every frame."""
    kind = kinds.get(message["type"])
    if kind is None:
        raise msgspec.ValidationError("no such message")
    return kind


def build(message: ToChild | FromChild) -> dict[str, Any]:
    """Return the frame object of a message."""
    built: dict[str, Any] = msgspec.to_builtins(message)
    return built
