"""What crosses the control socket: JSON-RPC 2.0, one JSON object a line.

Pure functions over bytes; standard library alone, because ``rkvlmctl`` imports
it at start. A caller needs no more than ``socat``::

    echo '{"jsonrpc":"2.0","id":1,"method":"status"}' | socat - UNIX:/run/rkvlmd/control.sock

A call without an ``id`` is a notification and gets no answer. While ``load``,
``unload``, ``pin`` and ``drain`` run, their caller gets ``progress`` notifications.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

#: Raised when a change here could break a script.
PROTOCOL = 1

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
#: The daemon understood and could not; ``data.code`` is a key of ``rkvlmd.errors.CODES``.
APPLICATION_ERROR = -32000
#: The caller may look but not change; ``data.code`` is ``permission_denied``.
PERMISSION_DENIED = -32001

Tier = Literal["look", "change"]
Id = str | int | float | None


@dataclass(frozen=True, slots=True)
class Method:
    """Who may call it, and the names of its parameters, all of them strings.

    Those of ``options`` may be left out.
    """

    tier: Tier
    params: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


METHODS: dict[str, Method] = {
    "status": Method("look"),
    "models": Method("look"),
    "jobs": Method("look"),
    "http": Method("look"),
    "version": Method("look"),
    "load": Method("change", ("model",)),
    "unload": Method("change", ("model",)),
    "pin": Method("change", ("model",)),
    "unpin": Method("change", ("model",)),
    "drain": Method("change", options=("wait",)),
    "resume": Method("change"),
    "reload": Method("change"),
    "cancel": Method("change", ("id",)),
}


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end, as the kernel says (SO_PEERCRED, SO_PEERGROUPS)."""

    pid: int
    uid: int
    gid: int
    groups: frozenset[int] = frozenset()


def tier(peer: Peer, *, own_uid: int, operator_gid: int | None) -> Tier:
    """Return what ``peer`` may do: everybody may look, its owners may change."""
    if peer.uid in {0, own_uid}:
        return "change"
    if operator_gid is not None and operator_gid in {peer.gid, *peer.groups}:
        return "change"
    return "look"


class RpcError(Exception):
    """An answer that is an error; ``id`` is ``None`` where the call's was not readable."""

    def __init__(
        self,
        number: int,
        message: str,
        *,
        id: Id = None,  # noqa: A002 - the name that JSON-RPC gives it
        data: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.number = number
        self.message = message
        self.id = id
        self.data = data


class LineTooLongError(Exception):
    """The peer sent more than a line may hold; nothing after it can be trusted."""


@dataclass(frozen=True, slots=True)
class Call:
    """A well-formed call of a method that exists. ``wants_reply`` is false for notifications."""

    method: str
    params: dict[str, str] = field(default_factory=dict)
    id: Id = None
    wants_reply: bool = True


class LineDecoder:
    """Bytes in, cut anywhere; whole lines out, without their end and without empty ones."""

    def __init__(self, limit: int) -> None:
        self._buffer = bytearray()
        self._limit = limit

    def feed(self, data: bytes | bytearray) -> list[bytes]:
        """Take what was read; return the lines that are whole now.

        Raises:
          LineTooLongError: a line above the limit. Lines before it in the same
            data are lost: the connection is over anyway.

        """
        searched = len(self._buffer)
        self._buffer += data
        lines: list[bytes] = []
        start = 0
        while (end := self._buffer.find(b"\n", max(start, searched))) >= 0:
            if end - start > self._limit:
                raise LineTooLongError
            if line := bytes(self._buffer[start:end]).strip():
                lines.append(line)
            start = end + 1
        del self._buffer[:start]
        if len(self._buffer) > self._limit:
            raise LineTooLongError
        return lines


def encode(message: dict[str, Any]) -> bytes:
    """Return one line. Everything outside ASCII is escaped, so no text can break the line."""
    return json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def parse_call(line: bytes) -> Call:
    """Read one line from a caller.

    Raises:
      RpcError: -32700 not JSON, -32600 not a call, -32601 no such method,
        -32602 wrong parameters; with the call's id where there was one.

    """
    try:
        message = json.loads(line.decode())
    except (ValueError, RecursionError) as exc:
        raise RpcError(PARSE_ERROR, "not a JSON object on one line") from exc
    if not isinstance(message, dict):
        raise RpcError(INVALID_REQUEST, "a call must be one JSON object; there are no batches")
    id_ = message.get("id")
    if not _is_id(id_):
        raise RpcError(INVALID_REQUEST, "id must be a string, a number or null")
    if message.get("jsonrpc") != "2.0":
        raise RpcError(INVALID_REQUEST, 'jsonrpc must be "2.0"', id=id_)
    name = message.get("method")
    if not isinstance(name, str):
        raise RpcError(INVALID_REQUEST, "method must be a string", id=id_)
    method = METHODS.get(name)
    if method is None:
        known = ", ".join(METHODS)
        raise RpcError(METHOD_NOT_FOUND, f"no such method; there are: {known}", id=id_)
    params = _params(method, message.get("params"), id_)
    return Call(name, params, id_, wants_reply="id" in message)


def _is_id(value: object) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | int)


