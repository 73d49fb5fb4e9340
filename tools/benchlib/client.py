"""A blocking client of the chat endpoint that does little beyond noting the time of each read."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass
from typing import Any, Self

from rkvlmd.wire import sse

from .figures import BenchError

#: Longest silence of the daemon, seconds.
PATIENCE = 60.0
_READ = 1 << 16
_MAX_HEAD = 1 << 16


@dataclass(frozen=True, slots=True)
class Read:
    """The bytes of one read and the monotonic clock right after it, in nanoseconds."""

    at: int
    data: bytes


class Stream:
    """One streamed request on a connection of its own; use it in a ``with`` block.

    Args:
      host, port: the daemon.
      body: the JSON body of the request.

    ``sent_at`` is the monotonic clock, in nanoseconds, when the kernel had
    taken the last byte of the body.
    """

    def __init__(self, host: str, port: int, body: dict[str, Any]) -> None:
        data = json.dumps({**body, "stream": True}).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
            "Connection: close\r\n\r\n"
        )
        self._message = head.encode() + data
        self._sock = socket.create_connection((host, port), timeout=PATIENCE)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._chunks = _Chunks()
        self._events = sse.Decoder()
        self.sent_at = 0
        self.ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def fileno(self) -> int:
        """Return the socket's descriptor, to wait on."""
        return self._sock.fileno()

    def send(self) -> None:
        """Send the request."""
        self._sock.sendall(self._message)
        self.sent_at = time.monotonic_ns()

    def read(self) -> Read:
        """Wait for bytes; empty ones are the end.

        Raises:
          BenchError: nothing came for ``PATIENCE``.

        """
        try:
            data = self._sock.recv(_READ)
            at = time.monotonic_ns()
        except OSError as exc:
            raise BenchError(f"the daemon did not answer: {exc}") from None
        self.ended = not data
        return Read(at, data)

    def ready(self) -> bytes:
        """Return what has come already, without waiting."""
        self._sock.setblocking(False)
        try:
            return self._sock.recv(_READ)
        except BlockingIOError:
            return b""
        finally:
            self._sock.settimeout(PATIENCE)

    def events(self, data: bytes) -> list[dict[str, Any]]:
        """Return the events that these bytes complete; call it once for each read, in order.

        Raises:
          BenchError: the daemon refused the request or ended it with an error.

        """
        found: list[dict[str, Any]] = []
        for event in self._events.feed(self._chunks.feed(data)):
            if event == b"[DONE]":
                continue
            parsed = json.loads(event)
            if "error" in parsed:
                raise BenchError(f"the daemon answered: {parsed['error']['message']}")
            found.append(parsed)
        return found


def text_of(event: dict[str, Any]) -> str:
    """Return the text that an event carries; empty for those without."""
    choices = event.get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""


class _Chunks:
    """Bytes of a response with a chunked body, cut anywhere, to the bytes of the body."""

    def __init__(self) -> None:
        self._buffer = b""
        self._head_done = False
        self._left = 0

    def feed(self, data: bytes) -> bytes:
        self._buffer += data
        if not self._head_done and not self._head():
            return b""
        body = b""
        while self._buffer:
            if self._left > 2:
                piece = self._buffer[: self._left - 2]
                body += piece
                self._left -= len(piece)
                self._buffer = self._buffer[len(piece) :]
            elif self._left:  # the line end after a chunk
                if len(self._buffer) < self._left:
                    break
                self._buffer = self._buffer[self._left :]
                self._left = 0
            else:
                size, end, rest = self._buffer.partition(b"\r\n")
                if not end:
                    break
                self._left, self._buffer = int(size, 16) + 2, rest
        return body

    def _head(self) -> bool:
        head, end, rest = self._buffer.partition(b"\r\n\r\n")
        if not end:
            if len(self._buffer) > _MAX_HEAD:
                raise BenchError("the daemon's answer has no end of its head")
            return False
        status = head.split(b"\r\n", 1)[0]
        if b" 200" not in status:
            raise BenchError(f"the daemon answered {status.decode(errors='replace')}: {rest!r}")
        self._head_done, self._buffer = True, rest
        return True
