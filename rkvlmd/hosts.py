"""How the settings write hosts, ports and networks."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

#: The client at the other end of a Unix socket, which has no address.
LOCAL = "local"


def split_bind(bind: str) -> tuple[str, int]:
    """Split ``HOST:PORT`` (``[V6]:PORT``) into a host and a port.

    Raises:
      ValueError: when it is neither.

    """
    host, colon, port = bind.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise ValueError("must be HOST:PORT")
    return host.removeprefix("[").removesuffix("]") or "0.0.0.0", int(port)


def is_loopback(host: str) -> bool:
    """Whether a bind to ``host`` can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def split_allow(entry: str) -> tuple[Network | str, int | None]:
    """Split an entry of ``media.allow`` into a network or a lower-case host, and a port.

    Entries are ``CIDR``, ``CIDR:PORT``, ``[CIDR]:PORT`` (IPv6), ``HOST`` or
    ``HOST:PORT``; without a port all ports are meant, and the port is ``None``.

    Raises:
      ValueError: when it is none of them.

    """
    where, port = entry, ""
    if entry.startswith("["):
        where, bracket, port = entry[1:].partition("]")
        if not bracket or ":" not in where:
            raise ValueError("brackets are for IPv6")
    elif entry.count(":") == 1:
        where, _, port = entry.partition(":")
        port = ":" + port
    if port and not (re.fullmatch(r":[0-9]{1,5}", port) and 0 < int(port[1:]) < 65536):
        raise ValueError("the port must be 1 to 65535")
    number = int(port[1:]) if port else None
    try:
        return ipaddress.ip_network(where), number
    except ValueError:
        host = where.lower().removesuffix(".")
        # A name whose last label is a number is a mistyped address.
        if not re.fullmatch(r"([a-z0-9_-]+\.)*[a-z_-][a-z0-9_-]*", host):
            raise ValueError("must be CIDR (no bits set right of the mask) or HOST") from None
        return host, number


def client_network(entry: str) -> Network | None:
    """Parse an entry of a list of clients; ``local``, the peers of a Unix socket, is ``None``.

    Raises:
      ValueError: when it is neither an address nor a network.

    """
    if entry == LOCAL:
        return None
    try:
        return ipaddress.ip_network(entry)
    except ValueError:
        raise ValueError(
            "must be an address, CIDR (no bits set right of the mask) or local"
        ) from None


def is_client(client: str, networks: Iterable[Network | None]) -> bool:
    """Whether a client, by its address or ``local``, is in one of the networks."""
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client == LOCAL and None in networks
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return any(network is not None and address in network for network in networks)
