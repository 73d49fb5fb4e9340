"""A blocking client of the OpenAI endpoint, for ``rkvlmctl ask`` and ``rkvlmd demo``.

Heavy imports of the standard library live here, away from the other commands.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import ipaddress
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rkvlmd.ctl.client import CtlError, NoDaemonError, RefusedError

#: Largest answer, and longest line of a stream, that is read, bytes.
MAX_ANSWER_BYTES = 32 << 20
#: On top of the daemon's own deadline of a request, seconds: it must be the one to speak first.
SLACK_SECONDS = 30.0
_TYPES = {
    b"\x89PNG": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"RIFF": "image/webp",
}


def picture(file: Path, max_bytes: int) -> str:
    """Return a picture file as a data URI.

    Raises:
      CtlError: it cannot be read, or is larger than ``max_bytes``.

    """
    try:
        with file.open("rb") as opened:
            data = opened.read(max_bytes + 1)
    except OSError as exc:
        raise CtlError(f"{file}: {exc.strerror}", code="unreadable_file") from None
    if len(data) > max_bytes:
        message = f"{file}: larger than {max_bytes} bytes, the most that this server takes"
        raise CtlError(message, code="image_file_too_large")
    types = (kind for magic, kind in _TYPES.items() if data.startswith(magic))
    kind = next(types, "application/octet-stream")
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def user_turn(prompt: str, pictures: Iterable[str]) -> dict[str, Any]:
    """Return a message with the pictures (data URIs) before the text."""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": uri}} for uri in pictures
    ]
    if not parts:
        return {"role": "user", "content": prompt}
    return {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}


class Chat:
    """Asks one endpoint.

    Args:
      address: ``http://HOST:PORT``.
      key: the API key, empty for none.
      patience: longest silence of the server before this side gives up, seconds.

    """

    def __init__(self, address: str, *, key: str = "", patience: float = 300.0) -> None:
        split = urlsplit(address if "//" in address else f"//{address}")
        self._host = _reachable(split.hostname or "")
        self._port = split.port
        self._patience = patience + SLACK_SECONDS
        self._headers = {"Content-Type": "application/json", "Accept": "*/*"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        """Ask without streaming; return the response object.

        Raises:
          CtlError: as ``stream``.

        """
        connection, response = self._post(body | {"stream": False})
        try:
            return _object(response.read(MAX_ANSWER_BYTES))
        except (OSError, http.client.HTTPException):
            raise NoDaemonError("the server left before its answer ended") from None
        finally:
            connection.close()

    def stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Ask with streaming; yield every chunk. Closing the iterator ends the job.

        Raises:
          NoDaemonError: nobody answers, or it left in the middle.
          RefusedError: the API key is missing or wrong.
          CtlError: what the server says instead of an answer.

        """
        options = {"stream": True, "stream_options": {"include_usage": True}}
        connection, response = self._post(body | options)
        try:
            for data in events(_lines(response)):
                if data == "[DONE]":
                    return
                chunk = _object(data.encode())
                if "error" in chunk:
                    raise _error_of(chunk["error"], response.status)
                yield chunk
            raise NoDaemonError("the server left before its answer ended")
        except (OSError, http.client.HTTPException):
            raise NoDaemonError("the server left before its answer ended") from None
        finally:
            connection.close()

    def _post(
        self, body: dict[str, Any]
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._patience)
        data = json.dumps(body).encode()
        try:
            # It may refuse before it has read all; its answer is there nevertheless.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request("POST", "/v1/chat/completions", data, self._headers)
            response = connection.getresponse()
            if response.status != 200:
                said = _object(response.read(MAX_ANSWER_BYTES)).get("error")
                raise _error_of(said, response.status)
        except (OSError, http.client.HTTPException):
            connection.close()
            raise NoDaemonError("the HTTP endpoint does not answer") from None
        except BaseException:
            connection.close()
            raise
        return connection, response


def _reachable(host: str) -> str:
    """Return where to connect for an address that a server is bound to."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if not address.is_unspecified:
        return host
    return "127.0.0.1" if address.version == 4 else "::1"


def _lines(response: http.client.HTTPResponse) -> Iterator[str]:
    while line := response.readline(MAX_ANSWER_BYTES):
        yield line.decode(errors="replace").rstrip("\r\n")


def events(lines: Iterable[str]) -> Iterator[str]:
    """Yield the data of each event of an event stream (HTML standard, 9.2); comments are skipped."""
    data: list[str] = []
    for line in lines:
        if not line:
            if data:
                yield "\n".join(data)
            data = []
        elif line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CtlError("the server's answer is not what it should be", code="protocol")
    return value


def _error_of(said: object, status: int) -> CtlError:
    said = said if isinstance(said, dict) else {}
    code, param = str(said.get("code") or "failed"), said.get("param")
    message = str(said.get("message") or f"the server answered with status {status}")
    if isinstance(param, str) and param not in message:
        message = f"{param}: {message}"
    if status in {401, 403}:
        return RefusedError(message, code=code)
    return CtlError(message, code=code, param=param if isinstance(param, str) else None)


def said_by(chunk: dict[str, Any]) -> tuple[str, str]:
    """Return the thoughts and the text that a chunk adds."""
    choices = chunk.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return "", ""
    delta = choices[0].get("delta")
    if not isinstance(delta, dict):
        return "", ""
    thought, text = (delta.get(name) for name in ("reasoning_content", "content"))
    return thought if isinstance(thought, str) else "", text if isinstance(text, str) else ""


def text_of(chunk: dict[str, Any]) -> str:
    """Return the text that a chunk adds."""
    return said_by(chunk)[1]


def chunk_of(response: dict[str, Any]) -> dict[str, Any]:
    """Return a response that was not streamed as its one chunk."""
    answer_of(response)
    return {"choices": [{"delta": response["choices"][0]["message"]}]}


def answer_of(response: dict[str, Any]) -> str:
    """Return the text of a response that was not streamed."""
    try:
        content = response["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise CtlError("the server's answer has no text", code="protocol") from None
    return content if isinstance(content, str) else ""
