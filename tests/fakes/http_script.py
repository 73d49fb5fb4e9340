"""An HTTP server that says what a test wrote down, and keeps what it was asked."""

from __future__ import annotations

import json
from typing import Any

import trio


def sse(*events: dict[str, Any] | str) -> bytes:
    """Return an answer that is an event stream."""
    lines = [e if isinstance(e, str) else "data: " + json.dumps(e) for e in events]
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    return head + "".join(line + "\n\n" for line in lines).encode()


def response(status: int, body: dict[str, Any]) -> bytes:
    """Return an answer that is one JSON object."""
    data = json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return head.encode() + f"content-length: {len(data)}\r\n\r\n".encode() + data


def chunk(text: str) -> dict[str, Any]:
    """Return a chunk with text."""
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


class HttpScript:
    """Answers each request with the next of ``answers``."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = list(answers)
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.address = ""

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.address = f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
        task_status.started()
        await trio.serve_listeners(self._answer, [listener])

    async def _answer(self, stream: trio.SocketStream) -> None:
        async with stream:
            data = b""
            while b"\r\n\r\n" not in data:
                data += await stream.receive_some()
            head, body = data.split(b"\r\n\r\n", 1)
            self.heads.append(head.decode())
            size = next(
                int(line.split(b":")[1])
                for line in head.split(b"\r\n")
                if line.lower().startswith(b"content-length")
            )
            while len(body) < size:
                body += await stream.receive_some()
            self.bodies.append(json.loads(body))
            await stream.send_all(self.answers.pop(0))
