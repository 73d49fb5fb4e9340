"""Which http(s) URLs may be fetched: a strict parser, and the rules about addresses.

Nothing here resolves or connects. A URL is parsed once, into parts that are
used as they are; whoever connects asks ``may_connect`` about the address that
it is about to use, not about the name.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote, urljoin

from rkvlmd.hosts import split_allow

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

#: Longest URL, characters; what common servers accept in a request line.
MAX_CHARACTERS = 8192

_PORTS = {"http": 80, "https": 443}
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))

# IANA's registries of special-purpose addresses, and the transition prefixes
# (6to4, Teredo) that carry another address inside. ``is_global`` is asked too;
# the lists stand here because its answer differs between Python releases.
_CLOSED_4 = tuple(
    ipaddress.IPv4Network(n)
    for n in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16",
        "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16",
        "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
    )
)  # fmt: skip
_CLOSED_6 = tuple(
    ipaddress.IPv6Network(n) for n in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
)
# The only block that IANA gives out as global unicast. All else is closed:
# mapped and compatible IPv4, NAT64 (64:ff9b::/96), unique and link-local, multicast.
_OPEN_6 = ipaddress.IPv6Network("2000::/3")


class UrlError(ValueError):
    """The URL will not be used; the text is fit for a client and names no address."""


@dataclass(frozen=True, slots=True)
class Target:
    """A parsed URL.

    ``host`` is lower case, without brackets and without a final dot.
    ``literal`` is its address when the URL held one. ``path`` is the request
    target, query included.
    """

    scheme: str
    host: str
    port: int
    path: str
    literal: Address | None = None

    @property
    def authority(self) -> str:
        """What the Host header says."""
        host = (
            f"[{self.host}]"
            if self.literal is not None and self.literal.version == 6
            else self.host
        )
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The whole URL again."""
        return f"{self.scheme}://{self.authority}{self.path}"


def parse(url: str) -> Target:
    """Parse an absolute URL.

    Raises:
      UrlError: for everything but plain http and https. User names, backslashes,
        white space, control characters, zones and host names outside ASCII are
        refused, because programs disagree about what they mean.

    """
    _check_characters(url)
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in _PORTS:
        raise UrlError("only http:// and https:// URLs can be fetched")
    rest = rest.partition("#")[0]
    cut = min((i for i in map(rest.find, "/?") if i >= 0), default=len(rest))
    authority, path = rest[:cut], rest[cut:]
    if not path.startswith("/"):
        path = "/" + path
    host, port, literal = _split_authority(authority.lower())
    return Target(
        scheme=scheme,
        host=host,
        port=_PORTS[scheme] if port is None else port,
        path=quote(path, safe=_PRINTABLE),
        literal=literal,
    )


def join(base: Target, location: str) -> Target:
    """Return where a redirect from ``base`` leads.

    Raises:
      UrlError: as ``parse``, and when the step leaves https for http.

    """
    _check_characters(location)
    try:
        absolute = urljoin(base.url, location)
    except ValueError:  # its own check of brackets
        raise UrlError("the URL holds a wrong IPv6 address") from None
    target = parse(absolute)
    if base.scheme == "https" and target.scheme == "http":
        raise UrlError("the server redirects from https to http")
    return target


def _check_characters(url: str) -> None:
    if not url:
        raise UrlError("the URL is empty")
    if len(url) > MAX_CHARACTERS:
        raise UrlError(f"the URL is longer than {MAX_CHARACTERS} characters")
    if "\\" in url or any(c.isspace() or not c.isprintable() for c in url):
        raise UrlError("the URL holds a backslash, white space or a control character")


def _split_authority(authority: str) -> tuple[str, int | None, Address | None]:
    if "@" in authority:
        raise UrlError("a URL with a user name is not fetched")
    if authority.startswith("["):
        inside, bracket, rest = authority[1:].partition("]")
        try:
            if not bracket or "%" in inside:
                raise ValueError
            literal: Address = ipaddress.IPv6Address(inside)
        except ValueError:
            raise UrlError("the URL holds a wrong IPv6 address") from None
        return str(literal), _port(rest), literal
    host, colon, digits = authority.partition(":")
    port = _port(colon + digits)
    host = host.removesuffix(".")
    labels = host.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        # 127.1, 0x7f000001 and 0177.0.0.1 are addresses to inet_aton; here only
        # four plain decimal numbers are.
        try:
            return host, port, ipaddress.IPv4Address(host)
        except ValueError:
            raise UrlError("the URL holds a wrong IPv4 address") from None
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise UrlError("the URL holds a wrong host name")
    return host, port, None


def _port(text: str) -> int | None:
    if not text:
        return None
    digits = text[1:]
    if text[0] != ":" or not re.fullmatch(r"[0-9]{1,5}", digits) or not 0 < int(digits) < 65536:
        raise UrlError("the URL holds a wrong port")
    return int(digits)


def plain(address: Address) -> Address:
    """Return the IPv4 address inside an IPv4-mapped one; any other as it is."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def is_public(address: Address) -> bool:
    """Whether ``address`` belongs to the public internet, and to a single machine there."""
    address = plain(address)
    if address.is_multicast or not address.is_global:
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _CLOSED_4)
    return address in _OPEN_6 and not any(address in network for network in _CLOSED_6)


class Allowed:
    """The setting ``media.allow``: what may be fetched although it is not public.

    An entry is ``CIDR`` or ``HOST``, with ``:PORT`` or for all ports;
    ``[CIDR]:PORT`` for IPv6. A host entry trusts every address that the
    resolver gives for that name.

    Raises:
      ValueError: for an entry that is neither.

    """

    def __init__(self, entries: Iterable[str] = ()) -> None:
        self._rules = tuple(split_allow(entry) for entry in entries)

    def __contains__(self, where: tuple[str, Address, int]) -> bool:
        host, address, port = where
        return any(
            rule_port in {None, port}
            and (rule == host if isinstance(rule, str) else address in rule)
            for rule, rule_port in self._rules
        )


def may_connect(target: Target, address: Address, allowed: Allowed) -> bool:
    """Whether ``target`` may be fetched from ``address``.

    The unspecified address and multicast are refused whatever is allowed:
    no picture is served there, and 0.0.0.0 is another name of this machine.
    """
    address = plain(address)
    if address.is_unspecified or address.is_multicast:
        return False
    return is_public(address) or (target.host, address, target.port) in allowed
