"""Who is let in, what is refused, and that a refusal is always seen in the house's shape."""

from __future__ import annotations

import logging
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from rkvlmd.errors import SettingsError
from rkvlmd.front.http.intake import UnknownFields
from rkvlmd.settings import check, parse
from tests.fakes.house import connected, running, settings

BODY = b'{"messages":[{"role":"user","content":"hi"}]}'
CHAT = "/v1/chat/completions"


# --- Host --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:80",
        "localhost.",
        "127.0.0.1",
        "127.0.0.1:8080",
        "127.0.0.2",
        "[::1]:9",
    ],
)
async def test_own_names_and_addresses_are_let_in(host: str) -> None:
    async with running() as house, connected(house) as client:
        with trio.fail_after(60):
            await client.get("/v1/models", f"host: {host}")
            assert (await client.reply()).status == 200


async def test_the_name_of_this_machine_and_allowed_names_are_let_in() -> None:
    name = socket.gethostname()
    async with running(settings(allowed_hosts=("Board.Example",))) as house:
        with trio.fail_after(60):
            for host in (name, name.partition(".")[0] + ".local:1", "board.example:8080"):
                async with connected(house) as client:
                    await client.get("/livez", f"host: {host}")
                    assert (await client.reply()).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "localhost.evil.example", "evil.example:8080", "127.0.0.1.evil.example",
        "192.0.2.7", "[2001:db8::1]", "", "[::1", "a b", "localhost:x", "localhost@evil.example",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/livez", "/v1/models", CHAT])
async def test_a_foreign_host_is_refused_everywhere(path: str, host: str) -> None:
    async with running() as house, connected(house) as client:
        with trio.fail_after(60):
            if path == CHAT:
                data = (
                    f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(BODY)}\r\n\r\n"
                )
                await client.send(data.encode() + BODY)
            else:
                await client.get(path, f"host: {host}")
            reply = await client.reply()
            assert (reply.status, reply.code()) == (403, "host_not_allowed")
            assert "access-control-allow-origin" not in reply.headers
            assert not house.scheduler.jobs


async def test_a_public_bind_without_keys_is_refused_by_the_settings() -> None:
    for bind in ("0.0.0.0:8080", "[::]:8080", "192.0.2.1:80", ":80"):
        with pytest.raises(SettingsError, match=r"http\.bind"):
            parse(f'[http]\nbind = "{bind}"\n')
    assert not check(parse('[http]\nbind = "0.0.0.0:80"\nallow_unauthenticated = true\n'))


async def test_a_public_bind_reports_an_address_that_works_here() -> None:
    chosen = settings(allow_unauthenticated=True)
    chosen = replace(chosen, http=replace(chosen.http, bind="0.0.0.0:0"))
    async with running(chosen) as house:
        assert house.http_address.startswith("http://127.0.0.1:")


# --- keys --------------------------------------------------------------------------------


async def test_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nsecret-1\n\n  schlüssel \n")
    async with running(settings(api_keys_file=str(file))) as house:

        async def status(path: str, *head: str) -> int:
            async with connected(house) as client:
                await client.get(path, "host: localhost", *head)
                reply = await client.reply()
                if reply.status == 401:
                    assert reply.code() == "invalid_api_key"
                    assert reply.headers["www-authenticate"] == "bearer"
                return reply.status

        with trio.fail_after(60):
            for path in ("/livez", "/readyz", "/health", "/v1/health"):
                assert await status(path) == 200
            for path in ("/v1/models", "/v1/models/demo", "/nothing", CHAT):
                assert await status(path) == 401
                assert await status(path, "authorization: Bearer wrong") == 401
                assert await status(path, "authorization: Basic secret-1") == 401
                assert await status(path, "x-api-key: # ours") == 401
                assert await status(path, "authorization: Bearer") == 401
            for head in (
                "authorization: Bearer secret-1", "authorization: bearer  secret-1",
                "x-api-key: secret-1", "x-api-key: schlüssel",
            ):  # fmt: skip
                assert await status("/v1/models", head) == 200
            both = ("x-api-key: wrong", "authorization: Bearer secret-1")
            assert await status("/v1/models", *both) == 200


