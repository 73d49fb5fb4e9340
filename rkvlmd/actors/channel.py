"""The daemon's end of a child's socket: frames, with descriptors beside them."""

from __future__ import annotations

import array
import math
import os
import socket
from collections import deque
from collections.abc import Sequence

import msgspec
import trio

from rkvlmd.wire import child as wire
from rkvlmd.wire import frames

_READ = 64 << 10
_ROOM = socket.CMSG_SPACE(4 * frames.MAX_FDS)


#: Largest frame that ``send_now`` takes, bytes: less than half of the smallest usual socket buffer.
MOST_NOW = 64 << 10


def frame(message: wire.ToChild, count: int) -> bytes:
    """Return the frame of an order with so many descriptors.

    Raises:
      FrameError: more bytes or descriptors than a frame may have.

    """
    if count > frames.MAX_FDS:
        raise frames.FrameError(f"frame with {count} descriptors")
    built = wire.build(message)
    built["fds"] = count
    return frames.encode(built)


def _rights(fds: Sequence[int]) -> list[tuple[int, int, array.array[int]]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []


class ChannelError(Exception):
    """The child does not speak our frames."""


class Channel:
    """Owns the socket. One task receives; any task may send."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._raw = sock
        self._socket = trio.socket.from_stdlib_socket(sock)
        self._sending = trio.Lock()
        self._decoder = frames.FrameDecoder()
        self._messages: deque[frames.Message] = deque()
        self._fds: deque[int] = deque()
        #: Whether the child left something unread that was sent to it: it was gone before.
        self.unread = False

    async def send(
        self, message: wire.ToChild, fds: Sequence[int] = (), *, within: float = math.inf
    ) -> None:
        """Send one frame; the descriptors stay ours.

        A frame that was begun is finished: a cancelled sender must not leave
        half a frame, and the child's main thread always reads. One that does
        not for ``within`` seconds hangs, and cannot be spoken to any more.

        Raises:
          FrameError: more bytes or descriptors than a frame may have; nothing was sent.
          TimeoutError: the child does not read.
          OSError: the child is gone.

        """
        data = memoryview(frame(message, len(fds)))
        rights = _rights(fds)
        await trio.lowlevel.checkpoint_if_cancelled()
        # Almost always nobody else sends and there is room, so the order goes now: trio's lock
        # and socket would let other tasks go first, while the child waits.
        try:
            self._sending.acquire_nowait()
        except trio.WouldBlock:
            await self._sending.acquire()
        try:
            with trio.CancelScope(deadline=trio.current_time() + within, shield=True):
                try:
                    sent = self._raw.sendmsg([data], rights)
                except BlockingIOError:
                    sent = await self._socket.sendmsg([data], rights)
                while sent < len(data):
                    sent += await self._socket.send(data[sent:])
                await trio.lowlevel.cancel_shielded_checkpoint()
                return
            raise TimeoutError("nobody reads")
        finally:
            self._sending.release()

    def send_now(self, data: bytes, fds: Sequence[int] = ()) -> bool:
        """Send a frame whole if that can be done at once; return whether it went.

        Raises:
          TimeoutError: it took a part, and cannot be spoken to any more.
          OSError: the child is gone.

        """
        # A stream socket of Linux takes so few bytes in one piece or not at all.
        if len(data) > MOST_NOW or self._sending.locked():
            return False
        try:
            sent = self._raw.sendmsg([data], _rights(fds))
        except BlockingIOError:
            return False
        if sent != len(data):
            raise TimeoutError("it does not read")
        return True

    async def receive(self) -> tuple[wire.FromChild, list[int]] | None:
        """Return the next message and its descriptors, which are now the caller's.

        ``None`` at the end of the file.

        Raises:
          ChannelError: the bytes are no frames of ours.

        """
        while not self._messages:
            try:
                # Almost always nothing is there yet, so look only when there is: trio's own
                # recvmsg would try first, and after a hit take one more turn of the loop.
                await trio.lowlevel.wait_readable(self._raw)
                data, ancillary, flags, _ = self._raw.recvmsg(_READ, _ROOM, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                continue
            except ConnectionError:
                # Linux says so at the other end when a Unix socket is closed with bytes in it.
                self.unread = True
                return None
            for level, kind, payload in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    received = array.array("i")
                    received.frombytes(payload[: len(payload) - len(payload) % 4])
                    self._fds.extend(received)
            if flags & socket.MSG_CTRUNC:
                raise ChannelError("descriptors were cut off")
            if not data:
                return None
            try:
                self._messages.extend(self._decoder.feed(data))
            except frames.FrameError as exc:
                raise ChannelError(str(exc)) from exc
        return self._next()

    def _next(self) -> tuple[wire.FromChild, list[int]]:
        raw = self._messages.popleft()
        count = raw.get("fds", 0)
        if count > len(self._fds):
            raise ChannelError(
                f"{raw['type']}: {count} descriptors announced, {len(self._fds)} came"
            )
        try:
            message = wire.parse_from_child(raw)
        except msgspec.ValidationError as exc:
            raise ChannelError(f"{raw['type']}: {exc}") from exc
        return message, [self._fds.popleft() for _ in range(count)]

    def close_sending(self) -> None:
        """Tell the child to leave; what it still says can be read."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def close(self) -> None:
        """Close the socket and what came in and nobody took."""
        self._socket.close()
        while self._fds:
            os.close(self._fds.popleft())
