"""The HTTP listener: own sockets, bounded connections, an orderly and bounded stop."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState

from rkvlmd.front.http.app import HttpApp
from rkvlmd.front.http.connection import Connection, server_config
from rkvlmd.front.http.guard import Guard, load_keys
from rkvlmd.settings import HttpSettings, split_bind

if TYPE_CHECKING:
    from rkvlmd.actors.house import House

log = logging.getLogger(__name__)

#: Connections that the kernel holds until we accept them.
BACKLOG = 128
#: What a stream gets beyond ``queue.stop_seconds``, to say how its job ended (seconds).
DRAIN_MARGIN = 5.0


async def serve_http(
    house: House,
    sockets: Sequence[socket.socket] | None = None,
    *,
    stop: trio.Event,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until ``stop`` is set and the running answers are done.

    Args:
      house: the parts of the daemon; ``http_address`` is set here.
      sockets: bound sockets to listen on; ``None``: made from ``http.bind``.
      stop: listeners close at once, running answers get
        ``queue.stop_seconds`` and a few seconds more.
      task_status: gets ``http://HOST:PORT`` when connections are accepted.

    Raises:
      OSError: the address cannot be had.
      SettingsError: ``http.api_keys_file`` is no good.

    """
    settings = house.settings
    http = settings.http
    guard = Guard(http, load_keys(http.api_keys_file) if http.api_keys_file else ())
    made = list(sockets) if sockets else await open_sockets(http.bind)
    try:
        for sock in made:
            _set_options(sock, http)
            sock.listen(BACKLOG)
        address = _address(made[0])
        server = _Server(HttpApp(house, guard), http, made)
    except BaseException:
        for sock in made:
            sock.close()
        raise
    house.http_address = address
    try:
        await server.run(stop, settings.queue.stop_seconds + DRAIN_MARGIN, address, task_status)
    finally:
        house.http_address = ""


class _Server:
    """The accept loops and the open connections."""

    def __init__(self, app: HttpApp, http: HttpSettings, sockets: list[socket.socket]) -> None:
        self._app = ASGIWrapper(app)
        self._config = server_config(http)
        self._context = WorkerContext(None)
        # each waiting accept holds a place of its own
        self._places = trio.Semaphore(http.max_connections + len(sockets) - 1)
        self._listeners = [_Listener(sock, self._places) for sock in sockets]
        self._open: set[trio.SocketStream] = set()
        self._all_closed = trio.Event()
        self._stopping = False

    async def run(
        self, stop: trio.Event, drain: float, address: str, task_status: trio.TaskStatus[str]
    ) -> None:
        async with trio.open_nursery() as connections:
            try:
                async with trio.open_nursery() as accepting:
                    accepting.start_soon(self._accept, connections)
                    task_status.started(address)
                    await stop.wait()
                    accepting.cancel_scope.cancel(reason="stop")
                self._stopping = True
                # idle connections close now, the others after their answer
                await self._context.terminated.set()
                with trio.move_on_after(drain):
                    if self._open:
                        await self._all_closed.wait()
            finally:
                if self._open:
                    log.warning("%d connections are cut off", len(self._open))
                connections.cancel_scope.cancel(reason="stop")
                # A send to a client that takes nothing is shielded from that; closing wakes it.
                for stream in self._open:
                    stream.socket.close()

    async def _accept(self, connections: trio.Nursery) -> None:
        await trio.serve_listeners(self._connection, self._listeners, handler_nursery=connections)

    async def _connection(self, stream: trio.SocketStream) -> None:
        self._open.add(stream)
        try:
            await Connection(
                self._app,
                self._config,
                self._context,
                ConnectionState({}),
                stream,  # type: ignore[arg-type]
            ).run()
        except Exception as error:
            # one bad connection must not end the listener
            if _is_network(error):
                log.debug("connection lost: %r", error)
            else:
                log.exception("connection failed")
        finally:
            self._open.discard(stream)
            self._places.release()
            if self._stopping and not self._open:
                self._all_closed.set()


class _Listener(trio.abc.Listener[trio.SocketStream]):
    """Accepts while there is a place; who comes later waits in the kernel's queue."""

    def __init__(self, sock: socket.socket, places: trio.Semaphore) -> None:
        sock.setblocking(False)
        self._inner = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        self._places = places

    async def accept(self) -> trio.SocketStream:
        await self._places.acquire()
        try:
            return await self._inner.accept()
        except BaseException:
            self._places.release()
            raise

    async def aclose(self) -> None:
        await self._inner.aclose()


async def open_sockets(bind: str) -> list[socket.socket]:
    """Bind ``HOST:PORT``; a name may have several addresses, which then share the port.

    Raises:
      OSError: when the first address cannot be had.

    """
    host, port = split_bind(bind)
    found = await trio.socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    made: list[socket.socket] = []
    for family, kind, protocol, _, place in dict.fromkeys(found):
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError:  # this machine has no IPv6
            if not made:
                raise
            continue
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, place[0] != "::")
            sock.bind((place[0], port))
        except OSError as error:
            sock.close()
            if made and error.errno in {errno.EADDRNOTAVAIL, errno.EADDRINUSE}:
                continue
            for other in made:
                other.close()
            raise
        port = sock.getsockname()[1]
        made.append(sock)
    return made


def _set_options(sock: socket.socket, http: HttpSettings) -> None:
    """Let the kernel drop peers that take nothing, or are gone; connections inherit all this."""
    if sock.family == socket.AF_UNIX:
        return
    seconds = max(1, round(http.peer_seconds))
    tcp = socket.IPPROTO_TCP
    sock.setsockopt(tcp, socket.TCP_NODELAY, 1)
    sock.setsockopt(tcp, socket.TCP_USER_TIMEOUT, max(1, int(http.peer_seconds * 1000)))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(tcp, socket.TCP_KEEPIDLE, seconds)
    sock.setsockopt(tcp, socket.TCP_KEEPINTVL, max(1, seconds // 3))
    sock.setsockopt(tcp, socket.TCP_KEEPCNT, 3)


def _address(sock: socket.socket) -> str:
    """Return a URL that works on this machine."""
    if sock.family == socket.AF_UNIX:
        return "http://localhost"
    host, port = sock.getsockname()[:2]
    if sock.family == socket.AF_INET6:
        return f"http://[{'::1' if host == '::' else host}]:{port}"
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"


def _is_network(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_is_network(e) for e in error.exceptions)
    return isinstance(error, (OSError, trio.BrokenResourceError, trio.ClosedResourceError))