def _params(method: Method, given: object, id_: Id) -> dict[str, str]:
    if given is None:
        given = {}
    elif isinstance(given, list):
        names = method.params + method.options
        if len(given) > len(names):
            raise RpcError(INVALID_PARAMS, "too many parameters", id=id_)
        given = dict(zip(names, given, strict=False))
    if not isinstance(given, dict):
        raise RpcError(INVALID_PARAMS, "params must be an object or an array", id=id_)
    for name in given:
        if name not in method.params + method.options:
            _refuse_param(name if isinstance(name, str) else "", "no such parameter", id_)
    for name in (*method.params, *(name for name in method.options if name in given)):
        if not isinstance(given.get(name), str):
            _refuse_param(name, "must be a string", id_)
        if not given[name]:
            _refuse_param(name, "must not be empty", id_)
    return given


def _refuse_param(name: str, what: str, id_: Id) -> None:
    name = name[:64]
    data = {"code": "invalid_request", "param": name}
    raise RpcError(INVALID_PARAMS, f"{name}: {what}", id=id_, data=data)


def reply(id_: Id, result: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a call that was done."""
    return {"jsonrpc": "2.0", "id": id_, "result": result}


def failure(error: RpcError) -> dict[str, Any]:
    """Return the answer to a call that was not done."""
    body: dict[str, Any] = {"code": error.number, "message": error.message}
    if error.data is not None:
        body["data"] = error.data
    return {"jsonrpc": "2.0", "id": error.id, "error": body}


def progress(
    *, model: str, state: str, progress: float, detail: str, seconds_left: float | None = None
) -> dict[str, Any]:
    """Return the notification that a caller gets at each change of what it waits for.

    ``model`` is empty where the whole server is meant; ``seconds_left`` is an
    estimate, ``None`` where nobody knows.
    """
    params = {
        "model": model,
        "state": state,
        "progress": progress,
        "detail": detail,
        "seconds_left": seconds_left,
    }
    return {"jsonrpc": "2.0", "method": "progress", "params": params}


def call(method: str, params: dict[str, str], id_: int) -> dict[str, Any]:
    """Return a call."""
    message: dict[str, Any] = {"jsonrpc": "2.0", "id": id_, "method": method}
    if params:
        message["params"] = params
    return message


@dataclass(frozen=True, slots=True)
class Progress:
    """A ``progress`` notification as its caller reads it."""

    model: str
    state: str
    progress: float
    detail: str
    seconds_left: float | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of a call as its caller reads it: ``result``, or ``error``."""

    id: Id
    result: dict[str, Any] | None = None
    error: RpcError | None = None


def parse_answer(line: bytes) -> Progress | Answer | None:
    """Read one line from the daemon; ``None`` is a notification that is not known here.

    Raises:
      ValueError: the line is not what the daemon of this protocol says.

    """
    try:
        message = json.loads(line.decode())
    except RecursionError as exc:
        raise ValueError("too deep") from exc
    if not isinstance(message, dict):
        raise ValueError("not an object")
    if "method" in message:
        return _progress(message) if message["method"] == "progress" else None
    result, error = message.get("result"), message.get("error")
    if isinstance(error, dict):
        return Answer(message.get("id"), error=_error(error, message.get("id")))
    if not isinstance(result, dict):
        raise ValueError("neither result nor error")
    return Answer(message.get("id"), result=result)


def _progress(message: dict[str, Any]) -> Progress:
    params = message.get("params")
    if not isinstance(params, dict):
        raise ValueError("progress without params")
    share, left = params.get("progress"), params.get("seconds_left")
    return Progress(
        model=str(params.get("model", "")),
        state=str(params.get("state", "")),
        progress=float(share) if isinstance(share, int | float) else 0.0,
        detail=str(params.get("detail", "")),
        seconds_left=float(left) if isinstance(left, int | float) else None,
    )


def _error(body: dict[str, Any], id_: Id) -> RpcError:
    number, data = body.get("code"), body.get("data")
    return RpcError(
        number if isinstance(number, int) else INTERNAL_ERROR,
        str(body.get("message", "")),
        id=id_,
        data=data if isinstance(data, dict) else None,
    )
