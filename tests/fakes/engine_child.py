"""The daemon's side of a child, without trio: a blocking socket and a real process."""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from rkvlmd.engine import memfd
from rkvlmd.wire import child, frames

#: Nothing in a test takes longer, even on a busy machine.
PATIENCE = 60.0

M = TypeVar("M")


class Peer:
    """Sends orders, receives answers with their descriptors."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(PATIENCE)
        self._decoder = frames.FrameDecoder()
        self._messages: list[dict[str, Any]] = []
        self._fds: list[int] = []
        self.beats = 0

    def send(self, message: child.ToChild, fds: Sequence[int] = ()) -> None:
        built = child.build(message)
        built["fds"] = len(fds)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        frame = frames.encode(built)
        sent = self.sock.sendmsg([frame], rights)
        if sent < len(frame):  # else sending nothing would fail, where the child died of this
            self.sock.sendall(frame[sent:])
        for fd in fds:
            os.close(fd)

    def receive(self) -> tuple[child.FromChild, list[int]]:
        while not self._messages:
            data, ancillary, _, _ = self.sock.recvmsg(1 << 18, 4096)
            for _, _, body in ancillary:
                fds = array.array("i")
                fds.frombytes(body)
                self._fds.extend(fds)
            if not data:
                raise EOFError
            self._messages += self._decoder.feed(data)
        message = child.parse_from_child(self._messages.pop(0))
        fds, self._fds = self._fds[: message.fds], self._fds[message.fds :]
        return message, fds

    def until(self, kind: type[M]) -> tuple[M, list[int]]:
        """Skip beats and progress; the next message must be a ``kind``."""
        while True:
            message, fds = self.receive()
            if isinstance(message, kind):
                return message, fds
            self.beats += isinstance(message, child.Beat)
            assert isinstance(message, child.Beat | child.Progress), message

    def array(self, fd: int, tensor: child.Tensor) -> Any:
        mapped = memfd.map_array(fd, tensor)
        os.close(fd)
        return mapped


class Process(Peer):
    """A running child."""

    def __init__(self, role: str, *arguments: str, script: dict[str, Any] | None = None) -> None:
        ours, theirs = socket.socketpair()
        more = [*arguments, *(["--script", json.dumps(script)] if script is not None else [])]
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "rkvlmd.engine", role, "--name", "test",
             "--fd", str(theirs.fileno()), *more],
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        theirs.close()
        super().__init__(ours)

    def hello(self) -> child.Hello:
        message, _ = self.receive()
        assert isinstance(message, child.Hello)
        return message

    def loaded(self, **options: Any) -> Process:
        """Say hello and load."""
        self.hello()
        self.send(child.Load(folder="/nowhere", manifest={}, options=options))
        self.until(child.Ready)
        return self

    def wait(self) -> int:
        """Wait for the end; negative for a signal."""
        return self.popen.wait(PATIENCE)

    def words(self) -> str:
        """What it printed; waits for the end."""
        assert self.popen.stdout is not None
        text = self.popen.stdout.read().decode(errors="replace")
        self.wait()
        return text

    def eof(self) -> bool:
        """Wait until its socket is closed, dropping what it still says."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            select.select([self.sock], [], [], PATIENCE)
            try:
                if not self.sock.recv(1 << 18):
                    return True
            except ConnectionError:
                return True
        return False


@contextlib.contextmanager
def started(role: str, *arguments: str, script: dict[str, Any] | None = None) -> Iterator[Process]:
    """Start a child; kill it at the end, however it is."""
    process = Process(role, *arguments, script=script)
    try:
        yield process
    finally:
        process.popen.kill()
        process.sock.close()
        process.popen.wait(PATIENCE)
        if process.popen.stdout is not None:
            process.popen.stdout.close()
