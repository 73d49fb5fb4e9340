"""Name servers and web servers of the tests, all in memory."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio
import trio.testing

from rkvlmd.actors.fetcher import Connection, Endpoint

Serve = Callable[[trio.abc.Stream], Awaitable[None]]


def endpoint(address: str, port: int) -> Endpoint:
    """Return what a resolver would say about a literal address."""
    if ipaddress.ip_address(address).version == 4:
        return Endpoint(socket.AF_INET, (address, port))
    return Endpoint(socket.AF_INET6, (address, port, 0, 0))


@dataclass
class Names:
    """A resolver: each lookup of a name takes the next answer, the last one stays."""

    table: dict[str, list[list[str]]]
    asked: list[str] = field(default_factory=list)

    async def __call__(self, host: str, port: int) -> list[Endpoint]:
        await trio.lowlevel.checkpoint()
        self.asked.append(host)
        if host not in self.table:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        answers = self.table[host]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        return [endpoint(address, port) for address in answer]


class Network:
    """A connector: servers by address; everything else refuses.

    ``peer`` and ``own`` make the kernel of the fake say other addresses than
    the ones asked for.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        servers: dict[tuple[str, int], Serve],
        *,
        peer: str | None = None,
        own: str = "192.0.2.1",
    ) -> None:
        self.connected: list[tuple[str, int]] = []
        self._nursery = nursery
        self._servers = servers
        self._peer = peer
        self._own = own

    async def __call__(self, endpoint: Endpoint) -> Connection:
        await trio.lowlevel.checkpoint()
        where = (endpoint.address[0], endpoint.address[1])
        self.connected.append(where)
        if where not in self._servers:
            raise ConnectionRefusedError
        ours, theirs = trio.testing.memory_stream_pair()
        self._nursery.start_soon(self._run, self._servers[where], theirs)
        return Connection(ours, self._peer or where[0], self._own)

    async def _run(self, serve: Serve, stream: trio.abc.Stream) -> None:
        try:
            await serve(stream)
        except trio.BrokenResourceError:
            pass  # the client left early
        finally:
            await trio.aclose_forcefully(stream)


class Says:
    """A web server that reads a request and says one thing; ``heads`` is what it read."""

    def __init__(self, *pieces: bytes, pause: float = 0.0, repeat: bool = False) -> None:
        self.heads: list[bytes] = []
        self._pieces = pieces
        self._pause = pause
        self._repeat = repeat

    async def __call__(self, stream: trio.abc.Stream) -> None:
        head = bytearray()
        while b"\r\n\r\n" not in head:
            data = await stream.receive_some()
            if not data:
                return
            head += data
        self.heads.append(bytes(head))
        while True:
            for piece in self._pieces:
                await trio.sleep(self._pause)
                await stream.send_all(piece)
            if not self._repeat:
                return


def ok(body: bytes, *headers: str) -> bytes:
    """Return a whole 200 answer with a length."""
    head = "\r\n".join(["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers])
    return head.encode() + b"\r\n\r\n" + body


def redirect(location: str, status: int = 302) -> bytes:
    """Return a whole redirect."""
    return (
        f"HTTP/1.1 {status} Elsewhere\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n"
    ).encode()
