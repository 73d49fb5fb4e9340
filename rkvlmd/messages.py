"""What crosses between the parts of the daemon: frozen, without behaviour.

Durations are seconds (float), sizes are bytes (int), times of the event loop
are trio's clock.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal, get_args

from rkvlmd.errors import RkvlmdError

EndReason = Literal[
    "stop", "length", "tool_calls", "deadline", "client_gone", "cancelled", "engine_died",
    "engine_wedged", "model_unloaded", "shutdown", "error",
]  # fmt: skip
#: Reasons after which the answer is whole.
GOOD_ENDS: frozenset[str] = frozenset({"stop", "length", "tool_calls"})

Phase = Literal[
    "admitted", "fetching", "preparing", "waiting", "loading", "encoding", "prefill",
    "generating", "done",
]  # fmt: skip

Role = Literal["system", "user", "assistant"]

Priority = Literal["interactive", "normal", "batch"]
#: The classes of the queue, the best first.
PRIORITIES: tuple[Priority, ...] = get_args(Priority)


class ModelState(enum.Enum):
    """Where a model is in its life; ``failed`` heals itself (see residency)."""

    ABSENT = "absent"
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text as the user wrote it, not neutralised yet."""

    text: str


@dataclass(frozen=True, slots=True)
class PicturePart:
    """The place of picture ``index`` (into ``ChatRequest.pictures``)."""

    index: int


@dataclass(frozen=True, slots=True)
class VideoPart:
    """The place of video ``index`` (into ``ChatRequest.videos``)."""

    index: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of the conversation, its parts in order.

    ``thought`` is what the assistant thought before it, as the client sent it back.
    """

    role: Role
    parts: tuple[TextPart | PicturePart | VideoPart, ...]
    thought: str = ""


@dataclass(frozen=True, slots=True)
class PictureSource:
    """One picture as the client gave it.

    ``kind`` is ``base64`` (``data`` holds the base64 text alone, the prefix of
    a data URI cut off) or ``url`` (``data`` holds an http(s) URL). ``field``
    is the JSON path that errors name.
    """

    kind: Literal["base64", "url"]
    data: str
    field: str
    detail: Literal["auto", "low", "high"] = "auto"


@dataclass(frozen=True, slots=True)
class VideoSource:
    """One video as the client gave it; ``base64``, ``url`` and ``field`` as for a picture.

    ``frames``: ``data`` holds the base64 texts of pictures, joined by commas.
    """

    kind: Literal["base64", "url", "frames"]
    data: str
    field: str
    detail: Literal["auto", "low", "high"] = "auto"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; ``None`` means the model's default.

    ``temperature`` 0 is greedy. ``top_k`` 0 is off. Penalties as in the
    OpenAI API; ``repetition_penalty`` 1 is off.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A parsed and checked ``/v1/chat/completions`` body.

    ``ignored`` names known parameters that have no effect here, ``unknown``
    the fields that nobody knows. ``timeout`` is the client's own deadline,
    ``priority`` the class that it asks for, ``keep_alive`` how long the model
    shall stay loaded after it (seconds, ``inf`` for ever). ``thinking`` turns
    thoughts on or off (``None``: as the model has it), ``thinking_asked`` are
    the fields that said so; ``thoughts``: they are part of the answer.
    """

    turns: tuple[Turn, ...]
    pictures: tuple[PictureSource, ...] = ()
    videos: tuple[VideoSource, ...] = ()
    model: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    timeout: float | None = None
    priority: Priority | None = None
    keep_alive: float | None = None
    ignored: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    thinking: bool | None = None
    thinking_asked: tuple[str, ...] = ()
    thoughts: bool = True


@dataclass(frozen=True, slots=True)
class EmbeddingsRequest(ChatRequest):
    """A parsed and checked ``/v1/embeddings`` body: each turn is one input.

    ``dimensions`` asks for the beginning of the vectors.
    """

    encoding: Literal["float", "base64"] = "float"
    dimensions: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one job; ``image_tokens`` are part of ``prompt_tokens``.

    ``reasoning_tokens`` are those of ``completion_tokens`` that are thoughts.

    ``estimated`` is true where the engine cannot count (RKLLM without a
    tokenizer file).
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    image_tokens: int = 0
    estimated: bool = False
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds that each stage of one job took; 0 where it did not run.

    ``queue`` is the wait for the lease, ``first_token`` counts from the
    submission of the job. ``fetch`` and ``decode_image`` add up over the
    pictures, which go side by side; ``prepare`` is the time until the prompt
    is ready, both of them included.
    """

    queue: float = 0.0
    fetch: float = 0.0
    decode_image: float = 0.0
    prepare: float = 0.0
    load: float = 0.0
    encode: float = 0.0
    prefill: float = 0.0
    first_token: float = 0.0
    generate: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job ended: exactly one per job. ``error`` is set unless the end is good."""

    reason: EndReason
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)
    error: RkvlmdError | None = None


@dataclass(frozen=True, slots=True)
class JobView:
    """One line of ``rkvlmctl jobs``; ``phase_age`` is how long the phase lasts already."""

    id: str
    client: str
    model: str
    phase: Phase
    age: float
    pictures: int
    prompt_tokens: int
    completion_tokens: int
    stream: bool
    priority: Priority = "normal"
    phase_age: float = 0.0


@dataclass(frozen=True, slots=True)
class Rescan:
    """What a new look into the models folder has found, by name.

    ``waiting`` are those of ``changed`` and ``removed`` that are loaded as they
    were, until they are unloaded.
    """

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelView:
    """One line of ``rkvlmctl models`` and one card of ``/v1/models``.

    ``progress`` is 0..1 while loading, ``seconds_left`` the estimate of the
    rest, from what the load took last time. ``detail`` says why a model failed.
    ``encoders_kept``: its decoder made room for another one, and so many of its
    encoders stayed. ``idle_seconds`` is the time until it leaves unless it is
    used, ``None`` where nothing is planned. ``pinned``: only ``unpin`` lets it go.
    ``adapters`` are offered as ``NAME:ADAPTER``; the view of one of those has
    the model's name as ``parent``. ``makes`` is what a request may ask for,
    ``video`` whether it may show videos, ``thinking`` whether it may think aloud.
    """

    name: str
    family: str
    state: ModelState
    context: int
    image: bool
    created: int
    digest: str
    progress: float = 0.0
    detail: str = ""
    memory_bytes: int = 0
    held: bool = False
    default: bool = False
    pinned: bool = False
    seconds_left: float | None = None
    idle_seconds: float | None = None
    encoders_kept: int = 0
    engines: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    parent: str = ""
    makes: tuple[Literal["text", "embeddings"], ...] = ("text",)
    video: bool = False
    thinking: bool = False
