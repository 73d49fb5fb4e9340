"""What has to be put right in the server library, per connection."""

from __future__ import annotations

import logging
import secrets

import h11
import trio
from hypercorn.config import Config
from hypercorn.events import RawData
from hypercorn.protocol.events import Body, Event, Response
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.tcp_server import TCPServer

from rkvlmd.errors import RkvlmdError
from rkvlmd.settings import HttpSettings
from rkvlmd.wire.openai_answer import error_body

log = logging.getLogger(__name__)


def server_config(http: HttpSettings) -> Config:
    """Return the library's configuration, with each default that would bite replaced.

    ``read_timeout`` stays off: it would cut an answer whose client, rightly,
    says nothing. A request's head is bounded by ``keep_alive_timeout``, its
    body by ``http.body_seconds``.
    """
    config = Config()
    config.accesslog = None
    config.errorlog = log
    config.include_server_header = False
    config.keep_alive_timeout = http.keep_alive_seconds
    config.h11_max_incomplete_size = http.max_header_bytes
    config.read_timeout = None
    return config


class PlainHttp(H11Protocol):
    """HTTP/1.1 alone, with parser errors in the shape of the API."""

    _chunked = False

    async def stream_send(self, event: Event) -> None:
        """Send a piece of an answer; a chunk is framed here, in one step instead of twenty."""
        if isinstance(event, Body) and self._chunked and event.data:
            await self.send(RawData(data=b"%x\r\n%b\r\n" % (len(event.data), event.data)))
            return
        if isinstance(event, Response):
            # What the library will choose: it knows the length, or the peer knows no chunks.
            known = any(name.lower() == b"content-length" for name, _ in event.headers)
            peer = self.connection
            self._chunked = (
                not known and isinstance(peer, h11.Connection) and peer.their_http_version == b"1.1"
            )
        await super().stream_send(event)

    async def _check_protocol(self, event: h11.Request) -> None:
        """Ignore offers to speak HTTP/2: one protocol, one parser, one set of limits."""

    async def _send_error_response(self, status_code: int) -> None:
        if status_code in {413, 431}:
            error = RkvlmdError(
                "request_too_large", "The head of the request is too large (http.max_header_bytes)."
            )
        else:
            error = RkvlmdError("invalid_request", "The request is not valid HTTP/1.1.")
        body = error_body(error)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
            (b"x-request-id", f"req_{secrets.token_hex(12)}".encode()),
            *self.config.response_headers("h11"),
        ]
        await self._send_h11_event(h11.Response(status_code=status_code, headers=headers))
        await self._send_h11_event(h11.Data(data=body))
        await self._send_h11_event(h11.EndOfMessage())


class _SendLock:
    """A lock that is taken at once when it is free.

    The library's own takes a turn of the loop before each piece of an answer;
    the send behind it has a checkpoint anyway.
    """

    def __init__(self) -> None:
        self._lock = trio.Lock()

    async def __aenter__(self) -> None:
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()


class Connection(TCPServer):
    """One connection of a client."""

    send_lock: _SendLock  # type: ignore[assignment]

    async def run(self) -> None:
        """Serve the connection to its end."""
        self.send_lock = _SendLock()
        await super().run()

    async def _read_data(self) -> None:
        # the last moment before the first byte
        wrapper = self.protocol
        wrapper.protocol = PlainHttp(
            wrapper.app,
            wrapper.config,
            wrapper.context,
            wrapper.task_group,
            wrapper.state,
            wrapper.ssl,
            wrapper.client,
            wrapper.server,
            wrapper.send,
        )
        await super()._read_data()
