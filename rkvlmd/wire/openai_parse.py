"""The body of ``POST /v1/chat/completions`` to a checked ``ChatRequest``."""

from __future__ import annotations

from typing import Any

from rkvlmd.messages import ChatRequest, Sampling
from rkvlmd.settings import Settings
from rkvlmd.wire.keep_alive import keep_alive
from rkvlmd.wire.openai_content import Content
from rkvlmd.wire.openai_fields import INT64, Fields, invalid, of_body
from rkvlmd.wire.openai_params import sort_out
from rkvlmd.wire.openai_thinking import wish
from rkvlmd.wire.urgency import LONGEST_TIMEOUT, priority

#: OpenAI documents 4; clients of other servers send more.
MOST_STOPS = 16
STOP_CHARACTERS = 1024
MODEL_CHARACTERS = 256


def parse_chat(body: bytes, settings: Settings) -> ChatRequest:
    """Parse and check a request body; ``null`` equals absent for every optional field.

    Uses ``http.max_json_depth``, ``http.max_json_values``, ``http.max_parts``,
    ``media.max_images`` and ``media.remote``.

    Raises:
      RkvlmdError: a 400 whose ``param`` is the JSON path of the field at fault.

    """
    fields = of_body(body, settings)
    ignored, unknown = sort_out(fields)
    content = Content(settings)
    turns = content.messages(fields.get("messages"))
    options = _stream_options(fields)
    thinking = wish(fields)
    return ChatRequest(
        turns=turns,
        pictures=content.pictures,
        videos=content.videos,
        model=fields.text("model", most=MODEL_CHARACTERS) or None,
        sampling=_sampling(fields),
        max_tokens=_max_tokens(fields),
        stop=_stop(fields.get("stop")),
        stream=fields.flag("stream"),
        include_usage=options.flag("include_usage"),
        timeout=fields.number("timeout", least=0.0, most=LONGEST_TIMEOUT, above=True),
        priority=priority(fields.get("priority")),
        keep_alive=keep_alive(fields.get("keep_alive")),
        ignored=tuple(sorted({*ignored, *thinking.ignored})),
        unknown=unknown,
        thinking=thinking.on,
        thinking_asked=thinking.asked,
        thoughts=thinking.shown,
    )


def _sampling(fields: Fields) -> Sampling:
    top_k = fields.integer("top_k", least=-1)
    repetition = fields.number("repetition_penalty", least=0.0, most=2.0, above=True)
    if repetition is None:
        # the name of the same thing in llama.cpp
        repetition = fields.number("repeat_penalty", least=0.0, most=2.0, above=True)
    return Sampling(
        temperature=fields.number("temperature", least=0.0, most=2.0),
        top_k=0 if top_k == -1 else top_k,
        top_p=fields.number("top_p", least=0.0, most=1.0, above=True),
        min_p=fields.number("min_p", least=0.0, most=1.0),
        repetition_penalty=repetition,
        frequency_penalty=fields.number("frequency_penalty", least=-2.0, most=2.0),
        presence_penalty=fields.number("presence_penalty", least=-2.0, most=2.0),
        seed=fields.integer("seed", least=-INT64),
    )


def _max_tokens(fields: Fields) -> int | None:
    older = fields.integer("max_tokens", least=1)
    newer = fields.integer("max_completion_tokens", least=1)
    return older if newer is None else newer


def _stop(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise invalid("stop", "must be a string or a list of strings.")
    if len(stops) > MOST_STOPS:
        raise invalid("stop", f"must not hold more than {MOST_STOPS} strings.")
    for index, stop in enumerate(stops):
        path = "stop" if stops is not value else f"stop[{index}]"
        if not isinstance(stop, str) or not stop:
            raise invalid(path, "must be a string that is not empty.")
        if len(stop) > STOP_CHARACTERS:
            raise invalid(path, f"must not be longer than {STOP_CHARACTERS} characters.")
    return tuple(stops)


def _stream_options(fields: Fields) -> Fields:
    value = fields.get("stream_options")
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise invalid("stream_options", "must be an object.")
    return Fields(value, "stream_options")
