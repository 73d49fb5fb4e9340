"""The frames between the daemon and its children.

A frame is a 4-byte big-endian length and that many bytes of JSON, one object
with a string ``type``. Descriptors travel beside the bytes (SCM_RIGHTS); the
object's ``fds`` says how many of them belong to the frame, in order.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

Message = dict[str, Any]

_HEAD = struct.Struct(">I")
#: Most descriptors that one frame may carry: SCM_MAX_FD of Linux (unix(7)). A prompt has one for each
#: view of its pictures, and four pictures in 17 tiles each are 68.
MAX_FDS = 253
#: Largest body. A prompt of 16384 token ids is about 100 kB of JSON.
MAX_BYTES = 8 << 20


class FrameError(ValueError):
    """The peer does not speak frames; nothing that follows can be trusted."""


def encode(message: Message) -> bytes:
    """Return one whole frame."""
    body = msgspec.json.encode(message)
    if len(body) > MAX_BYTES:
        raise FrameError(f"frame of {len(body)} bytes")
    return _HEAD.pack(len(body)) + body


class FrameDecoder:
    """Bytes in, cut anywhere; messages out."""

    def __init__(self, limit: int = MAX_BYTES) -> None:
        self._buffer = bytearray()
        self._limit = limit

    def feed(self, data: bytes | bytearray | memoryview) -> list[Message]:
        """Take what was read; return the frames that are whole now.

        Raises:
          FrameError: a length above the limit, or a body that is no object
            with a ``type``.

        """
        self._buffer += data
        messages: list[Message] = []
        while len(self._buffer) >= _HEAD.size:
            (size,) = _HEAD.unpack_from(self._buffer)
            if size > self._limit:
                raise FrameError(f"frame of {size} bytes")
            end = _HEAD.size + size
            if len(self._buffer) < end:
                break
            with memoryview(self._buffer) as view:
                body = bytes(view[_HEAD.size : end])
            del self._buffer[:end]
            messages.append(_decode(body))
        return messages

    @property
    def pending(self) -> int:
        """Bytes of a frame that is not whole yet."""
        return len(self._buffer)


def _decode(body: bytes) -> Message:
    try:
        message = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise FrameError("frame is not JSON") from exc
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise FrameError("frame has no type")
    fds = message.get("fds", 0)
    if type(fds) is not int or not 0 <= fds <= MAX_FDS:
        raise FrameError("frame has a wrong number of descriptors")
    return message
