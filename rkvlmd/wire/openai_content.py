"""The messages of a chat request, or inputs of embeddings, to turns: each picture at its place."""

from __future__ import annotations

import re
from typing import Any, Literal

from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import (
    PicturePart,
    PictureSource,
    Role,
    TextPart,
    Turn,
    VideoPart,
    VideoSource,
)
from rkvlmd.settings import Settings
from rkvlmd.wire.openai_fields import invalid, unsupported

#: In a string content: the place of the next picture of the message's ``images``.
MARK = "<|image|>"

#: The longest URL, and the longest head of a data URI (characters).
URL_CHARACTERS = 8192
DATA_HEAD_CHARACTERS = 1024
#: Shorter strings than this cannot be a picture in base64: the smallest PNG has 67 bytes.
BASE64_CHARACTERS = 64

Detail = Literal["auto", "low", "high"]
Parts = tuple[TextPart | PicturePart | VideoPart, ...]

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
#: The media type of a data URI that lists frames.
FRAMES = "video/jpeg"
#: ``original`` is the Responses API's word for as much detail as there is.
_DETAILS: dict[str, Detail] = {"auto": "auto", "low": "low", "high": "high", "original": "high"}


class Content:
    """Collects the pictures and videos of one request while its messages are read."""

    def __init__(self, settings: Settings) -> None:
        self._remote = settings.media.remote
        self._max_images = settings.media.max_images
        self._max_videos = settings.media.max_videos
        self._max_parts = settings.http.max_parts
        self._parts = 0
        self._pictures: list[PictureSource] = []
        self._videos: list[VideoSource] = []

    @property
    def pictures(self) -> tuple[PictureSource, ...]:
        """The pictures that the parts read so far point at."""
        return tuple(self._pictures)

    @property
    def videos(self) -> tuple[VideoSource, ...]:
        """The videos that the parts read so far point at."""
        return tuple(self._videos)

    def messages(self, value: Any) -> tuple[Turn, ...]:
        """Return the turns.

        Raises:
          RkvlmdError: with the JSON path of the field at fault.

        """
        if value is None:
            raise invalid("messages", "is required.")
        if not isinstance(value, list):
            raise invalid("messages", "must be a list.")
        if not value:
            raise invalid("messages", "must hold at least one message.")
        return tuple(self._message(m, f"messages[{i}]") for i, m in enumerate(value))

    def inputs(self, value: Any, path: str) -> tuple[Turn, ...]:
        """Return one turn for each input of embeddings.

        A string and a list of content parts are one input; a list of either
        has several.

        Raises:
          RkvlmdError: with the JSON path of the field at fault.

        """
        if value is None:
            raise invalid(path, "is required.")
        if isinstance(value, str):
            return (self._input(value, path),)
        if not isinstance(value, list):
            raise invalid(path, "must be a string, a list of strings or a list of parts.")
        if not value:
            raise invalid(path, "must hold at least one input.")
        if all(isinstance(v, dict) for v in value):
            return (self._input(value, path),)
        return tuple(self._input(v, f"{path}[{i}]") for i, v in enumerate(value))

    def _input(self, value: Any, path: str) -> Turn:
        if isinstance(value, str):
            self._count_part(1, path)
            if not value:
                raise invalid(path, "must not be empty.")
            return Turn("user", (TextPart(value),))
        tokens = value if isinstance(value, list) else [value]
        if any(isinstance(t, int) and not isinstance(t, bool) for t in tokens):
            raise unsupported(path, "token ids are not supported; send the text.")
        if not isinstance(value, list) or not value:
            raise invalid(path, "must be a string or a list of parts.")
        self._count_part(1 + len(value), path)
        return Turn("user", tuple(self._part(p, f"{path}[{i}]") for i, p in enumerate(value)))

    def _message(self, message: Any, path: str) -> Turn:
        if not isinstance(message, dict):
            raise invalid(path, "must be an object.")
        role = self._role(message.get("role"), f"{path}.role")
        for name in ("tool_calls", "function_call"):
            if message.get(name):
                raise unsupported(f"{path}.{name}", "tool calls are not supported.")
        thought = _thought(message, path) if role == "assistant" else ""
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
            return Turn(role, self._place(content, sources), thought)
        if not isinstance(content, list):
            raise invalid(f"{path}.content", "must be a string or a list of parts.")
        if not content and role == "user" and not images:
            raise invalid(f"{path}.content", "must hold at least one part.")
        self._count_part(1 + len(sources) + len(content))
        first = [self._add(source) for source in sources]
        rest = [self._part(p, f"{path}.content[{i}]") for i, p in enumerate(content)]
        return Turn(role, (*first, *rest), thought)

    def _role(self, role: Any, path: str) -> Role:
        if role is None:
            raise invalid(path, "is required.")
        if isinstance(role, str) and role in _ROLES:
            return _ROLES[role]
        if role in ("tool", "function"):
            raise unsupported(path, "tool results are not supported.")
        raise invalid(path, "must be one of system, developer, user and assistant.")

    def _place(self, content: str, sources: list[PictureSource]) -> Parts:
        marks = min(content.count(MARK), len(sources))
        # The marks take the pictures in their order; those left over come before the text.
        places = [self._add(source) for source in sources[marks:]]
        texts = content.split(MARK, marks)
        parts: list[TextPart | PicturePart | VideoPart] = [*places]
        for index, text in enumerate(texts):
            if index:
                parts.append(self._add(sources[index - 1]))
            if text:
                parts.append(TextPart(text))
        return tuple(parts)

    def _part(self, part: Any, path: str) -> TextPart | PicturePart | VideoPart:
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
        if kind in ("video_url", "input_video"):
            return self._video(part, path)
        if kind is None:
            raise invalid(f"{path}.type", "is required.")
        raise invalid(
            f"{path}.type",
            "must be one of text, image_url, video_url, input_text, input_image and input_video.",
        )

    def _picture(self, part: dict[str, Any], path: str) -> PicturePart:
        field = f"{path}.image_url"
        url, detail = _url(part, "image_url", path)
        return self._add(self._source(url, field, detail or "auto"))

    def _video(self, part: dict[str, Any], path: str) -> VideoPart:
        field = f"{path}.video_url"
        url, detail = _url(part, "video_url", path)
        # Frames are many: unless the client says otherwise each gets the least.
        detail = detail or "low"
        text = url.strip(_SPACE)
        scheme = _SCHEME.match(text)
        name = scheme[1].lower() if scheme else ""
        if name == "data":
            data = _data_uri(text, field, "video")
            media = text[len("data:") : DATA_HEAD_CHARACTERS].partition(";")[0]
            frames = media.strip().lower() == FRAMES
            if frames and (count := data.count(",") + 1) > self._max_parts:
                raise invalid(
                    field,
                    f"holds {count} frames; at most {self._max_parts} may be sent (http.max_parts).",
                )
            source = VideoSource("frames" if frames else "base64", data, field, detail)
        elif name in ("http", "https"):
            self._check_remote(text, field, "videos")
            source = VideoSource("url", text, field, detail)
        else:
            raise _bad_url(field, "must be a data: URI or an http(s) URL; files are never read.")
        if len(self._videos) >= self._max_videos:
            raise invalid(
                field,
                f"a request may hold at most {self._max_videos} videos (media.max_videos).",
            )
        self._videos.append(source)
        return VideoPart(len(self._videos) - 1)

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

    def _source(self, value: str, field: str, detail: Detail = "auto") -> PictureSource:
        text = value.strip(_SPACE)
        scheme = _SCHEME.match(text)
        name = scheme[1].lower() if scheme else ""
        if name == "data":
            return PictureSource("base64", _data_uri(text, field), field, detail)
        if name in ("http", "https"):
            self._check_remote(text, field, "pictures")
            return PictureSource("url", text, field, detail)
        raw = len(text) >= BASE64_CHARACTERS and _BASE64.fullmatch(text, 0, BASE64_CHARACTERS)
        if not name and raw and not _PATH.match(text):
            return PictureSource("base64", text, field, detail)
        raise _bad_url(field, "must be a data: URI or an http(s) URL; files are never read.")

    def _check_remote(self, url: str, field: str, what: str) -> None:
        if not self._remote:
            raise _bad_url(field, f"this server fetches no {what} (media.remote is off).")
        if len(url) > URL_CHARACTERS:
            raise _bad_url(field, f"must not be longer than {URL_CHARACTERS} characters.")

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

    def _count_part(self, count: int, path: str = "messages") -> None:
        self._parts += count
        if self._parts > self._max_parts:
            raise invalid(
                path.partition("[")[0],
                f"must not hold more than {self._max_parts} messages and parts (http.max_parts).",
            )


