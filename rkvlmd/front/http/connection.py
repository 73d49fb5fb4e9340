"""What has to be put right in the server library, per connection."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable

import h11
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, RawData
from hypercorn.protocol.events import Body, Event, Response
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.tcp_server import TCPServer

from rkvlmd.errors import RkvlmdError
from rkvlmd.settings import HttpSettings
from rkvlmd.wire.openai_answer import error_body

log = logging.getLogger(__name__)

#: Most bytes of one read.
_READ = 65536


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


class _PeerLeftError(Exception):
    """The peer closed while its next request, or a line end too many, waited for its answer."""


class _Turn:
    """An event for the wait until an answer is done; it also ends when the peer leaves.

    The library reads no further while bytes after a request wait, so it would
    not see that: the job of a client that has gone would run to its end.
    """

    __slots__ = ("_event", "_gone")

    def __init__(self, gone: Callable[[], Awaitable[None]]) -> None:
        self._gone = gone
        self._event = trio.Event()

    def forget(self) -> None:
        """Nobody will wait any more; what would be told of the peer is let go."""
        self._gone = trio.sleep_forever

    async def clear(self) -> None:
        self._event = trio.Event()

    async def set(self) -> None:
        self._event.set()

    def is_set(self) -> bool:
        return self._event.is_set()

    async def wait(self) -> None:
        """Wait for ``set``.

        Raises:
          _PeerLeftError: the peer left before.

        """
        left = False
        async with trio.open_nursery() as nursery:

            async def look() -> None:
                nonlocal left
                await self._gone()
                left = True
                nursery.cancel_scope.cancel(reason="the peer has left")

            nursery.start_soon(look)
            await self._event.wait()
            nursery.cancel_scope.cancel(reason="the answer is done")
        if left and not self._event.is_set():
            raise _PeerLeftError


class PlainHttp(H11Protocol):
    """HTTP/1.1 alone, with parser errors in the shape of the API."""

    _chunked = False

    def wait_with(self, receive: Callable[[], Awaitable[bytes]]) -> _Turn:
        """While requests that were sent ahead wait, ``receive`` gives more, and the end."""

        async def gone() -> None:
            while len(self.connection.trailing_data[0]) < self.config.h11_max_incomplete_size:
                if not (data := await receive()):
                    return
                self.connection.receive_data(data)
            await trio.sleep_forever()

        self.can_read = turn = _Turn(gone)
        return turn

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
        try:
            await super().run()
        finally:
            # Parser and connection know each other: thirty objects, some kilobytes, that would wait
            # until the collector comes for the oldest, which may be an hour.
            vars(self).pop("protocol", None)

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
        turn = wrapper.protocol.wait_with(self._more)
        try:
            await super()._read_data()
        except _PeerLeftError:
            await wrapper.handle(Closed())
        finally:
            turn.forget()

    async def _more(self) -> bytes:
        """Read; what cannot be read is an end."""
        try:
            return bytes(await self.stream.receive_some(_READ))
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            return b""
