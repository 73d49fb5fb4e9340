"""Asks the real daemon over HTTP, so that what is measured is what a client gets."""

from __future__ import annotations

import base64
import io
import json
import urllib.request
from typing import Any

from demoworld.heldout import Case

#: Longest wait for one answer, seconds.
PATIENCE = 120


class HttpAsker:
    """Sends each case to ``URL/v1/chat/completions``, greedy, one at a time."""

    def __init__(self, url: str, model: str = "demo") -> None:
        self.url = url.rstrip("/") + "/v1/chat/completions"
        self.model = model

    def answers(self, cases: list[Case]) -> list[str]:
        """The daemon's answers."""
        return [self._ask(case) for case in cases]

    def _ask(self, case: Case) -> str:
        pictures = iter(case.pictures)
        messages = [{**m, "content": self._content(m["content"], pictures)} for m in case.messages]
        body = {"model": self.model, "temperature": 0, "max_tokens": 96, "messages": messages}
        request = urllib.request.Request(
            self.url, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            answer = json.load(response)
        return str(answer["choices"][0]["message"]["content"])

    def _content(self, content: Any, pictures: Any) -> Any:
        if isinstance(content, str):
            return content
        return [
            {"type": "image_url", "image_url": {"url": _data_uri(next(pictures))}}
            if part["type"] == "image"
            else part
            for part in content
        ]


def _data_uri(picture: Any) -> str:
    file = io.BytesIO()
    picture.convert("RGB").save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