@pytest.mark.parametrize("text", [None, "", "# nothing\n \n"])
async def test_a_key_file_without_keys_lets_nobody_start(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "keys"
    if text is not None:
        file.write_text(text)
    with pytest.RaisesGroup(SettingsError, flatten_subgroups=True) as caught:
        async with running(settings(api_keys_file=str(file))):
            pytest.fail("it served")
    assert str(tmp_path) not in str(caught.value.exceptions)


# --- request ids, paths and methods ------------------------------------------------------


@pytest.mark.parametrize("given", ["ok-1.2_3", "x" * 64])
async def test_a_valid_request_id_comes_back(given: str) -> None:
    async with running() as house, connected(house) as client:
        with trio.fail_after(60):
            for path in ("/livez", "/nothing"):
                await client.get(path, "host: localhost", f"x-request-id: {given}")
                assert (await client.reply()).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "ä", '"', "a/b"])
async def test_an_invalid_request_id_is_replaced(given: str) -> None:
    async with running() as house, connected(house) as client:
        with trio.fail_after(60):
            await client.get("/livez", "host: localhost", f"x-request-id: {given}")
            assert (await client.reply()).headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("method", "path", "status", "expected"),
    [
        ("GET", "/", 404, "not_found"),
        ("GET", "/v1", 404, "not_found"),
        ("POST", "/v1/completions", 404, "not_found"),
        ("GET", "/docs/../livez", 404, "not_found"),
        ("GET", "*", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("OPTIONS", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models/demo", 405, "method_not_allowed"),
        ("POST", "/livez", 405, "method_not_allowed"),
        ("GET", "/v1/models/%2e%2e%2fetc", 404, "model_not_found"),
    ],
)
async def test_paths_and_methods(method: str, path: str, status: int, expected: str) -> None:
    async with running() as house, connected(house) as client:
        with trio.fail_after(60):
            await client.get(path, method=method)
            reply = await client.reply()
            assert (reply.status, reply.code()) == (status, expected)
            if status == 405:
                assert reply.headers["allow"]
            assert "server" not in reply.headers
            await client.get("/livez")
            assert (await client.reply()).status == 200


# --- what is not HTTP/1.1 ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"rubbish\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -5\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 40_000, 431),
    ],
)
async def test_no_http(data: bytes, status: int) -> None:
    async with running() as house, connected(house) as client:
        with trio.fail_after(60):
            await client.send(data)
            reply = await client.reply()
            assert reply.status == status
            assert reply.code() in {"invalid_request", "request_too_large"}
            assert await client.rest() == b""


async def test_other_protocols_are_not_spoken() -> None:
    async with running() as house:
        with trio.fail_after(60):
            async with connected(house) as client:
                upgrade = (
                    "connection: upgrade, http2-settings",
                    "upgrade: h2c",
                    "http2-settings: ",
                )
                await client.get("/livez", "host: localhost", *upgrade)
                assert (await client.reply()).status == 200
            async with connected(house) as client:
                await client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
                assert (await client.head()).status in {400, 404}
            async with connected(house) as client:
                await client.get(
                    "/livez", "host: localhost", "connection: upgrade", "upgrade: websocket",
                    "sec-websocket-version: 13", "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
                )  # fmt: skip
                assert (await client.head()).status == 403


async def test_a_broken_chunk_ends_the_request_alone() -> None:
    async with running() as house:
        with trio.fail_after(60):
            async with connected(house) as client:
                await client.send(
                    f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\n"
                    "transfer-encoding: chunked\r\n\r\nzz\r\n".encode()
                )
                assert (await client.head()).status == 400
                await client.rest()
            await house.scheduler.until(admitted=0)
            async with connected(house) as client:
                await client.post(BODY)
                assert (await client.reply()).status == 200


def test_unknown_names_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    unknown = UnknownFields()
    for number in range(1000):
        unknown.add((f"name{number}", "name0"))
    assert len(unknown.counts) == UnknownFields.MOST
    assert unknown.counts["name0"] == 1001
    assert len(caplog.records) == UnknownFields.MOST
