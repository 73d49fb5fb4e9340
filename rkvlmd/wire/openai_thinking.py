"""Whether a request wants thoughts: the switches of several servers' APIs, as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rkvlmd.wire.openai_fields import Fields, invalid

#: The fields that are read here.
NAMES: frozenset[str] = frozenset(
    [
        "chat_template_kwargs",
        "enable_thinking",
        "think",
        "thinking",
        "reasoning",
        "reasoning_effort",
        "include_reasoning",
    ]
)
#: Efforts (OpenAI, Ollama, OpenRouter) as a switch: how much a model thinks is its own matter.
_EFFORTS = {
    "none": False, "minimal": False,
    "low": True, "medium": True, "high": True, "xhigh": True, "max": True,
}  # fmt: skip
#: ``thinking.type`` (Anthropic, DeepSeek, GLM).
_TYPES = {"enabled": True, "disabled": False}


@dataclass(frozen=True, slots=True)
class Wish:
    """``on`` is ``None`` where nothing was said, ``asked`` the fields that said it.

    ``shown``: thoughts are part of the answer. ``ignored`` names fields that
    hold something without effect.
    """

    on: bool | None
    asked: tuple[str, ...]
    shown: bool
    ignored: tuple[str, ...]


def wish(fields: Fields) -> Wish:
    """Read the fields of ``NAMES``; of several that say something the first of this order counts.

    ``chat_template_kwargs.enable_thinking`` and ``.thinking``, ``enable_thinking``,
    ``think``, ``thinking``, ``reasoning.enabled``, ``reasoning.effort``,
    ``reasoning_effort``.

    Raises:
      RkvlmdError: a 400 whose ``param`` is the JSON path of the field at fault.

    """
    ignored: set[str] = set()
    kwargs = _object(fields, "chat_template_kwargs", {"enable_thinking", "thinking"}, ignored)
    reasoning = _object(fields, "reasoning", {"enabled", "effort", "exclude"}, ignored)
    said = {
        "chat_template_kwargs": _first(
            _switch(kwargs, "enable_thinking"), _switch(kwargs, "thinking")
        ),
        "enable_thinking": _switch(fields, "enable_thinking"),
        "think": _word(fields, "think", ignored),
        "thinking": _typed(fields, ignored),
        "reasoning": _first(
            _switch(reasoning, "enabled"), _word(reasoning, "effort", ignored, "reasoning")
        ),
        "reasoning_effort": _word(fields, "reasoning_effort", ignored),
    }
    asked = tuple(name for name, on in said.items() if on is not None)
    hidden = _switch(fields, "include_reasoning") is False or reasoning.flag("exclude")
    return Wish(said[asked[0]] if asked else None, asked, not hidden, tuple(sorted(ignored)))


def _first(*values: bool | None) -> bool | None:
    return next((value for value in values if value is not None), None)


def _object(fields: Fields, name: str, known: set[str], ignored: set[str]) -> Fields:
    value = fields.get(name)
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise invalid(name, "must be an object.")
    _leftover(value, name, known, ignored)
    return Fields(value, name)


def _leftover(value: Mapping[str, Any], name: str, known: set[str], ignored: set[str]) -> None:
    if any(said is not None and key not in known for key, said in value.items()):
        ignored.add(name)


def _switch(fields: Fields, name: str) -> bool | None:
    return None if fields.get(name) is None else fields.flag(name)


def _word(fields: Fields, name: str, ignored: set[str], top: str = "") -> bool | None:
    value = fields.get(name)
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise invalid(fields.path(name), "must be a string.")
    on = _EFFORTS.get(value.strip().lower())
    if on is None:
        ignored.add(top or name)
    return on


def _typed(fields: Fields, ignored: set[str]) -> bool | None:
    value = fields.get("thinking")
    if not isinstance(value, dict):
        return _switch(fields, "thinking")
    _leftover(value, "thinking", {"type"}, ignored)
    kind = Fields(value, "thinking").text("type")
    if kind is not None and kind not in _TYPES:
        ignored.add("thinking")
    return _TYPES.get(kind or "")
