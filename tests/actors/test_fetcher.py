"""Fetching pictures: who may be asked, for how long, and for how much."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing
import trustme

from rkvlmd.actors.fetcher import Fetcher
from rkvlmd.errors import RkvlmdError
from rkvlmd.settings import MediaSettings
from tests.fakes.net import Names, Network, Says, Serve, ok, redirect
from tests.fakes.torture import cancel_everywhere

FIELD = "messages[0].content[1].image_url"
PUBLIC = "93.184.215.14"
OTHER = "1.1.1.1"
V6 = "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
PICTURE = b"\x89PNG\r\n" + bytes(range(256)) * 40
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

# One address of every range that is not the public internet.
PRIVATE = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.127.255.254", "127.0.0.1", "127.8.8.8",
    "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.0.170", "192.0.2.1",
    "192.88.99.1", "192.168.1.50", "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1",
    "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254",
    "64:ff9b::7f00:1", "64:ff9b:1::1", "100::1", "2001::1", "2001:2::1", "2001:10::1",
    "2001:20::1", "2001:db8::1", "2002:7f00:1::1", "2002:c0a8:132::1", "3fff::1", "5f00::1",
    "fc00::1", "fd12:3456::1", "fe80::1", "fec0::1", "ff02::1", "ff0e::1",
]  # fmt: skip


@asynccontextmanager
async def world(
    names: dict[str, list[list[str]]] | None = None,
    servers: dict[tuple[str, int], Serve] | None = None,
    *,
    peer: str | None = None,
    own: str = "192.0.2.1",
    **settings: Any,
) -> AsyncIterator[tuple[Fetcher, Names, Network]]:
    """A fetcher with remote pictures on, in a network of its own."""
    resolver = Names({"pictures.example": [[PUBLIC]], **(names or {})})
    async with trio.open_nursery() as nursery:
        network = Network(nursery, {} if servers is None else servers, peer=peer, own=own)
        media = MediaSettings(**{"remote": True, **settings})
        yield Fetcher(media, resolve=resolver, connect=network), resolver, network
        nursery.cancel_scope.cancel()


async def refused(fetch: Awaitable[bytes], code: str) -> RkvlmdError:
    """Check that ``fetch`` fails with ``code``, names the field and tells no address."""
    with pytest.raises(RkvlmdError) as caught:
        await fetch
    error = caught.value
    assert error.code == code, error
    assert error.param == FIELD
    assert error.should_retry is False
    for secret in (*PRIVATE[2:], PUBLIC, OTHER, "pictures.example", "Errno", "h11"):
        if len(secret) > 5:
            assert secret not in error.message
    return error


async def test_off_by_default_and_says_which_setting() -> None:
    fetcher = Fetcher(MediaSettings())
    error = await refused(
        fetcher.fetch("https://pictures.example/a.png", FIELD), "invalid_image_url"
    )
    assert "media.remote" in error.message
    assert fetcher.statistics().refused == 1


async def test_a_picture() -> None:
    server = Says(ok(PICTURE))
    async with world(servers={(PUBLIC, 80): server}) as (fetcher, names, _):
        body = await fetcher.fetch("http://PICTURES.example./a/b.png?c=d&e#f", FIELD)
        assert body == PICTURE
        assert isinstance(body, bytes)
        assert names.asked == ["pictures.example"]
        assert fetcher.statistics().done == 1
    head = server.heads[0].decode().split("\r\n")
    assert head[0] == "GET /a/b.png?c=d&e HTTP/1.1"
    sent = {line.partition(": ")[0].lower(): line.partition(": ")[2] for line in head[1:] if line}
    assert sent["host"] == "pictures.example"
    assert sent["accept-encoding"] == "identity"
    assert set(sent) == {"host", "accept", "accept-encoding", "user-agent", "connection"}


@pytest.mark.parametrize(
    "pieces",
    [
        (CHUNKED, b"5\r\nabcde\r\n", b"3\r\nfgh\r\n0\r\n\r\n"),
        (b"HTTP/1.0 200 OK\r\n\r\nabc", b"defgh"),
        (b"HTTP/1.1 103 Early Hints\r\n\r\n" * 3 + ok(b"abcdefgh"),),
        tuple(bytes([c]) for c in ok(b"abcdefgh")),
    ],
    ids=["chunked", "until the end", "interim answers", "byte by byte"],
)
async def test_ways_to_send_a_body(pieces: tuple[bytes, ...]) -> None:
    async with world(servers={(PUBLIC, 80): Says(*pieces)}) as (fetcher, _, _):
        assert await fetcher.fetch("http://pictures.example/", FIELD) == b"abcdefgh"


async def test_tries_the_next_address_when_one_refuses() -> None:
    table = {"pictures.example": [[V6, PUBLIC]]}
    async with world(table, {(PUBLIC, 80): Says(ok(PICTURE))}) as (fetcher, _, network):
        assert await fetcher.fetch("http://pictures.example/", FIELD) == PICTURE
        assert network.connected == [(V6, 80), (PUBLIC, 80)]


async def test_tries_the_next_address_when_one_is_silent(autojump_clock: object) -> None:
    async with world(fetch_seconds=10.0) as (_, names, network):

        async def silent_at_first(endpoint: Any) -> Any:
            if endpoint.address[0] == V6:
                await trio.sleep_forever()
            return await network(endpoint)

        names.table["pictures.example"] = [[V6, PUBLIC]]
        network._servers[PUBLIC, 80] = Says(ok(PICTURE))
        fetcher = Fetcher(MediaSettings(remote=True), resolve=names, connect=silent_at_first)
        started = trio.current_time()
        assert await fetcher.fetch("http://pictures.example/", FIELD) == PICTURE
        assert trio.current_time() - started == pytest.approx(5.0)


# --- where a URL may not lead ----------------------------------------------------------


@pytest.mark.parametrize("address", PRIVATE)
async def test_private_address_as_literal(address: str) -> None:
    host = f"[{address}]" if ":" in address else address
    async with world() as (fetcher, names, network):
        for scheme in ("http", "https"):
            await refused(fetcher.fetch(f"{scheme}://{host}/a.png", FIELD), "invalid_image_url")
        assert not network.connected
        assert not names.asked


@pytest.mark.parametrize("address", PRIVATE)
async def test_private_address_behind_a_name(address: str) -> None:
    async with world({"evil.example": [[address]], "both.example": [[PUBLIC, address]]}) as (
        fetcher,
        names,
        network,
    ):
        for host in ("evil.example", "both.example"):
            await refused(fetcher.fetch(f"http://{host}/a.png", FIELD), "invalid_image_url")
        assert not network.connected
        assert names.asked == ["evil.example", "both.example"]


@pytest.mark.parametrize(
    "url",
    [
        "http://2130706433/", "http://0x7f000001/", "http://0x7f.1/", "http://127.1/",
        "http://017700000001/", "http://0177.0.0.1/", "http://127.0.0.1.1/", "http://1/",
        "http://127.0.0.08/", "http://[::1%25lo]/", "http://[fe80::1%eth0]/", "http://[::1/",
        "http://[]/", "http://[v1.a]/", "http://127.0.0.1%2f@pictures.example/",
        "http://user@pictures.example/", "http://user:secret@pictures.example/",
        "http://pictures.example\\@127.0.0.1/", "http:\\\\pictures.example/",
        "http://pictures.example /", " http://pictures.example/", "http://pictures.example/\n",
        "http://pictures.example/a b", "http://pictures.example/\x00", "http://pictures.example/\x7f",
        "http://pictures.example/\u2028", "http://pictures.example/\u00a0", "http://ⓛocalhost/",
        "http://127。0。0。1/", "http://pictures%2eexample/", "http://-a.example/", "http://a..b/",
        "http://a_b-.example/", "http://" + "a" * 64 + ".example/", "http://" + "a." * 130 + "example/",
        "http://pictures.example:0/", "http://pictures.example:65536/", "http://pictures.example:/",
        "http://pictures.example:8o/", "http://pictures.example:+80/", "http://pictures.example:٨٠/",
        "http://pictures.example:80:80/", "http:///a.png", "http://", "http:pictures.example/",
        "//pictures.example/", "pictures.example/a.png", "/etc/passwd", "", "file:///etc/passwd",
        "ftp://pictures.example/", "gopher://pictures.example/", "data:image/png;base64,aaaa",
        "https+unix://pictures.example/", "ws://pictures.example/", "javascript:alert(1)",
        "http://pictures.example/" + "a" * 9000,
    ],
)  # fmt: skip
async def test_urls_that_are_refused_unasked(url: str) -> None:
    async with world() as (fetcher, names, network):
        await refused(fetcher.fetch(url, FIELD), "invalid_image_url")
        assert not network.connected
        assert not names.asked


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1/", "http://[::ffff:127.0.0.1]/", "http://2130706433/", "//10.0.0.1/a",
        "http://evil.example/", "file:///etc/passwd", "http://user@pictures.example/", "\\\\evil",
        "https://169.254.169.254/latest/meta-data/", "http://[/",
    ],
)  # fmt: skip
async def test_redirect_to_where_no_url_may_lead(location: str) -> None:
    names = {"evil.example": [["192.168.1.1"]]}
    async with world(names, {(PUBLIC, 80): Says(redirect(location))}) as (fetcher, _, network):
        await refused(fetcher.fetch("http://pictures.example/", FIELD), "invalid_image_url")
        assert network.connected == [(PUBLIC, 80)]


async def test_name_that_changes_its_address_between_hops() -> None:
    names = {"rebind.example": [[PUBLIC], ["127.0.0.1"]]}
    async with world(names, {(PUBLIC, 80): Says(redirect("/again"))}) as (
        fetcher,
        resolver,
        network,
    ):
        await refused(fetcher.fetch("http://rebind.example/", FIELD), "invalid_image_url")
        assert resolver.asked == ["rebind.example"] * 2
        assert network.connected == [(PUBLIC, 80)]


async def test_name_is_resolved_once_and_the_answer_is_used() -> None:
    names = {"rebind.example": [[PUBLIC], ["127.0.0.1"]]}
    async with world(names, {(PUBLIC, 80): Says(ok(PICTURE))}) as (fetcher, resolver, network):
        assert await fetcher.fetch("http://rebind.example/", FIELD) == PICTURE
        assert resolver.asked == ["rebind.example"]
        assert network.connected == [(PUBLIC, 80)]


async def test_resolver_that_answers_another_port() -> None:
    async with world() as (_, names, network):

        async def other_port(host: str, port: int) -> list[Any]:
            return await names(host, 22)

        fetcher = Fetcher(MediaSettings(remote=True), resolve=other_port, connect=network)
        await refused(fetcher.fetch("http://pictures.example/", FIELD), "invalid_image_url")


@pytest.mark.parametrize("peer", ["127.0.0.1", OTHER])
async def test_connection_that_ended_up_elsewhere(peer: str) -> None:
    server = Says(ok(PICTURE))
    async with world(servers={(PUBLIC, 80): server}, peer=peer) as (fetcher, _, _):
        await refused(fetcher.fetch("http://pictures.example/", FIELD), "invalid_image_url")
        assert not server.heads


async def test_own_public_address() -> None:
    server = Says(ok(PICTURE))
    async with world(servers={(PUBLIC, 80): server}, own=PUBLIC) as (fetcher, _, _):
        await refused(fetcher.fetch("http://pictures.example/", FIELD), "invalid_image_url")
        assert not server.heads


async def test_https_is_never_left_for_http() -> None:
    ca = trustme.CA()
    server = _tls(ca, "pictures.example", Says(redirect("http://pictures.example/a.png")))
    async with _tls_world(ca, {(PUBLIC, 443): server}) as (fetcher, network):
        await refused(fetcher.fetch("https://pictures.example/", FIELD), "invalid_image_url")
        assert network.connected == [(PUBLIC, 443)]


# --- what the owner allows -------------------------------------------------------------


@pytest.mark.parametrize(
    ("allow", "url", "may"),
    [
        ("192.168.1.50/32:8123", "http://192.168.1.50:8123/", True),
        ("192.168.1.50/32:8123", "http://[::ffff:192.168.1.50]:8123/", True),
        ("192.168.1.50/32:8123", "http://192.168.1.50/", False),
        ("192.168.1.50/32:8123", "http://192.168.1.51:8123/", False),
        ("192.168.1.50:8123", "http://192.168.1.50:8123/", True),
        ("10.0.0.0/8", "http://10.200.3.4:81/", True),
        ("10.0.0.0/8", "http://11.0.0.1.example/", False),
        ("fd00::/8", "http://[fd12::1]:8080/", True),
        ("[fd00::/8]:80", "http://[fd12::1]/", True),
        ("[fd00::/8]:80", "http://[fd12::1]:81/", False),
        ("0.0.0.0/0", "http://127.0.0.1/", True),
        ("0.0.0.0/0", "http://0.0.0.0/", False),
        ("224.0.0.0/4", "http://224.0.0.1/", False),
        ("camera.lan", "http://camera.lan/", True),
        ("Camera.LAN.", "http://CAMERA.lan.:99/", True),
        ("camera.lan:80", "http://camera.lan/", True),
        ("camera.lan:80", "http://camera.lan:81/", False),
        ("camera.lan", "http://other.lan/", False),
        ("camera.lan", "http://a.camera.lan/", False),
        ("camera.lan", "http://192.168.1.50/", False),
    ],
)
async def test_allow(allow: str, url: str, may: bool) -> None:
    private = {n: [["192.168.1.50"]] for n in ("camera.lan", "other.lan", "a.camera.lan")}
    private["11.0.0.1.example"] = [["127.0.0.1"]]

    class Anything(dict[Any, Any]):
        def __contains__(self, key: object) -> bool:
            return True

        def __getitem__(self, key: object) -> Serve:
            return Says(ok(PICTURE))

    async with world(private, Anything(), allow=(allow,)) as (fetcher, _, network):
        if may:
            assert await fetcher.fetch(url, FIELD) == PICTURE
        else:
            error = await refused(fetcher.fetch(url, FIELD), "invalid_image_url")
            assert "media.allow" in error.message
            assert not network.connected


async def test_allow_holds_for_every_address_of_a_name() -> None:
    names = {"camera.lan": [["192.168.1.50", "127.0.0.1"]]}
    async with world(names, allow=("192.168.1.0/24",)) as (fetcher, _, network):
        await refused(fetcher.fetch("http://camera.lan/", FIELD), "invalid_image_url")
        assert not network.connected


# --- bounds ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pieces",
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4097\r\n\r\n",),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n",),
        (CHUNKED, *[b"400\r\n" + bytes(1024) + b"\r\n"] * 5),
        (b"HTTP/1.0 200 OK\r\n\r\n", bytes(4000), bytes(97)),
    ],
    ids=["length", "absurd length", "chunked", "until the end"],
)
async def test_too_many_bytes(pieces: tuple[bytes, ...], autojump_clock: object) -> None:
    server = Says(*pieces, repeat=True)
    async with world(servers={(PUBLIC, 80): server}, max_image_bytes=4096) as (fetcher, _, _):
        started = trio.current_time()
        await refused(fetcher.fetch("http://pictures.example/", FIELD), "image_file_too_large")
        assert trio.current_time() == started  # the deadline had no part in it


async def test_a_video_has_a_limit_of_its_own_and_its_name_in_errors() -> None:
    server = Says(ok(bytes(4097)), repeat=True)
    async with world(servers={(PUBLIC, 80): server}, max_image_bytes=4096) as (fetcher, _, _):
        url = "http://pictures.example/"
        assert len(await fetcher.fetch(url, FIELD, what="video", most=5000)) == 4097
        with pytest.raises(RkvlmdError, match="the video file is larger than 4000 bytes"):
            await fetcher.fetch(url, FIELD, what="video", most=4000)


async def test_exactly_the_limit() -> None:
    server = Says(ok(bytes(4096)))
    async with world(servers={(PUBLIC, 80): server}, max_image_bytes=4096) as (fetcher, _, _):
        assert len(await fetcher.fetch("http://pictures.example/", FIELD)) == 4096


@pytest.mark.parametrize(
    ("first", "drip"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"a"),
        (CHUNKED, b"1\r\na\r\n"),
        (b"HTTP/1.1 200 OK\r\nX: ", b"a"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", b""),
        (b"", b""),
    ],
    ids=["body", "chunks", "head", "interim", "nothing"],
)
async def test_slow_drip_ends_at_the_deadline(
    first: bytes, drip: bytes, autojump_clock: object
) -> None:
    async def serve(stream: trio.abc.Stream) -> None:
        await stream.send_all(first)
        while True:
            await trio.sleep(0.9)
            await stream.send_all(drip)

    async with world(servers={(PUBLIC, 80): serve}, fetch_seconds=7.0) as (fetcher, _, _):
        started = trio.current_time()
        await refused(fetcher.fetch("http://pictures.example/", FIELD), "failed_to_download_image")
        assert trio.current_time() - started == pytest.approx(7.0)


async def test_the_deadline_counts_all_hops(autojump_clock: object) -> None:
    server = Says(redirect("/again"), pause=3.0)
    async with world(servers={(PUBLIC, 80): server}, fetch_seconds=7.0, max_redirects=100) as (
        fetcher,
        _,
        _,
    ):
        started = trio.current_time()
        await refused(fetcher.fetch("http://pictures.example/", FIELD), "failed_to_download_image")
        assert trio.current_time() - started == pytest.approx(7.0)


async def test_silent_resolver_ends_at_the_deadline(autojump_clock: object) -> None:
    async def silent(host: str, port: int) -> list[Any]:
        await trio.sleep_forever()
        raise AssertionError

    fetcher = Fetcher(MediaSettings(remote=True), resolve=silent)
    await refused(fetcher.fetch("http://pictures.example/", FIELD), "failed_to_download_image")


@pytest.mark.parametrize("most", [0, 1, 3])
async def test_endless_redirects(most: int) -> None:
    server = Says(redirect("/again", 307))
    async with world(servers={(PUBLIC, 80): server}, max_redirects=most) as (fetcher, _, _):
        await refused(fetcher.fetch("http://pictures.example/", FIELD), "failed_to_download_image")
        assert len(server.heads) == most + 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirect_to_another_server(status: int) -> None:
    first = Says(redirect("http://other.example:81/b.png?c#d", status))
    second = Says(ok(PICTURE))
    servers: dict[tuple[str, int], Serve] = {(PUBLIC, 80): first, (OTHER, 81): second}
    async with world({"other.example": [[OTHER]]}, servers) as (fetcher, names, _):
        assert await fetcher.fetch("http://pictures.example/a.png", FIELD) == PICTURE
        assert names.asked == ["pictures.example", "other.example"]
    assert second.heads[0].startswith(b"GET /b.png?c HTTP/1.1\r\nHost: other.example:81\r\n")


async def test_only_so_many_at_once(autojump_clock: object) -> None:
    running = most = 0

    async def serve(stream: trio.abc.Stream) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await Says(ok(PICTURE), pause=5.0)(stream)
        running -= 1

    async with world(servers={(PUBLIC, 80): serve}, max_fetches=2, fetch_seconds=6.0) as (
        fetcher,
        _,
        _,
    ):
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(fetcher.fetch, "http://pictures.example/", FIELD)
            await trio.testing.wait_all_tasks_blocked()
            assert fetcher.statistics().running == 2
            assert fetcher.statistics().waiting == 4
        # Waiting for a turn is not part of the time of a fetch: nobody was too late.
        assert fetcher.statistics().done == 6
    assert most == 2


# --- servers that are wrong ------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\n", b"\x16\x03\x01\x02\x00", b"HTTP/9 1 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", CHUNKED + b"5\r\nabc", CHUNKED + b"zz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200000 + b"\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\n\r\n" * 9 + ok(PICTURE),
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n", b"HTTP/1.1 206 Partial\r\nContent-Length: 1\r\n\r\na",
        b"HTTP/1.1 304 Not Modified\r\n\r\n", b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", ok(PICTURE, "Content-Encoding: gzip"),
        b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: /\xff\r\nContent-Length: 0\r\n\r\n",
    ],
)  # fmt: skip
async def test_wrong_answers(answer: bytes) -> None:
    async with world(servers={(PUBLIC, 80): Says(answer)}) as (fetcher, _, _):
        with trio.fail_after(60):
            await refused(
                fetcher.fetch("http://pictures.example/", FIELD), "failed_to_download_image"
            )
        assert fetcher.statistics().failed == 1


async def test_empty_file() -> None:
    async with world(servers={(PUBLIC, 80): Says(ok(b""))}) as (fetcher, _, _):
        await refused(fetcher.fetch("http://pictures.example/", FIELD), "empty_image_file")


async def test_unknown_name_and_closed_port() -> None:
    async with world() as (fetcher, _, _):
        for url in ("http://nobody.example/", "http://pictures.example/"):
            await refused(fetcher.fetch(url, FIELD), "failed_to_download_image")


def test_cancelled_at_every_step() -> None:
    fetchers: list[Fetcher] = []

    async def scenario() -> None:
        servers: dict[tuple[str, int], Serve] = {(PUBLIC, 80): Says(redirect("http://o.example/"))}
        servers[OTHER, 80] = Says(CHUNKED, b"5\r\nabcde\r\n", b"0\r\n\r\n")
        async with world({"o.example": [[OTHER]]}, servers, max_fetches=1) as (fetcher, _, _):
            fetchers.append(fetcher)
            async with trio.open_nursery() as nursery:
                for _ in range(2):
                    nursery.start_soon(fetcher.fetch, "http://pictures.example/", FIELD)

    def check() -> None:
        assert not fetchers or fetchers[-1].statistics().running == 0

    steps = cancel_everywhere(
        scenario, check, clock=partial(trio.testing.MockClock, autojump_threshold=0)
    )
    assert steps > 20
    assert fetchers[-1].statistics().done == 2


# --- the real thing, on the loopback interface -----------------------------------------


async def test_real_sockets(nursery: trio.Nursery) -> None:
    server = Says(ok(PICTURE))
    listeners: list[trio.SocketListener] = await nursery.start(
        partial(trio.serve_tcp, _then_close(server), 0, host="127.0.0.1")
    )
    port = listeners[0].socket.getsockname()[1]
    with trio.fail_after(60):
        fetcher = Fetcher(MediaSettings(remote=True, allow=(f"127.0.0.1/32:{port}",)))
        assert await fetcher.fetch(f"http://127.0.0.1:{port}/a.png", FIELD) == PICTURE
        # The system's resolver knows this name without asking anybody.
        fetcher = Fetcher(MediaSettings(remote=True, allow=(f"localhost:{port}",)))
        assert await fetcher.fetch(f"http://localhost:{port}/a.png", FIELD) == PICTURE
        for host in ("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]"):
            fetcher = Fetcher(MediaSettings(remote=True))
            await refused(fetcher.fetch(f"http://{host}:{port}/", FIELD), "invalid_image_url")
    assert len(server.heads) == 2


async def test_proxies_of_the_environment_are_not_used(
    monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    server, proxy = Says(ok(PICTURE)), Says(ok(b"proxy"))
    ports = []
    for serve in (server, proxy):
        listeners: list[trio.SocketListener] = await nursery.start(
            partial(trio.serve_tcp, _then_close(serve), 0, host="127.0.0.1")
        )
        ports.append(listeners[0].socket.getsockname()[1])
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{ports[1]}")
    fetcher = Fetcher(MediaSettings(remote=True, allow=("127.0.0.1",)))
    with trio.fail_after(60):
        assert await fetcher.fetch(f"http://127.0.0.1:{ports[0]}/", FIELD) == PICTURE
    assert not proxy.heads


async def test_tls_checks_the_name_in_the_url() -> None:
    ca = trustme.CA()
    seen: list[str | None] = []
    good = _tls(ca, "pictures.example", Says(ok(PICTURE)), seen)
    async with _tls_world(ca, {(PUBLIC, 443): good}) as (fetcher, _):
        assert await fetcher.fetch("https://pictures.example/", FIELD) == PICTURE
    assert seen == ["pictures.example"]
    other = _tls(ca, "other.example", Says(ok(PICTURE)))
    stranger = _tls(trustme.CA(), "pictures.example", Says(ok(PICTURE)))

    async def plain(stream: trio.abc.Stream) -> None:
        await stream.send_all(ok(PICTURE))

    for server in (other, stranger, plain):
        async with _tls_world(ca, {(PUBLIC, 443): server}) as (fetcher, _):
            await refused(
                fetcher.fetch("https://pictures.example/", FIELD), "failed_to_download_image"
            )


async def test_tls_to_an_address() -> None:
    ca = trustme.CA()
    server = _tls(ca, PUBLIC, Says(ok(PICTURE)))
    async with _tls_world(ca, {(PUBLIC, 443): server}) as (fetcher, _):
        assert await fetcher.fetch(f"https://{PUBLIC}/", FIELD) == PICTURE


def _then_close(serve: Serve) -> Callable[[trio.SocketStream], Awaitable[None]]:
    async def handler(stream: trio.SocketStream) -> None:
        async with stream:
            await serve(stream)

    return handler


def _tls(ca: trustme.CA, name: str, serve: Serve, seen: list[str | None] | None = None) -> Serve:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(name).configure_cert(context)
    if seen is not None:
        context.sni_callback = lambda _socket, name, _context: seen.append(name)

    async def inside(stream: trio.abc.Stream) -> None:
        await serve(trio.SSLStream(stream, context, server_side=True, https_compatible=True))

    return inside


@asynccontextmanager
async def _tls_world(
    ca: trustme.CA, servers: dict[tuple[str, int], Serve]
) -> AsyncIterator[tuple[Fetcher, Network]]:
    def tls() -> ssl.SSLContext:
        context = ssl.create_default_context()
        ca.configure_trust(context)
        return context

    async with trio.open_nursery() as nursery:
        network = Network(nursery, servers)
        names = Names({"pictures.example": [[PUBLIC]]})
        with trio.fail_after(60):
            yield (
                Fetcher(MediaSettings(remote=True), resolve=names, connect=network, tls=tls),
                network,
            )
        nursery.cancel_scope.cancel()
