"""The sections of the settings: each key with its default, unit, sentence and smallest value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def key(default: Any, doc: str, unit: str = "", *, least: float | None = None) -> Any:
    """Declare one setting: default, sentence, unit and smallest legal value."""
    meta = {"doc": doc, "unit": unit, "least": least}
    if isinstance(default, list):
        return field(default_factory=lambda: tuple(default), metadata=meta)
    return field(default=default, metadata=meta)


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """The OpenAI-compatible endpoint."""

    bind: str = key("127.0.0.1:8080", "address and port; port 0 picks a free one")
    allow_unauthenticated: bool = key(
        False, "serve an address that is not loopback without API keys"
    )
    api_keys_file: str = key("", "file with one API key a line; empty: no keys are asked for")
    allowed_hosts: tuple[str, ...] = key(
        [], "names accepted in the Host header besides this machine's own names and addresses"
    )
    max_body_bytes: int = key(32 << 20, "largest request body", "bytes", least=1024)
    max_json_depth: int = key(64, "deepest nesting of a JSON body", "levels", least=4)
    max_json_values: int = key(
        100_000, "most values in a JSON body, objects and lists included", "values", least=100
    )
    max_parts: int = key(1024, "most content parts in one request", "parts", least=1)
    max_header_bytes: int = key(32768, "largest request head", "bytes", least=1024)
    body_seconds: float = key(60.0, "time to send a request body", "seconds", least=0.1)
    discard_bytes: int = key(
        32 << 20, "how much of a refused upload is read and dropped", "bytes", least=0
    )
    discard_seconds: float = key(
        2.0, "how long a refused upload is read and dropped", "seconds", least=0
    )
    peer_seconds: float = key(
        15.0, "a peer that takes no data for this long is dropped", "seconds", least=0.1
    )
    keep_alive_seconds: float = key(
        5.0, "idle time after which a connection is closed", "seconds", least=0.1
    )
    headers_seconds: float = key(
        10.0, "latest time for the headers of an answer", "seconds", least=0.1
    )
    ping_seconds: float = key(
        10.0, "pause between comment lines before the first token", "seconds", least=0.1
    )
    max_connections: int = key(256, "most open connections", "connections", least=1)


@dataclass(frozen=True, slots=True)
class ControlSettings:
    """The Unix socket of rkvlmctl."""

    path: str = key(
        "", "socket path; empty: /run/rkvlmd/control.sock, or the user's runtime folder"
    )
    operator_group: str = key("", "members of this group may load, unload and cancel")
    max_connections: int = key(32, "most open connections", "connections", least=1)
    max_line_bytes: int = key(1 << 20, "longest request line", "bytes", least=1024)
    peer_seconds: float = key(
        10.0, "a peer that takes no data for this long is dropped", "seconds", least=0.1
    )
    idle_seconds: float = key(
        300.0, "a connection without a call is closed after this", "seconds", least=0.1
    )


@dataclass(frozen=True, slots=True)
class ModelsSettings:
    """Which models there are."""

    dir: str = key("", "folder of model folders; empty: STATE/models")
    default: str = key(
        "", "model for requests that name none; empty: the loaded one, else the first"
    )
    demo: bool = key(True, "offer the demo model of the package")
    preload: tuple[str, ...] = key([], "models to load at start")
    on_demand: bool = key(True, "a request may cause the load or swap of an installed model")
    max_tokens: int = key(1024, "generated tokens where nobody says a number", "tokens", least=1)
    keep_alive_seconds: float = key(
        -1.0, "a model that is not used for this long is unloaded, unless its manifest says"
        " another time; -1: never", "seconds", least=-1,
    )  # fmt: skip
    keep_alive_min_seconds: float = key(
        300.0, "the shortest keep_alive that a request may ask for", "seconds", least=0
    )
    keep_alive_max_seconds: float = key(
        -1.0, "the longest keep_alive that a request may ask for; -1: any", "seconds", least=-1
    )


@dataclass(frozen=True, slots=True)
class StateSettings:
    """What the daemon remembers."""

    dir: str = key("", "state folder; empty: /var/lib/rkvlmd, or the user's state folder")


@dataclass(frozen=True, slots=True)
class MediaSettings:
    """Pictures that clients send."""

    remote: bool = key(False, "fetch pictures from http(s) URLs")
    allow: tuple[str, ...] = key(
        [],
        "addresses that may be fetched although they are not public: CIDR or HOST, with :PORT",
    )
    max_images: int = key(16, "most pictures in one request", "pictures", least=1)
    max_image_bytes: int = key(20 << 20, "largest picture file", "bytes", least=1024)
    max_pixels: int = key(50_000_000, "largest picture", "pixels", least=64)
    min_side: int = key(2, "shortest side of a picture", "pixels", least=1)
    max_aspect: int = key(200, "longest side divided by the shortest", "ratio", least=1)
    fetch_seconds: float = key(10.0, "time to fetch one picture", "seconds", least=0.1)
    max_redirects: int = key(3, "most redirects of one fetch", "redirects", least=0)
    max_fetches: int = key(4, "most fetches at the same time", "fetches", least=1)
    exact: bool = key(False, "decode every JPEG in full instead of at a reduced scale")
    max_videos: int = key(2, "most videos in one request", "videos", least=0)
    max_video_bytes: int = key(32 << 20, "largest video file", "bytes", least=1024)
    max_video_pixels: int = key(8_912_896, "largest frame of a video", "pixels", least=64)
    max_video_seconds: float = key(900.0, "longest video", "seconds", least=0.1)
    max_frames: int = key(16, "most frames that are taken of one video", "frames", least=1)
    frame_pixels: int = key(
        589_824, "a frame with more is made smaller before it is prepared", "pixels", least=64
    )


@dataclass(frozen=True, slots=True)
class PrepSettings:
    """The children that decode pictures and render prompts."""

    children: int = key(2, "most children", "processes", least=1)
    idle_seconds: float = key(60.0, "an idle child leaves after this", "seconds", least=0)
    memory_bytes: int = key(768 << 20, "address space of one child", "bytes", least=256 << 20)
    job_seconds: float = key(20.0, "time for one picture or prompt", "seconds", least=0.1)
    prompt_wait_seconds: float = key(
        1.0, "a prompt waits this long for the child that has the tokenizer; then any child loads it",
        "seconds", least=0,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class QueueSettings:
    """Admission."""

    max_jobs: int = key(32, "most requests admitted at the same time", "requests", least=1)
    max_jobs_per_client: int = key(
        24, "most of them of one client, which is an address; 0: as many as max_jobs", "requests",
        least=0,
    )  # fmt: skip
    max_bytes: int = key(128 << 20, "most bytes of admitted bodies", "bytes", least=1 << 20)
    max_pixels: int = key(
        24_000_000, "most pixels of pictures that wait for their encoder, at its size", "pixels",
        least=65536,
    )  # fmt: skip
    max_embedding_bytes: int = key(
        128 << 20, "most bytes of the picture embeddings of one request", "bytes", least=1 << 20
    )
    job_seconds: float = key(300.0, "deadline of a request, waiting included", "seconds", least=1)
    refuse_late: bool = key(
        True, "refuse a request at once whose deadline the work ahead of it would use up"
    )
    age_seconds: float = key(
        30.0, "a class that waits this long takes part in the next better one", "seconds", least=0.1
    )
    max_jumps: int = key(
        4, "how often others may overtake a request to save a model swap or a prefill", "requests",
        least=0,
    )  # fmt: skip
    interactive_clients: tuple[str, ...] = key(
        [], "clients whose requests are interactive unless they say otherwise: address, CIDR, local"
    )
    batch_clients: tuple[str, ...] = key(
        [], "clients whose requests are batch whatever they say: address, CIDR or local"
    )
    drain_retry_seconds: int = key(
        30, "when clients may try again while the server is drained", "seconds", least=1
    )
    stop_seconds: float = key(20.0, "time that jobs get to end at a stop", "seconds", least=0)
    crash_refusal_seconds: float = key(
        600.0, "a request that has killed a child twice is refused for this", "seconds", least=0
    )


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Children that run models."""

    threads: int = key(0, "threads of the CPU engine; 0: one a core", "threads", least=0)
    hello_seconds: float = key(20.0, "time for a child to report", "seconds", least=0.1)
    load_seconds: float = key(120.0, "shortest time limit of a load", "seconds", least=1)
    load_bytes_per_second: int = key(
        20_000_000, "slowest storage that a load is measured by", "bytes/s", least=1
    )
    beat_seconds: float = key(20.0, "a loading child must beat this often", "seconds", least=1)
    first_token_seconds: float = key(
        30.0, "first token: this plus four times the expected prefill", "seconds", least=0.1
    )
    prefill_rate: float = key(
        50.0, "prefill rate assumed before one was measured", "tokens/s", least=0.1
    )
    token_seconds: float = key(20.0, "longest pause between two tokens", "seconds", least=0.1)
    abort_seconds: float = key(
        3.0, "time to acknowledge an abort between tokens", "seconds", least=0.1
    )
    encode_seconds: float = key(60.0, "time to encode one picture", "seconds", least=0.1)
    grace_seconds: float = key(5.0, "time for a child to leave", "seconds", least=0.1)
    restarts: int = key(3, "consecutive unplanned deaths before a model fails", "deaths", least=0)
    heal_seconds: float = key(30.0, "first trial start of a failed model", "seconds", least=1)
    heal_max_seconds: float = key(600.0, "longest pause between trials", "seconds", least=1)


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """What is kept between requests."""

    embeddings_bytes: int = key(64 << 20, "picture embeddings kept", "bytes", least=0)
    conversations_bytes: int = key(
        128 << 20, "key/value caches of other conversations that the CPU engine keeps", "bytes",
        least=0,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """Admission of loads."""

    reserve_bytes: int = key(256 << 20, "memory that a load must leave free", "bytes", least=0)
    models_bytes: int = key(
        0, "most memory of all models together; 0: what the machine leaves", "bytes", least=0
    )
    check_seconds: float = key(
        10.0, "pause between looks at the free memory while encoders are kept that nobody uses;"
        " below half of memory.reserve_bytes the least recently used leave", "seconds", least=0.1,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class NpuSettings:
    """The NPU and its libraries."""

    library: str = key("", "librkllmrt.so, or a folder with several versions; empty: search")
    soc: str = key("", "name of the SoC; empty: from the device tree")
    layout: str = key("", "version of librkllmrt.so whose memory layout to assume; empty: its own")
    sampling: str = key("warn", "sampling that 1.2 cannot change per request: warn or reject")
    overlap: bool = key(False, "encode while another job decodes")
    conversations_bytes: int = key(
        0, "saved key/value caches of other conversations, in memory; 0: none", "bytes", least=0
    )


@dataclass(frozen=True, slots=True)
class LogSettings:
    """What goes to standard error."""

    level: str = key("info", "debug, info, warning or error")


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings; one section an attribute."""

    http: HttpSettings = field(default_factory=HttpSettings)
    control: ControlSettings = field(default_factory=ControlSettings)
    models: ModelsSettings = field(default_factory=ModelsSettings)
    state: StateSettings = field(default_factory=StateSettings)
    media: MediaSettings = field(default_factory=MediaSettings)
    prep: PrepSettings = field(default_factory=PrepSettings)
    queue: QueueSettings = field(default_factory=QueueSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    npu: NpuSettings = field(default_factory=NpuSettings)
    log: LogSettings = field(default_factory=LogSettings)
