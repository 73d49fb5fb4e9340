"""Bodies of chat requests, parsed as the front does, and what an error of them must name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import ChatRequest
from rkvlmd.settings import Settings
from rkvlmd.wire.openai import parse_chat

SETTINGS = Settings()
REMOTE = replace(SETTINGS, media=replace(SETTINGS.media, remote=True))
PNG = "iVBORw0KGgo" + "A" * 80
URI = f"data:image/png;base64,{PNG}"


def parse(body: Any, settings: Settings = SETTINGS) -> ChatRequest:
    """Parse a body."""
    return parse_chat(json.dumps(body).encode(), settings)


def with_options(**options: Any) -> ChatRequest:
    """Parse the shortest question, with options."""
    return parse({"messages": [{"role": "user", "content": "hi"}], **options})


def message(content: Any, settings: Settings = SETTINGS, **more: Any) -> ChatRequest:
    """Parse one message of a user."""
    return parse({"messages": [{"role": "user", "content": content, **more}]}, settings)


def refused(code: str, param: str | None, call: Any, *args: Any, **kwargs: Any) -> str:
    """Check that a call is refused with a 400 that names the field; return the message."""
    with pytest.raises(RkvlmdError) as caught:
        call(*args, **kwargs)
    error = caught.value
    assert (error.code, error.param) == (code, param), error.message
    assert error.status == 400
    return error.message
