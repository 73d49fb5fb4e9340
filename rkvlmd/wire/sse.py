"""Event-stream text: how events are written, and how a client reads them back."""

from __future__ import annotations

#: A comment line. Clients skip it; an event with only ``retry:`` or ``id:`` they would not.
PING = b": ping\n\n"
#: The last event of a whole answer.
DONE = b"data: [DONE]\n\n"


def event(data: bytes) -> bytes:
    r"""Return one event. ``data`` is one line: JSON never holds a raw line break.

    Raises:
      ValueError: when ``data`` holds ``\r`` or ``\n``.

    """
    if b"\n" in data or b"\r" in data:
        raise ValueError("event data must be one line")
    return b"data: " + data + b"\n\n"


class Decoder:
    """Bytes of an event stream, cut anywhere, to the data of its events.

    Lines end with LF, CR or CRLF; several ``data`` lines are joined with LF;
    comments and all other fields are skipped (WHATWG HTML, section 9.2.6).
    """

    def __init__(self, *, max_event_bytes: int = 1 << 20) -> None:
        self._max = max_event_bytes
        self._line = bytearray()
        self._data: list[bytes] = []
        self._held = 0
        self._after_cr = False

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes; return the data of each event that they complete.

        Raises:
          ValueError: when an event is longer than ``max_event_bytes``.

        """
        events: list[bytes] = []
        if self._after_cr and data:
            self._after_cr = False
            data = data.removeprefix(b"\n")
        pieces = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._after_cr = data.endswith(b"\r")
        for piece in pieces[:-1]:
            self._line += piece
            self._end_line(events)
        self._line += pieces[-1]
        if self._held + len(self._line) > self._max:
            raise ValueError("event too long")
        return events

    def _end_line(self, events: list[bytes]) -> None:
        line = bytes(self._line)
        self._line.clear()
        if not line:
            if self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
                self._held = 0
            return
        field, _, value = line.partition(b":")
        if field == b"data":
            self._data.append(value.removeprefix(b" "))
            self._held += len(value)
            if self._held > self._max:
                raise ValueError("event too long")
