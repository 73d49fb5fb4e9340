"""The client for picture URLs, and everything that keeps it away from other people's doors.

A URL is parsed once (``wire.urls``), its name is resolved once, every address
of it is vetted, and the connection goes to a vetted address and to no other:
between the check and the use there is nothing that a name server could change.
A redirect is a new URL and starts again. Nothing of the environment is used
(proxies, netrc), nothing of the client's request is sent on.
"""

from __future__ import annotations

import io
import ipaddress
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NoReturn, Protocol

import h11
import trio

from rkvlmd import __version__
from rkvlmd.errors import RkvlmdError
from rkvlmd.settings import MediaSettings
from rkvlmd.wire import urls

#: Most addresses of one name that are tried.
MAX_ADDRESSES = 8
#: Most bytes of the head of an answer, and most interim answers (1xx) before it.
MAX_HEAD_BYTES = 16384
MAX_INTERIM = 8
_CHUNK = 65536
_REDIRECTS = {301, 302, 303, 307, 308}
What = Literal["picture", "video"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address that a name has: the socket family, and what ``connect`` takes."""

    family: int
    address: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Connection:
    """An open connection: its stream, and the addresses that the kernel says it has."""

    stream: trio.abc.Stream
    peer: str
    own: str


class Resolve(Protocol):
    """Name to addresses."""

    async def __call__(self, host: str, port: int) -> list[Endpoint]:
        """Return every address of ``host``; raise ``OSError`` when there is none."""
        ...


class Connect(Protocol):
    """Address to connection."""

    async def __call__(self, endpoint: Endpoint) -> Connection:
        """Connect to exactly ``endpoint``; raise ``OSError`` when it cannot be."""
        ...


@dataclass(frozen=True, slots=True)
class FetcherStatistics:
    """What the fetcher does and did; ``refused`` are addresses that may not be fetched."""

    running: int
    waiting: int
    done: int
    refused: int
    failed: int


class Fetcher:
    """Fetches pictures; one for the whole daemon.

    It has no task of its own: each ``fetch`` runs in the task of its caller and
    ends when that is cancelled. At most ``media.max_fetches`` run at a time,
    the others wait their turn; each holds at most ``media.max_image_bytes``,
    or ``media.max_video_bytes`` for a video.
    """

    def __init__(
        self,
        settings: MediaSettings,
        *,
        resolve: Resolve | None = None,
        connect: Connect | None = None,
        tls: Callable[[], ssl.SSLContext] = ssl.create_default_context,
    ) -> None:
        self._settings = settings
        self._allowed = urls.Allowed(settings.allow)
        self._resolve = resolve or Resolver(settings.max_fetches)
        self._connect = connect or connect_tcp
        self._tls = tls
        self._context: ssl.SSLContext | None = None
        self._slots = trio.CapacityLimiter(settings.max_fetches)
        self._done = self._refused = self._failed = 0

    def adopt(self, settings: MediaSettings) -> None:
        """Take settings that were read again, for fetches to come."""
        self._settings = settings
        self._allowed = urls.Allowed(settings.allow)

    def statistics(self) -> FetcherStatistics:
        """Return the counts since the start."""
        slots = self._slots.statistics()
        return FetcherStatistics(
            running=slots.borrowed_tokens,
            waiting=slots.tasks_waiting,
            done=self._done,
            refused=self._refused,
            failed=self._failed,
        )

    async def fetch(
        self, url: str, field: str, *, what: What = "picture", most: int | None = None
    ) -> bytes:
        """Return the body of ``url``; ``field`` is the JSON path that errors name.

        ``most`` is the largest body, bytes; default ``media.max_image_bytes``.

        Raises:
          RkvlmdError: ``invalid_image_url`` for a URL that may not be fetched,
            ``failed_to_download_image``, ``image_file_too_large``,
            ``empty_image_file``.

        """
        try:
            return await self._fetch(url, self._settings.max_image_bytes if most is None else most)
        except _Refused as exc:
            self._refused += 1
            raise _error("invalid_image_url", str(exc).replace("picture", what), field) from None
        except _Failed as exc:
            self._failed += 1
            raise _error(exc.code, str(exc).replace("picture", what), field) from None

    async def _fetch(self, url: str, most: int) -> bytes:
        settings = self._settings
        if not settings.remote:
            raise _Refused(
                "pictures are not fetched from URLs here (media.remote is off);"
                " send the picture itself as a data: URL"
            )
        try:
            target = urls.parse(url)
        except urls.UrlError as exc:
            raise _Refused(str(exc)) from None
        async with self._slots:
            with trio.move_on_after(settings.fetch_seconds) as limit:
                body = await self._follow(target, most)
            if limit.cancelled_caught:
                raise _Failed(f"the picture did not arrive within {settings.fetch_seconds:g} s")
        self._done += 1
        return body

    async def _follow(self, target: urls.Target, most: int) -> bytes:
        for _ in range(self._settings.max_redirects + 1):
            answer = await self._hop(target, most)
            if isinstance(answer, bytes):
                return answer
            target = answer
        raise _Failed(f"the server redirects more than {self._settings.max_redirects} times")

    async def _hop(self, target: urls.Target, most: int) -> bytes | urls.Target:
        """Ask once; return the body, or where to ask next."""
        try:
            stream = await self._open(target)
            try:
                return await self._ask(target, stream, most)
            finally:
                await trio.aclose_forcefully(stream)
        except (OSError, ssl.SSLError, trio.BrokenResourceError, trio.ClosedResourceError):
            raise _Failed("the server of the picture cannot be reached") from None
        except h11.RemoteProtocolError:
            raise _Failed("the server of the picture does not answer in HTTP") from None

    async def _open(self, target: urls.Target) -> trio.abc.Stream:
        endpoints = await self._vetted(target)
        connection = await self._first(endpoints)
        stream = connection.stream
        try:
            self._check_peer(target, connection, endpoints)
            if target.scheme == "https":
                if self._context is None:
                    # Reading the certificates of the system takes tens of milliseconds.
                    self._context = await trio.to_thread.run_sync(self._tls)
                stream = trio.SSLStream(
                    stream, self._context, server_hostname=target.host, https_compatible=True
                )
                await stream.do_handshake()
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream

    async def _vetted(self, target: urls.Target) -> list[Endpoint]:
        """Resolve once; return the addresses. One that is not allowed spoils them all."""
        if target.literal is not None:
            family = socket.AF_INET if target.literal.version == 4 else socket.AF_INET6
            endpoints = [Endpoint(family, (str(target.literal), target.port))]
        else:
            endpoints = (await self._resolve(target.host, target.port))[:MAX_ADDRESSES]
        if not endpoints:
            raise _Failed("the server of the picture cannot be reached")
        for endpoint in endpoints:
            # A sockaddr has its port apart; one that differs was not asked for.
            if endpoint.address[1] != target.port or not urls.may_connect(
                target, _ip(endpoint.address[0]), self._allowed
            ):
                _forbid()
        return endpoints

    async def _first(self, endpoints: list[Endpoint]) -> Connection:
        """Connect to the first that answers, sharing the time that is left among them."""
        for i, endpoint in enumerate(endpoints):
            left = trio.current_effective_deadline() - trio.current_time()
            with trio.move_on_after(max(0.0, left) / (len(endpoints) - i)):
                try:
                    return await self._connect(endpoint)
                except OSError:
                    continue
        raise _Failed("the server of the picture cannot be reached")

    def _check_peer(
        self, target: urls.Target, connection: Connection, vetted: list[Endpoint]
    ) -> None:
        peer = urls.plain(_ip(connection.peer))
        if all(peer != urls.plain(_ip(e.address[0])) for e in vetted):
            _forbid()
        # A public address of this very machine: what listens here may trust it.
        here = (target.host, peer, target.port)
        if peer == urls.plain(_ip(connection.own)) and here not in self._allowed:
            _forbid()

    async def _ask(
        self, target: urls.Target, stream: trio.abc.Stream, most: int
    ) -> bytes | urls.Target:
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        request = h11.Request(
            method="GET",
            target=target.path,
            headers=[
                ("Host", target.authority),
                ("Accept", "image/jpeg, image/png, image/webp, image/gif, video/mp4, video/webm"),
                ("Accept-Encoding", "identity"),  # a compressed body could be a bomb
                ("User-Agent", f"rkvlmd/{__version__}"),
                ("Connection", "close"),
            ],
        )
        head = connection.send(request)
        tail = connection.send(h11.EndOfMessage())
        assert head is not None
        await stream.send_all(head + (tail or b""))
        receive = partial(_next_event, connection, stream)
        response = await _head(receive)
        if response.status_code in _REDIRECTS:
            return _redirect(target, response)
        if response.status_code != 200:
            raise _Failed(f"the server of the picture answers with status {response.status_code}")
        return await self._body(response, receive, most)

    @staticmethod
    async def _body(response: h11.Response, receive: _Receive, most: int) -> bytes:
        too_large = _Failed(
            f"the picture file is larger than {most} bytes", code="image_file_too_large"
        )
        if _header(response, b"content-encoding") not in {None, b"identity"}:
            raise _Failed("the server of the picture compresses it although it was asked not to")
        length = _header(response, b"content-length")
        if length is not None and int(length) > most:  # h11 let only digits pass
            raise too_large
        body = io.BytesIO()
        while isinstance(event := await receive(), h11.Data):
            if body.tell() + len(event.data) > most:
                raise too_large
            body.write(event.data)
        if not body.tell():
            raise _Failed("the picture file is empty", code="empty_image_file")
        return body.getvalue()


class Resolver:
    """The system's resolver, in threads of its own.

    A lookup that nobody waits for any more keeps its place until it ends, so
    slow name servers cannot fill the process with threads.
    """

    def __init__(self, most: int) -> None:
        self._threads = trio.CapacityLimiter(most)

    async def __call__(self, host: str, port: int) -> list[Endpoint]:
        """Return every address of ``host``; raise ``OSError`` when there is none."""
        lookup = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        try:
            found = await trio.to_thread.run_sync(
                lookup, limiter=self._threads, abandon_on_cancel=True
            )
        except UnicodeError as exc:  # a label that the IDNA codec does not like
            raise OSError("not a host name") from exc
        return [Endpoint(family, address) for family, _, _, _, address in found]


async def connect_tcp(endpoint: Endpoint) -> Connection:
    """Open a TCP connection to an address; nothing is resolved.

    Raises:
      OSError: when it cannot be.

    """
    sock = trio.socket.socket(endpoint.family, socket.SOCK_STREAM)
    try:
        await sock.connect(endpoint.address)
        return Connection(
            stream=trio.SocketStream(sock),
            peer=sock.getpeername()[0],
            own=sock.getsockname()[0],
        )
    except BaseException:
        sock.close()
        raise


class _Receive(Protocol):
    async def __call__(self) -> h11.Event | type[h11.PAUSED]: ...


class _Refused(Exception):
    """The URL, or what it leads to, may not be fetched."""


class _Failed(Exception):
    """The picture could not be had; ``code`` is a key of ``errors.CODES``."""

    def __init__(self, message: str, code: str = "failed_to_download_image") -> None:
        super().__init__(message)
        self.code = code


def _error(code: str, message: str, field: str) -> RkvlmdError:
    # All of them are 4xx: the same request would end the same way.
    return RkvlmdError(code, message, param=field, should_retry=False)


def _forbid() -> NoReturn:
    raise _Refused(
        "the URL leads to an address that is not public; the setting media.allow can permit it"
    )


def _ip(text: str) -> urls.Address:
    return ipaddress.ip_address(text.partition("%")[0])


async def _next_event(
    connection: h11.Connection, stream: trio.abc.Stream
) -> h11.Event | type[h11.PAUSED]:
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(bytes(await stream.receive_some(_CHUNK)))
    return event  # type: ignore[return-value]


async def _head(receive: _Receive) -> h11.Response:
    for _ in range(MAX_INTERIM + 1):
        event = await receive()
        if isinstance(event, h11.Response):
            return event
        if not isinstance(event, h11.InformationalResponse):
            break
    raise _Failed("the server of the picture does not answer in HTTP")


def _redirect(target: urls.Target, response: h11.Response) -> urls.Target:
    location = _header(response, b"location")
    if location is None:
        raise _Failed("the server of the picture redirects to nowhere")
    try:
        return urls.join(target, location.decode())
    except urls.UrlError as exc:
        raise _Refused(f"after a redirect: {exc}") from None
    except UnicodeDecodeError:
        raise _Failed("the server of the picture redirects to nowhere") from None


def _header(response: h11.Response, name: bytes) -> bytes | None:
    return next((value for key, value in response.headers if key == name), None)
