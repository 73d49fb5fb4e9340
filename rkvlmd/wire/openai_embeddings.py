"""The body of ``POST /v1/embeddings`` to a checked request, and vectors to the answer's bytes."""

from __future__ import annotations

import array
import base64
import sys
from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from rkvlmd.messages import EmbeddingsRequest, Usage
from rkvlmd.settings import Settings
from rkvlmd.wire.keep_alive import keep_alive
from rkvlmd.wire.openai_content import Content
from rkvlmd.wire.openai_fields import invalid, of_body
from rkvlmd.wire.openai_params import MOST_UNKNOWN, UNKNOWN_CHARACTERS
from rkvlmd.wire.openai_parse import MODEL_CHARACTERS
from rkvlmd.wire.urgency import LONGEST_TIMEOUT, priority

#: What is read, and what has no influence on the answer.
READ = frozenset(
    {"input", "model", "encoding_format", "dimensions", "timeout", "priority", "keep_alive"}
)
SILENT = frozenset({"user", "metadata", "extra_headers", "extra_query", "request_id"})
#: The longest vector that may be asked for; no known model has a longer one.
MOST_DIMENSIONS = 65536


def parse_embeddings(body: bytes, settings: Settings) -> EmbeddingsRequest:
    """Parse and check a request body; ``null`` equals absent for every optional field.

    Raises:
      RkvlmdError: a 400 whose ``param`` is the JSON path of the field at fault.

    """
    fields = of_body(body, settings)
    content = Content(settings)
    turns = content.inputs(fields.get("input"), "input")
    unknown = sorted(
        name[:UNKNOWN_CHARACTERS]
        for name, value in fields.values.items()
        if value is not None and name not in READ and name not in SILENT
    )
    return EmbeddingsRequest(
        turns=turns,
        pictures=content.pictures,
        videos=content.videos,
        model=fields.text("model", most=MODEL_CHARACTERS) or None,
        timeout=fields.number("timeout", least=0.0, most=LONGEST_TIMEOUT, above=True),
        priority=priority(fields.get("priority")),
        keep_alive=keep_alive(fields.get("keep_alive")),
        unknown=tuple(unknown[:MOST_UNKNOWN]),
        encoding=_encoding(fields.get("encoding_format")),
        dimensions=fields.integer("dimensions", least=1, most=MOST_DIMENSIONS),
    )


def _encoding(value: Any) -> Literal["float", "base64"]:
    if value is None or value == "float":
        return "float"
    if value == "base64":
        return "base64"
    raise invalid("encoding_format", "must be float or base64.")


def item(vector: str, index: int, encoding: Literal["float", "base64"]) -> bytes:
    """Return one entry of ``data``; ``vector`` is base64 of float32, little endian."""
    value: Any = vector
    if encoding == "float":
        floats = array.array("f", base64.b64decode(vector))
        if sys.byteorder == "big":
            floats.byteswap()
        value = floats.tolist()
    return msgspec.json.encode({"object": "embedding", "index": index, "embedding": value})


def answer(items: Iterable[bytes], model: str, usage: Usage) -> bytes:
    """Return the body of the response."""
    counts: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.prompt_tokens,
        "prompt_tokens_details": {"image_tokens": usage.image_tokens},
    }
    if usage.estimated:
        counts["estimated"] = True
    tail = msgspec.json.encode({"model": model, "usage": counts})
    return b'{"object":"list","data":[' + b",".join(items) + b"]," + tail[1:]
