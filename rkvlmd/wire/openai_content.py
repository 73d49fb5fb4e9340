"""The messages of a chat request to turns, each picture at its place."""

from __future__ import annotations

import re
from typing import Any

from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import PicturePart, PictureSource, Role, TextPart, Turn
from rkvlmd.settings import Settings
from rkvlmd.wire.openai_fields import invalid, unsupported

#: In a string content: the place of the next picture of the message's ``images``.
MARK = "<|image|>"

#: The longest URL, and the longest head of a data URI (characters).
URL_CHARACTERS = 8192
DATA_HEAD_CHARACTERS = 1024
#: Shorter strings than this cannot be a picture in base64: the smallest PNG has 67 bytes.
BASE64_CHARACTERS = 64

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
# A path: absolute, of a home, relative, of Windows, or UNC. Base64 of a JPEG starts with "/9j/".
_PATH = re.compile(r"/(?!9j/)|~|\.{1,2}/|[A-Za-z]:[\\/]|\\\\")
_BASE64 = re.compile(r"[A-Za-z0-9+/_=\s-]+")
_SPACE = " \t\r\n\f\v"


class Content:
    """Collects the pictures of one request while its messages are read."""

    def __init__(self, settings: Settings) -> None:
        self._remote = settings.media.remote
        self._max_images = settings.media.max_images
        self._max_parts = settings.http.max_parts
        self._parts = 0
        self._pictures: list[PictureSource] = []

    def messages(self, value: Any) -> tuple[tuple[Turn, ...], tuple[PictureSource, ...]]:
        """Return the turns and the pictures that their parts point at.

        Raises:
          RkvlmdError: with the JSON path of the field at fault.

        """
        if value is None:
            raise invalid("messages", "is required.")
        if not isinstance(value, list):
            raise invalid("messages", "must be a list.")
        if not value:
            raise invalid("messages", "must hold at least one message.")
        turns = tuple(self._message(m, f"messages[{i}]") for i, m in enumerate(value))
        return turns, tuple(self._pictures)

    def _message(self, message: Any, path: str) -> Turn:
        if not isinstance(message, dict):
            raise invalid(path, "must be an object.")
        role = self._role(message.get("role"), f"{path}.role")
        for name in ("tool_calls", "function_call"):
            if message.get(name):
                raise unsupported(f"{path}.{name}", "tool calls are not supported.")
        content = message.get("content")
        images = message.get("images")
        if images is None:
            images = []
        elif not isinstance(images, list):
            raise invalid(f"{path}.images", "must be a list of strings.")
        if content is None:
            if role == "user" and not images:
                raise invalid(f"{path}.content", "is required.")
            content = ""
        sources = [self._listed(v, f"{path}.images[{i}]") for i, v in enumerate(images)]
        if isinstance(content, str):
            self._count_part(1 + len(sources))
            return Turn(role, self._place(content, sources))
        if not isinstance(content, list):
            raise invalid(f"{path}.content", "must be a string or a list of parts.")
        if not content and role == "user" and not images:
            raise invalid(f"{path}.content", "must hold at least one part.")
        self._count_part(1 + len(sources) + len(content))
        first = [self._add(source) for source in sources]
        rest = [self._part(p, f"{path}.content[{i}]") for i, p in enumerate(content)]
        return Turn(role, (*first, *rest))

    def _role(self, role: Any, path: str) -> Role:
        if role is None:
            raise invalid(path, "is required.")
        if isinstance(role, str) and role in _ROLES:
            return _ROLES[role]
        if role in ("tool", "function"):
            raise unsupported(path, "tool results are not supported.")
        raise invalid(path, "must be one of system, developer, user and assistant.")

    def _place(
        self, content: str, sources: list[PictureSource]
    ) -> tuple[TextPart | PicturePart, ...]:
        marks = min(content.count(MARK), len(sources))
        # The marks take the pictures in their order; those left over come before the text.
        places = [self._add(source) for source in sources[marks:]]
        texts = content.split(MARK, marks)
        parts: list[TextPart | PicturePart] = [*places]
        for index, text in enumerate(texts):
            if index:
                parts.append(self._add(sources[index - 1]))
            if text:
                parts.append(TextPart(text))
        return tuple(parts)

    def _part(self, part: Any, path: str) -> TextPart | PicturePart:
        if not isinstance(part, dict):
            raise invalid(path, "must be an object.")
        kind = part.get("type")
        if kind in ("text", "input_text"):
            text = part.get("text")
            if not isinstance(text, str):
                raise invalid(f"{path}.text", "must be a string.")
            return TextPart(text)
        if kind in ("image_url", "input_image"):
            return self._picture(part, path)
        if kind is None:
            raise invalid(f"{path}.type", "is required.")
        raise invalid(f"{path}.type", "must be one of text, image_url, input_text and input_image.")

    def _picture(self, part: dict[str, Any], path: str) -> PicturePart:
        field = f"{path}.image_url"
        value = part.get("image_url")
        if value is None and part.get("file_id") is not None:
            raise unsupported(f"{path}.file_id", "files are not kept by this server.")
        details = [part.get("detail")]
        if isinstance(value, dict):
            details.append(value.get("detail"))
            value = value.get("url")
        if any(d is not None and not isinstance(d, str) for d in details):
            raise invalid(f"{path}.detail", "must be a string.")
        if not isinstance(value, str):
            raise invalid(field, 'must be a string, or an object with a string "url".')
        return self._add(self._source(value, field))

    def _listed(self, value: Any, field: str) -> PictureSource:
        """One entry of ``images``: raw base64, or what ``image_url`` takes."""
        if not isinstance(value, str):
            raise invalid(field, "must be a string.")
        text = value.strip(_SPACE)
        if not text:
            raise RkvlmdError("empty_image_file", f"{field}: the picture is empty.", param=field)
        if _SCHEME.match(text) or _PATH.match(text):
            return self._source(text, field)
        return PictureSource("base64", text, field)

    def _source(self, value: str, field: str) -> PictureSource:
        text = value.strip(_SPACE)
        scheme = _SCHEME.match(text)
        name = scheme[1].lower() if scheme else ""
        if name == "data":
            return PictureSource("base64", _data_uri(text, field), field)
        if name in ("http", "https"):
            if not self._remote:
                raise _bad_url(field, "this server fetches no pictures (media.remote is off).")
            if len(text) > URL_CHARACTERS:
                raise _bad_url(field, f"must not be longer than {URL_CHARACTERS} characters.")
            return PictureSource("url", text, field)
        raw = len(text) >= BASE64_CHARACTERS and _BASE64.fullmatch(text, 0, BASE64_CHARACTERS)
        if not name and raw and not _PATH.match(text):
            return PictureSource("base64", text, field)
        raise _bad_url(field, "must be a data: URI or an http(s) URL; files are never read.")

    def _add(self, source: PictureSource) -> PicturePart:
        if len(self._pictures) >= self._max_images:
            raise RkvlmdError(
                "too_many_images",
                f"{source.field}: a request may hold at most {self._max_images} pictures"
                " (media.max_images).",
                param=source.field,
            )
        self._pictures.append(source)
        return PicturePart(len(self._pictures) - 1)

    def _count_part(self, count: int) -> None:
        self._parts += count
        if self._parts > self._max_parts:
            raise invalid(
                "messages",
                f"must not hold more than {self._max_parts} messages and parts (http.max_parts).",
            )


def _bad_url(field: str, message: str) -> RkvlmdError:
    return RkvlmdError("invalid_image_url", f"{field}: {message}", param=field)


def _data_uri(text: str, field: str) -> str:
    """Return the base64 text of a data URI; its media type does not matter, it is often wrong."""
    comma = text.find(",", 0, DATA_HEAD_CHARACTERS)
    if comma < 0:
        raise _bad_url(field, "is not a data: URI: it has no comma.")
    parameters = [p.strip().lower() for p in text[len("data:") : comma].split(";")]
    if "base64" not in parameters[1:]:
        raise _bad_url(field, "a data: URI must hold base64.")
    data = text[comma + 1 :].strip(_SPACE)
    if not data:
        raise RkvlmdError("empty_image_file", f"{field}: the picture is empty.", param=field)
    return data
