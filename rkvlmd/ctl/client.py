"""One blocking connection to the control socket."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from rkvlmd.paths import SYSTEM_CONTROL, default_control_path
from rkvlmd.wire import control

#: How long the daemon may take to accept, and to answer what needs no waiting, seconds.
QUICK_SECONDS = 10.0
#: Longest line that is read. The daemon says a few hundred bytes a model or job.
MAX_LINE_BYTES = 8 << 20
_UCRED = struct.Struct("iII")


class CtlError(Exception):
    """Why a command was not done; ``code`` as in the daemon's errors."""

    exit_status = 1

    def __init__(self, message: str, *, code: str = "failed", param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param
        #: More for scripts, beside code and message.
        self.details: dict[str, Any] = {}


class NoDaemonError(CtlError):
    """Nobody answers on the control socket."""

    exit_status = 3


class RefusedError(CtlError):
    """The daemon knows who asks, and does not let them."""

    exit_status = 4


class Client:
    """A connection to the daemon; use it in a ``with`` block.

    Args:
      path: the control socket; ``None`` tries this user's own, then the
        service's.

    Raises:
      NoDaemonError: nobody listens there.
      RefusedError: this user may not open the socket.

    """

    def __init__(self, path: Path | None = None) -> None:
        self._sock = _connect_default() if path is None else _connect(path)
        self._decoder = control.LineDecoder(MAX_LINE_BYTES)
        self._lines: list[bytes] = []
        self._id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def call(
        self,
        method: str,
        params: dict[str, str] | None = None,
        *,
        progress: Callable[[control.Progress], None] | None = None,
    ) -> dict[str, Any]:
        """Call and wait for the answer.

        With ``progress`` the wait has no bound of its own: the daemon bounds
        loads, and each step is handed to ``progress``.

        Raises:
          CtlError: the daemon could not; ``RefusedError``: it would not;
            ``NoDaemonError``: it left.

        """
        self._id += 1
        self._sock.settimeout(QUICK_SECONDS)
        try:
            # Where it closed already, what it said before is still to be read.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._sock.sendall(control.encode(control.call(method, params or {}, self._id)))
        except TimeoutError:
            raise NoDaemonError("the daemon does not answer", code="no_daemon") from None
        if progress is not None:
            self._sock.settimeout(None)
        while True:
            said = self._next()
            if isinstance(said, control.Progress):
                if progress is not None:
                    progress(said)
            elif isinstance(said, control.Answer) and said.id in {self._id, None}:
                if said.error is not None:
                    raise _error_of(said.error)
                return said.result or {}

    def _next(self) -> control.Progress | control.Answer | None:
        try:
            while not self._lines:
                data = self._sock.recv(65536)
                if not data:
                    raise NoDaemonError("the daemon closed the connection", code="no_daemon")
                self._lines = self._decoder.feed(data)
            return control.parse_answer(self._lines.pop(0))
        except TimeoutError:
            raise NoDaemonError("the daemon does not answer", code="no_daemon") from None
        except OSError:
            raise NoDaemonError("the daemon closed the connection", code="no_daemon") from None
        except (ValueError, control.LineTooLongError):
            message = "what listens there does not speak the protocol of rkvlmd"
            raise CtlError(message, code="protocol") from None


def _error_of(error: control.RpcError) -> CtlError:
    data = error.data or {}
    code, param = str(data.get("code", "failed")), data.get("param")
    cls = RefusedError if error.number == control.PERMISSION_DENIED else CtlError
    return cls(error.message, code=code, param=param if isinstance(param, str) else None)


def _connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(QUICK_SECONDS)
    try:
        sock.connect(str(path))
    except PermissionError:
        sock.close()
        raise RefusedError(f"no permission to open {path}", code="permission_denied") from None
    except OSError:
        sock.close()
        message = f"no daemon answers on {path}; is rkvlmd running?"
        raise NoDaemonError(message, code="no_daemon") from None
    return sock


def _connect_default() -> socket.socket:
    own = default_control_path()
    try:
        sock = _connect(own)
    except CtlError:
        if own == SYSTEM_CONTROL:
            raise
        try:
            return _connect(SYSTEM_CONTROL)
        except NoDaemonError:
            message = f"no daemon answers on {own} or {SYSTEM_CONTROL}; is rkvlmd running?"
            raise NoDaemonError(message, code="no_daemon") from None
    if own != SYSTEM_CONTROL and _uid_of(sock) not in {0, os.geteuid()}:
        # Anybody can make a folder of that name in /tmp first.
        sock.close()
        message = f"what listens on {own} belongs to another user; name it with --control"
        raise NoDaemonError(message, code="no_daemon")
    return sock


def _uid_of(sock: socket.socket) -> int:
    cred = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(cred)[1])
