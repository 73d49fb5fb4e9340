"""One streamed chat request on a trio loop: what came when, and how it ended."""

from __future__ import annotations

import json
import ssl
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import h11
import trio

from rkvlmd.wire import sse

#: Longest silence of a server, seconds.
PATIENCE = 600.0
_READ = 1 << 16
#: What an answer that was cut off is counted as.
CUT, UNREACHABLE, LEFT = "cut off", "unreachable", "left"


@dataclass(frozen=True, slots=True)
class Target:
    """An OpenAI-compatible server; ``model`` empty: it has a default one."""

    host: str
    port: int
    path: str = "/v1/chat/completions"
    tls: bool = False
    key: str = ""
    model: str = ""


def target(url: str, *, key: str = "", model: str = "") -> Target:
    """Return the chat endpoint of a base URL, with or without its ``/v1``."""
    split = urlsplit(url if "//" in url else f"http://{url}")
    path = split.path.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1")
    tls = split.scheme == "https"
    port = split.port or (443 if tls else 80)
    return Target(
        split.hostname or "127.0.0.1", port, f"{path}/v1/chat/completions", tls, key, model
    )


@dataclass(slots=True)
class Request:
    """One request: ``body`` without ``stream``; ``leave`` closes the connection so late, seconds.

    ``source`` numbers the client: each has a loopback address of its own where
    the server is on this machine.
    """

    body: dict[str, Any]
    kind: str = ""
    source: int = 0
    priority: str = ""
    leave: float | None = None

    def encode(self, where: Target) -> bytes:
        """Return the body's bytes."""
        body = {**self.body, "stream": True, "stream_options": {"include_usage": True}}
        if where.model:
            body["model"] = where.model
        return json.dumps(body).encode()


@dataclass(slots=True)
class Answer:
    """What came; times are the monotonic clock, seconds.

    ``outcome`` is the ``finish_reason``, an error's code, ``left``, ``cut off``
    or ``unreachable``. ``texts`` holds the time of each event with text,
    ``gone`` when the connection was closed by us.
    """

    kind: str
    sent: float
    status: int = 0
    outcome: str = CUT
    texts: list[float] = field(default_factory=list)
    ended: float = 0.0
    gone: float | None = None
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, Any] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Whether it is a whole answer."""
        return self.outcome in {"stop", "length"}

    @property
    def first(self) -> float | None:
        """Seconds from the sending to the first text."""
        return self.texts[0] - self.sent if self.texts else None

    @property
    def tokens(self) -> int:
        """Generated tokens: the server's count, else the events with text."""
        return int(self.usage.get("completion_tokens") or len(self.texts))


async def ask(
    where: Target, request: Request, data: bytes | None = None, *, answer: Answer | None = None
) -> Answer:
    """Send one request on a connection of its own and read to its end.

    ``data`` is the encoded body where it was prepared before the clock,
    ``answer`` what is filled, for those who look while it comes.
    """
    data = request.encode(where) if data is None else data
    if answer is None:
        answer = Answer(request.kind, time.monotonic())
    leave = float("inf") if request.leave is None else request.leave
    with trio.move_on_after(leave) as leaving, trio.move_on_after(PATIENCE):
        try:
            stream = await _connect(where, request.source)
        except OSError:
            answer.outcome = UNREACHABLE
            answer.ended = time.monotonic()
            return answer
        # Closed at once also where we leave: nobody waits for a peer.
        try:
            await _talk(stream, where, request, data, answer)
        except (trio.BrokenResourceError, h11.RemoteProtocolError):
            answer.outcome = CUT
        finally:
            await trio.aclose_forcefully(stream)
    answer.ended = time.monotonic()
    if leaving.cancelled_caught:
        answer.outcome, answer.gone = LEFT, answer.ended
    return answer


async def _connect(where: Target, source: int) -> trio.abc.Stream:
    bind = f"127.0.{source // 250}.{source % 250 + 1}" if where.host == "127.0.0.1" else None
    tcp = await trio.open_tcp_stream(where.host, where.port, local_address=bind)
    if not where.tls:
        return tcp
    return trio.SSLStream(tcp, ssl.create_default_context(), server_hostname=where.host)


async def _talk(
    stream: trio.abc.Stream, where: Target, request: Request, data: bytes, answer: Answer
) -> None:
    connection = h11.Connection(h11.CLIENT)
    headers = [
        ("Host", f"{where.host}:{where.port}"),
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(data))),
        ("Connection", "close"),
    ]
    if where.key:
        headers.append(("Authorization", f"Bearer {where.key}"))
    if request.priority:
        headers.append(("X-Priority", request.priority))
    head = connection.send(h11.Request(method="POST", target=where.path, headers=headers))
    connection.send(h11.Data(data=b""))
    try:
        await stream.send_all((head or b"") + data)
    except trio.BrokenResourceError:
        if where.tls:
            raise
        # It may have refused before it read all; its answer is there nevertheless.
    answer.sent = time.monotonic()
    events, refused = sse.Decoder(), bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(_READ))
        elif isinstance(event, h11.Response):
            answer.status = event.status_code
        elif isinstance(event, h11.Data):
            if answer.status != 200:
                refused += event.data
            elif _hear(answer, events.feed(bytes(event.data))):
                return
        elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
            break
    if answer.status not in {0, 200}:
        answer.outcome = _code(refused, answer.status)


def _hear(answer: Answer, events: list[bytes]) -> bool:
    """Take the events of one read; true at the end."""
    now = time.monotonic()
    for data in events:
        if data == b"[DONE]":
            return True
        event = json.loads(data)
        if "error" in event:
            answer.outcome = str((event["error"] or {}).get("code") or "error")
            continue
        answer.usage = event.get("usage") or answer.usage
        answer.timings = event.get("timings") or answer.timings
        for choice in event.get("choices") or ():
            text = (choice.get("delta") or {}).get("content")
            if text:
                answer.texts.append(now)
                answer.text += text
            if choice.get("finish_reason"):
                answer.outcome = str(choice["finish_reason"])
    return False


def _code(body: bytes | bytearray, status: int) -> str:
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        code = None
    return str(code or f"status {status}")
