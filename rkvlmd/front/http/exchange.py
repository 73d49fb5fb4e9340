"""One request and its response: bounded reading, whole endings, and a client that may leave."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING

import trio

from rkvlmd.errors import RkvlmdError
from rkvlmd.wire.openai_answer import error_body
from rkvlmd.wire.outcome import retry_after

if TYPE_CHECKING:
    from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, HTTPScope

    from rkvlmd.settings import HttpSettings

Headers = Iterable[tuple[bytes, bytes]]

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_JSON = (b"content-type", b"application/json")


class ClientGoneError(Exception):
    """The client left before its request was complete."""


class Exchange:
    """One HTTP request, from its headers to the last byte of its response.

    ``scope`` is cancelled when the client leaves, in every phase after the
    body; while the body is read ``ClientGoneError`` says so. The server
    reports the end of a complete response like a client that left; the
    last message is therefore sent with nothing left to cancel, because the
    server closes or recycles the connection inside it.
    """

    def __init__(
        self,
        request: HTTPScope,
        receive: ASGIReceiveCallable,
        send: ASGISendCallable,
        nursery: trio.Nursery,
        http: HttpSettings,
    ) -> None:
        self.arrived = trio.current_time()
        self.scope = trio.CancelScope()
        self.method = request["method"]
        self.path = request["path"]
        self.client = (request.get("client") or ("local", 0))[0]
        self.server = (request.get("server") or (None, 0))[0]
        self.headers: dict[bytes, bytes] = {}
        for name, value in request["headers"]:
            self.headers.setdefault(name.lower(), value)
        given = self.headers.get(b"x-request-id", b"")
        valid = _REQUEST_ID.fullmatch(given)
        self.request_id = given.decode() if valid else f"req_{secrets.token_hex(12)}"
        self.started = False
        self._receive = receive
        self._send = send
        self._nursery = nursery
        self._http = http
        self._listening = False
        self._finishing = False
        # h11 has checked that it is one number
        length = self.headers.get(b"content-length")
        self.content_length = int(length) if length is not None else None
        self._unread = bool(self.content_length) or b"transfer-encoding" in self.headers

    async def read_body(self) -> list[bytes]:
        """Read the body; return its pieces.

        Raises:
          ClientGoneError: the client left.
          RkvlmdError: ``request_too_large`` (``http.max_body_bytes``) or
            ``request_timeout`` (``http.body_seconds``).

        """
        most = self._http.max_body_bytes
        if self.content_length is not None and self.content_length > most:
            raise _too_large(most)
        pieces: list[bytes] = []
        size = 0
        with trio.move_on_after(self._http.body_seconds):
            while self._unread:
                piece = await self._next_piece()
                size += len(piece)
                if size > most:
                    raise _too_large(most)
                pieces.append(piece)
            return pieces
        raise RkvlmdError("request_timeout", "The request body did not arrive in time.")

    async def _next_piece(self) -> bytes:
        message = await self._receive()
        if message["type"] != "http.request":
            raise ClientGoneError
        if not message.get("more_body", False):
            self._unread = False
        return message.get("body", b"")

    def listen(self) -> None:
        """From now on cancel ``scope`` when the client leaves; the body must have been read."""
        if not self._listening:
            self._listening = True
            self._nursery.start_soon(self._listen)

    async def _listen(self) -> None:
        while True:
            message = await self._receive()
            if message["type"] != "http.request":
                break
        if not self._finishing:
            self.scope.cancel(reason="client gone")

    async def start(self, status: int, headers: Headers) -> None:
        """Send the head of the response; every one carries ``x-request-id``."""
        self.started = True
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [*headers, (b"x-request-id", self.request_id.encode())],
            }
        )

    async def write(self, data: bytes) -> None:
        """Send a piece of the response; waits for a slow client."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self, data: bytes = b"") -> None:
        """Send the last piece of the response."""
        # The server hands us what still arrives; while nobody took it, it could not close.
        self.listen()
        self._finishing = True
        # bounded by http.peer_seconds, after which the kernel drops the connection
        with trio.CancelScope(shield=True):
            await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def respond(self, status: int, body: bytes, headers: Headers = (_JSON,)) -> None:
        """Send a whole response.

        What the client has not sent yet of its request is read and dropped
        within ``http.discard_seconds`` and ``http.discard_bytes``, so that it
        sees the response and not a connection reset.
        """
        head = [*headers, (b"content-length", b"%d" % len(body))]
        if not self._unread:
            await self.start(status, head)
            await self.finish(body)
            return
        await self.start(status, [*head, (b"connection", b"close")])
        if body:
            await self.write(body)
        await self._discard()
        await self.finish()

    async def _discard(self) -> None:
        left = self._http.discard_bytes
        with trio.move_on_after(self._http.discard_seconds):
            while self._unread and left > 0:
                left -= len(await self._next_piece())

    async def respond_error(self, error: RkvlmdError, headers: Headers = ()) -> None:
        """Send an error in the shape of the OpenAI API."""
        head = [_JSON, *headers]
        if (seconds := retry_after(error)) is not None:
            head.append((b"retry-after", b"%d" % seconds))
        if error.should_retry is not None:
            head.append((b"x-should-retry", b"true" if error.should_retry else b"false"))
        if error.code == "invalid_api_key":
            head.append((b"www-authenticate", b"Bearer"))
        await self.respond(error.status, error_body(error), head)


def _too_large(most: int) -> RkvlmdError:
    return RkvlmdError(
        "request_too_large", f"The request body is larger than {most} bytes (http.max_body_bytes)."
    )
