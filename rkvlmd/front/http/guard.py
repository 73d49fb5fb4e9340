"""Who may talk to the server: names in ``Host``, and API keys."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import socket
from collections.abc import Iterable
from pathlib import Path

from rkvlmd.errors import RkvlmdError, SettingsError
from rkvlmd.settings import HttpSettings, split_bind

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")


def load_keys(path: str) -> tuple[bytes, ...]:
    """Read the file of API keys, one a line; ``#`` starts a comment line.

    Returns:
      The SHA-256 of each key.

    Raises:
      SettingsError: when it cannot be read or holds no key.

    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError:
        raise SettingsError(["http.api_keys_file: cannot be read"]) from None
    keys = [line.strip() for line in lines]
    keys = [key for key in keys if key and not key.startswith(b"#")]
    if not keys:
        raise SettingsError(["http.api_keys_file: holds no key"])
    return tuple(hashlib.sha256(key).digest() for key in keys)


class Guard:
    """The checks that every request passes before anything else happens.

    The Host check stops DNS rebinding: a page on a name that its owner points
    at this machine is refused, because the name is not one of ours.
    """

    def __init__(self, http: HttpSettings, keys: Iterable[bytes] = ()) -> None:
        self._keys = tuple(keys)
        names = {"localhost", *http.allowed_hosts, *own_names()}
        self._names = {_normal(name) for name in names}
        self._bind = _address(split_bind(http.bind)[0])

    def check_host(self, host: str | None, local: str | None) -> None:
        """Accept own names, allowed names and own addresses.

        Args:
          host: the ``Host`` header; ``None`` only in HTTP/1.0, which no browser speaks.
          local: the address that the connection came in on.

        Raises:
          RkvlmdError: ``host_not_allowed``.

        """
        if host is None:
            return
        match = _HOST.fullmatch(host.strip())
        if match:
            name = match[1].removeprefix("[").removesuffix("]")
            if _normal(name) in self._names:
                return
            address = _address(name)
            if address is not None and self._is_ours(address, local):
                return
        raise RkvlmdError(
            "host_not_allowed",
            "The name in the Host header is not one of this server's (http.allowed_hosts).",
        )

    def _is_ours(self, address: _Address, local: str | None) -> bool:
        here = _address(local) if local else None
        if address == self._bind or address == here:
            return True
        # 127.0.0.2 and ::1 are this machine too, for somebody who is on it
        return address.is_loopback and here is not None and here.is_loopback

    def check_key(self, authorization: bytes | None, api_key: bytes | None) -> None:
        """Accept ``Authorization: Bearer KEY`` or ``x-api-key: KEY``.

        Raises:
          RkvlmdError: ``invalid_api_key``.

        """
        if not self._keys:
            return
        given = [api_key] if api_key is not None else []
        if authorization is not None:
            scheme, _, token = authorization.strip().partition(b" ")
            if scheme.lower() == b"bearer":
                given.append(token)
        # no early way out: how long it takes says nothing about the keys
        good = False
        for token in given:
            digest = hashlib.sha256(token.strip()).digest()
            for key in self._keys:
                good |= hmac.compare_digest(digest, key)
        if not good:
            raise RkvlmdError("invalid_api_key", "The API key is missing or wrong.")


_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def own_names() -> set[str]:
    """Return the names by which machines of this network know this one."""
    name = socket.gethostname()
    return {name, name.partition(".")[0] + ".local"} if name else set()


def _normal(name: str) -> str:
    return name.lower().removesuffix(".")


def _address(text: str) -> _Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped
    return address
