"""The child's end of its socketpair: frames and descriptors, in order."""

from __future__ import annotations

import array
import os
import socket
import threading
from collections import deque
from collections.abc import Sequence

from rkvlmd.wire import child, frames

_READ = 1 << 18
_ROOM = socket.CMSG_SPACE(frames.MAX_FDS * array.array("i").itemsize)

Received = tuple[child.ToChild, list[int]]


class Channel:
    """Reads on one thread, sends from any.

    Resource handling: descriptors that a frame brought belong to the caller of
    ``receive``; those given to ``send`` stay the caller's, who may close them
    when it returns.
    """

    def __init__(self, sock: socket.socket) -> None:
        # The other side may have made its pair non-blocking.
        sock.setblocking(True)
        sock.set_inheritable(False)
        self._sock = sock
        self._decoder = frames.FrameDecoder()
        self._fds: deque[int] = deque()
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """Return the socket's descriptor, to wait on."""
        return self._sock.fileno()

    def receive(self) -> list[Received]:
        """Wait for bytes; return the orders that are whole now, each with its descriptors.

        Raises:
          EOFError: the other side is gone.
          frames.FrameError: it does not speak frames, or descriptors got lost.
          msgspec.ValidationError: it does not speak this protocol.

        """
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(_READ, _ROOM, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError as exc:
            raise EOFError from exc
        for level, kind, body in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(body[: len(body) - len(body) % fds.itemsize])
                self._fds.extend(fds)
        if flags & socket.MSG_CTRUNC:
            raise frames.FrameError("descriptors were cut off")
        if not data:
            raise EOFError
        received: list[Received] = []
        for message in self._decoder.feed(data):
            count = message.get("fds", 0)
            if count > len(self._fds):
                raise frames.FrameError("frame without its descriptors")
            received.append(
                (
                    child.parse_to_child(message),
                    [self._fds.popleft() for _ in range(count)],
                )
            )
        if self._fds and not self._decoder.pending:
            raise frames.FrameError("descriptors without a frame")
        return received

    def send(self, message: child.FromChild, fds: Sequence[int] = ()) -> None:
        """Send one frame whole; waits while the other side does not read.

        Raises:
          ConnectionError: the other side is gone.

        """
        frame = _frame(message, fds)
        with self._lock:
            self._send(frame, fds, 0)

    def send_nowait(self, message: child.FromChild) -> bool:
        """Send one frame unless that would wait; return whether it went."""
        frame = _frame(message, ())
        if not self._lock.acquire(blocking=False):
            return False
        try:
            self._send(frame, (), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        finally:
            self._lock.release()
        return True

    def _send(self, frame: bytes, fds: Sequence[int], flags: int) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = self._sock.sendmsg([frame], ancillary, flags)
        if sent < len(frame):
            # Descriptors travel with the first byte, so the rest is bytes alone.
            self._sock.sendall(memoryview(frame)[sent:])

    def close(self) -> None:
        """Close the socket and every descriptor that no frame claimed."""
        close_all(self._fds)
        self._fds.clear()
        self._sock.close()


def close_all(fds: Sequence[int] | deque[int]) -> None:
    """Close descriptors; one that is closed already is no error."""
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            continue


def _frame(message: child.FromChild, fds: Sequence[int]) -> bytes:
    built = child.build(message)
    built["fds"] = len(fds)
    return frames.encode(built)
