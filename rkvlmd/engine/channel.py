"""The child's end of its socketpair: frames and descriptors, in order."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence

from rkvlmd.wire import child, frames

_READ = 1 << 18
#: Frames that may wait for the channel's own thread; who sends one more sends them himself.
MOST_LATER = 256
_ROOM = socket.CMSG_SPACE(frames.MAX_FDS * array.array("i").itemsize)

Received = tuple[child.ToChild, list[int]]


class Rhythm:
    """When the next of some regular events should have come; times in seconds.

    The gap between two follows the shortest one at once, and longer ones by a
    tenth each. An event is noticed ``gap / 16`` after it came, within the bounds of
    ``STEPS``, if it comes in time or late, and at most a gap after it came.
    """

    #: Shortest and longest time between two looks.
    STEPS = (0.00025, 0.002)

    def __init__(self) -> None:
        self._last: float | None = None
        self._gap = 0.0

    def heard(self, *times: float) -> None:
        """Learn when events came, in order."""
        for at in times:
            if self._last is not None:
                gap = max(at - self._last, 0.0)
                self._gap = min(gap, 1.1 * self._gap) if self._gap > 0 else gap
            self._last = at

    def pause(self, now: float) -> float:
        """Return how long to wait for the next look."""
        least, most = self.STEPS
        step = min(max(self._gap / 16, least), most)
        due = now if self._last is None else self._last + self._gap + step
        return max(due - now, step)


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
        #: When each was given to ``send_later`` or ``hold``, and what.
        self._later: deque[tuple[float, child.FromChild]] = deque()
        #: Locked while the thread has nothing to wait for; made with it.
        self._bell: threading.Lock | None = None
        #: Whether the thread looks by itself.
        self._flows = False
        self._error: OSError | None = None

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
        """Send one frame whole, behind those of ``send_later``; waits while nobody reads.

        Raises:
          ConnectionError: the other side is gone.

        """
        frame = _frame(message, fds)
        self._flows = False
        with self._lock:
            self._send(self._waiting() + frame, fds, 0)

    def hold(self, message: child.FromChild) -> None:
        """Send one frame without descriptors together with the next one of this thread."""
        self._later.append((time.monotonic(), message))

    def send_later(self, message: child.FromChild) -> None:
        """Have a thread of this channel send one frame without descriptors, soon and in order.

        For one thread at a time, which must not wait for the socket: it does so
        only when ``MOST_LATER`` frames are in front of this one.

        Raises:
          ConnectionError: the other side is gone, or was at an earlier frame.

        """
        if self._error is not None:
            raise self._error
        if len(self._later) >= MOST_LATER:
            self.send(message)
            return
        self._later.append((time.monotonic(), message))
        if self._flows:
            return
        self._flows = True
        bell = self._bell
        if bell is None:
            self._bell = bell = threading.Lock()
            threading.Thread(target=self._writer, args=(bell,), name="writer", daemon=True).start()
        elif bell.locked():
            bell.release()

    def _writer(self, bell: threading.Lock) -> None:
        # Who sends later has something better to do, and shall not lose its processor to this
        # thread, nor the time that it takes to wake a thread up: so that is done once for an
        # order, and then this one looks when the next frame should have come.
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        rhythm = Rhythm()
        try:
            while self._error is None:
                if self._flows:
                    time.sleep(rhythm.pause(time.monotonic()))
                else:
                    bell.acquire()
                    rhythm = Rhythm()
                with self._lock:
                    if self._later:
                        rhythm.heard(*(at for at, _ in self._later))
                        self._send(self._waiting(), (), 0)
        except OSError as exc:
            self._error = exc  # for the next one who sends

    def _waiting(self) -> bytes:
        """Take what ``send_later`` and ``hold`` were given; the lock is held."""
        found = []
        while self._later:
            found.append(_frame(self._later.popleft()[1], ()))
        return b"".join(found)

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
        """Close the socket and every descriptor that no frame claimed; the thread ends."""
        self._error = ConnectionError("closed")
        if self._bell is not None and self._bell.locked():
            self._bell.release()
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
