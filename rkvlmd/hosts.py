"""How the settings write hosts, ports and networks."""

from __future__ import annotations

import ipaddress
import re

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


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
