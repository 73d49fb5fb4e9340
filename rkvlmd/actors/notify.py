"""What the daemon tells systemd: ready, status, stopping, and that it is well (sd_notify(3))."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, MutableMapping

import trio

log = logging.getLogger(__name__)

#: Longest wait for the manager's socket to take a datagram, seconds. Its queue is only full
#: while the manager is stuck; blocking the loop longer than this would help nobody.
_SEND_SECONDS = 0.5
#: Longest status text, characters.
_STATUS_CHARS = 500


class Notify:
    """The notification socket of the service; without one, every call does nothing.

    The variables are taken out of ``env``, so that children do not inherit
    them and cannot speak for the daemon. ``watchdog_interval`` is the time in
    seconds within which systemd wants a beat, or ``None``.
    """

    def __init__(self, env: MutableMapping[str, str] = os.environ) -> None:
        self._address = _address(env.pop("NOTIFY_SOCKET", ""))
        usec, pid = env.pop("WATCHDOG_USEC", ""), env.pop("WATCHDOG_PID", "")
        meant = pid in {"", str(os.getpid())}
        valid = usec.isdecimal() and int(usec) > 0
        self.watchdog_interval: float | None = None
        if self._address and meant and valid:
            self.watchdog_interval = int(usec) / 1e6

    def ready(self) -> None:
        """Both fronts listen."""
        self._send("READY=1")

    def reloading(self) -> None:
        """The settings are read again; ``ready`` says that it is done."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def status(self, text: str) -> None:
        """One line for ``systemctl status``."""
        self._send("STATUS=" + " ".join(text.split())[:_STATUS_CHARS])

    def stopping(self) -> None:
        """The stop has begun; it cannot be taken back."""
        self._send("STOPPING=1")

    def extend_timeout(self, seconds: float) -> None:
        """Ask for at least this much more time to start or stop."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    async def run_watchdog(self, healthy: Callable[[], bool]) -> None:
        """Beat at half the interval while ``healthy()``; return at once where nobody listens.

        A loop that does not turn cannot beat; ``healthy`` adds what a turning
        loop does not show. Where it stays false, systemd ends the daemon.
        """
        if self.watchdog_interval is None:
            await trio.lowlevel.checkpoint()
            return
        well = True
        while True:
            if healthy():
                well = True
                self._send("WATCHDOG=1")
            elif well:
                well = False
                log.error("not healthy: no more beats for the watchdog")
            await trio.sleep(self.watchdog_interval / 2)

    def _send(self, state: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(_SEND_SECONDS)
                sock.connect(self._address)
                sock.send(state.encode(errors="replace"))
        except OSError as exc:
            log.warning("systemd did not take %s: %s", state.partition("=")[0], exc.strerror)


def _address(given: str) -> str:
    """Return the socket's address: a path, or a name in the abstract namespace."""
    if given.startswith("@"):
        return "\0" + given[1:]
    return given if given.startswith("/") else ""