def _thought(message: dict[str, Any], path: str) -> str:
    """Return the thoughts of an earlier answer, under either name."""
    for name in ("reasoning_content", "reasoning"):
        value = message.get(name)
        if value is not None:
            if not isinstance(value, str):
                raise invalid(f"{path}.{name}", "must be a string.")
            return value
    return ""


def _url(part: dict[str, Any], name: str, path: str) -> tuple[str, Detail | None]:
    """Return the URL and the detail of a part; ``name`` is the field that holds the URL."""
    value = part.get(name)
    if value is None and part.get("file_id") is not None:
        raise unsupported(f"{path}.file_id", "files are not kept by this server.")
    details = [part.get("detail")]
    if isinstance(value, dict):
        details.insert(0, value.get("detail"))
        value = value.get("url")
    detail: Detail | None = None
    for said in details:
        if said is not None and (not isinstance(said, str) or said not in _DETAILS):
            raise invalid(f"{path}.detail", "must be one of auto, low and high.")
        detail = detail or (_DETAILS[said] if said is not None else None)
    if not isinstance(value, str):
        raise invalid(f"{path}.{name}", 'must be a string, or an object with a string "url".')
    return value, detail


def _bad_url(field: str, message: str) -> RkvlmdError:
    return RkvlmdError("invalid_image_url", f"{field}: {message}", param=field)


def _data_uri(text: str, field: str, what: str = "picture") -> str:
    """Return the base64 text of a data URI; its media type does not matter, it is often wrong."""
    comma = text.find(",", 0, DATA_HEAD_CHARACTERS)
    if comma < 0:
        raise _bad_url(field, "is not a data: URI: it has no comma.")
    parameters = [p.strip().lower() for p in text[len("data:") : comma].split(";")]
    if "base64" not in parameters[1:]:
        raise _bad_url(field, "a data: URI must hold base64.")
    data = text[comma + 1 :].strip(_SPACE)
    if not data:
        raise RkvlmdError("empty_image_file", f"{field}: the {what} is empty.", param=field)
    return data
