"""URLs are read in one way only, and addresses are public only when they surely are."""

from __future__ import annotations

import ipaddress

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given

from rkvlmd.wire import urls

labels = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
hosts = st.lists(labels, min_size=1, max_size=4).map(".".join)
paths = st.lists(st.text("abcé%20/.?=&;+~", max_size=8), max_size=3).map(
    lambda p: "/" + "/".join(p)
)


@given(st.sampled_from(["http", "https"]), hosts, st.integers(1, 65535), paths)
def test_there_and_back(scheme: str, host: str, port: int, path: str) -> None:
    target = urls.parse(f"{scheme.upper()}://{host.upper()}:{port}{path}")
    assert (target.scheme, target.host, target.port) == (scheme, host, port)
    assert target.path.isascii()
    assert target.literal is None
    assert urls.parse(target.url) == target


@given(st.ip_addresses(), st.integers(1, 65535))
def test_literals(address: urls.Address, port: int) -> None:
    assume(getattr(address, "scope_id", None) is None)
    host = f"[{address}]" if address.version == 6 else str(address)
    target = urls.parse(f"http://{host}:{port}/")
    assert target.literal == address
    assert target.host == str(address)
    assert urls.parse(target.url) == target


@given(st.text(max_size=40) | st.text(max_size=30).map(lambda t: f"http://{t}"))
def test_any_text_is_a_target_or_a_url_error(text: str) -> None:
    try:
        target = urls.parse(text)
    except urls.UrlError:
        return
    assert target.host
    assert target.host.isascii()
    assert 0 < target.port < 65536
    assert target.path.startswith("/")
    assert all(0x20 < ord(c) < 0x7F for c in target.path + target.authority)
    assert not set(target.authority) & set("@\\/?# ")


@pytest.mark.parametrize(
    ("url", "host", "port", "path", "authority"),
    [
        ("http://a", "a", 80, "/", "a"),
        ("https://a", "a", 443, "/", "a"),
        ("https://a:443/x", "a", 443, "/x", "a"),
        ("http://a:443/x", "a", 443, "/x", "a:443"),
        ("http://A.Example./x#y", "a.example", 80, "/x", "a.example"),
        ("http://a?x=/y", "a", 80, "/?x=/y", "a"),
        ("http://a#@b/", "a", 80, "/", "a"),
        ("http://a/@b:c//d", "a", 80, "/@b:c//d", "a"),
        ("http://[::1]:8080/", "::1", 8080, "/", "[::1]:8080"),
        ("http://[0:0::1]/", "::1", 80, "/", "[::1]"),
        ("http://xn--mnchen-3ya.example/", "xn--mnchen-3ya.example", 80, "/", "xn--mnchen-3ya.example"),
        ("http://a/ü?é", "a", 80, "/%C3%BC?%C3%A9", "a"),
        ("http://1password.example/", "1password.example", 80, "/", "1password.example"),
    ],
)  # fmt: skip
def test_parts(url: str, host: str, port: int, path: str, authority: str) -> None:
    target = urls.parse(url)
    assert (target.host, target.port, target.path) == (host, port, path)
    assert target.authority == authority


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("/b", "http://a.example/b"),
        ("b", "http://a.example/x/b"),
        ("../b", "http://a.example/b"),
        ("?q", "http://a.example/x/y?q"),
        ("//b.example/c", "http://b.example/c"),
        ("https://b.example:444/c#d", "https://b.example:444/c"),
    ],
)
def test_redirects(location: str, expected: str) -> None:
    assert urls.join(urls.parse("http://a.example/x/y"), location).url == expected


def test_redirects_that_are_not_followed() -> None:
    base = urls.parse("https://a.example/")
    assert urls.join(base, "/b").scheme == "https"
    for location in (
        "http://a.example/",
        "file:///x",
        "//u@a.example",
        "\\\\b",
        "a b",
        "",
        "//[::1",
    ):
        with pytest.raises(urls.UrlError):
            urls.join(base, location)


@given(st.ip_addresses(v=4))
def test_mapped_addresses_are_what_they_carry(address: ipaddress.IPv4Address) -> None:
    mapped = ipaddress.IPv6Address(f"::ffff:{address}")
    assert urls.plain(mapped) == address
    assert urls.is_public(mapped) == urls.is_public(address)


@given(st.ip_addresses())
def test_public_is_narrower_than_the_standard_library(address: urls.Address) -> None:
    if urls.is_public(address):
        assert urls.plain(address).is_global
        assert not urls.plain(address).is_private
        assert not urls.plain(address).is_multicast


@pytest.mark.parametrize(
    "address",
    ["1.1.1.1", "8.8.8.8", "93.184.215.14", "192.0.1.1", "2606:4700::1111", "2a00:1450::1"],
)
def test_public(address: str) -> None:
    assert urls.is_public(ipaddress.ip_address(address))


def test_nothing_is_allowed_by_default() -> None:
    target = urls.parse("http://localhost:80/")
    assert not urls.may_connect(target, ipaddress.ip_address("127.0.0.1"), urls.Allowed())
    assert urls.may_connect(target, ipaddress.ip_address("127.0.0.1"), urls.Allowed(["localhost"]))


def test_wrong_entries_are_refused() -> None:
    with pytest.raises(ValueError, match="CIDR"):
        urls.Allowed(["10.0.0.1/8"])
