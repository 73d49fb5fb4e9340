"""The switches of thinking that clients send, and thoughts that they send back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rkvlmd.messages import TextPart, Turn
from tests.fakes.chat_bodies import parse, refused, with_options


@pytest.mark.parametrize(
    ("options", "on"),
    [
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"chat_template_kwargs": {"thinking": False}}, False),
        ({"enable_thinking": False}, False),
        ({"think": False}, False),
        ({"think": "low"}, True),
        ({"thinking": True}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "enabled"}}, True),
        ({"reasoning": {"enabled": False}}, False),
        ({"reasoning": {"effort": "none"}}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "minimal"}, False),
        ({"reasoning_effort": "Low"}, True),
        ({"reasoning_effort": "high"}, True),
    ],
    ids=json.dumps,
)
def test_every_switch(options: dict[str, Any], on: bool) -> None:
    request = with_options(**options)
    assert request.thinking is on
    assert request.thinking_asked == tuple(options)
    assert (request.ignored, request.unknown, request.thoughts) == ((), (), True)


def test_nothing_said_is_nothing_asked() -> None:
    nothing = {
        "chat_template_kwargs": {"enable_thinking": None}, "enable_thinking": None, "think": None,
        "thinking": {}, "reasoning": None, "reasoning_effort": None, "include_reasoning": None,
    }  # fmt: skip
    assert with_options(**nothing) == with_options()
    assert with_options().thinking is None


def test_the_most_particular_switch_counts() -> None:
    request = with_options(
        reasoning_effort="high", think=True, chat_template_kwargs={"enable_thinking": False}
    )
    assert request.thinking is False
    assert set(request.thinking_asked) == {"chat_template_kwargs", "think", "reasoning_effort"}


def test_what_has_no_effect_is_named() -> None:
    request = with_options(
        chat_template_kwargs={"enable_thinking": False, "custom\r\nx": 1},
        reasoning={"max_tokens": 5}, reasoning_effort="enormous",
        thinking={"type": "adaptive", "budget_tokens": 9},
    )  # fmt: skip
    assert request.ignored == ("chat_template_kwargs", "reasoning", "reasoning_effort", "thinking")
    assert request.thinking is False


def test_thoughts_that_nobody_wants_to_see() -> None:
    assert with_options(include_reasoning=False).thoughts is False
    assert with_options(include_reasoning=True).thoughts is True
    assert with_options(reasoning={"exclude": True}).thoughts is False


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"enable_thinking": 0}, "enable_thinking"),
        ({"think": 1}, "think"),
        ({"thinking": "yes"}, "thinking"),
        ({"thinking": {"type": 1}}, "thinking.type"),
        ({"reasoning": "low"}, "reasoning"),
        ({"reasoning": {"effort": 3}}, "reasoning.effort"),
        ({"reasoning": {"exclude": 3}}, "reasoning.exclude"),
        ({"reasoning_effort": 3}, "reasoning_effort"),
        ({"include_reasoning": "x"}, "include_reasoning"),
    ],
)  # fmt: skip
def test_wrong_types_are_refused_by_name(options: dict[str, Any], param: str) -> None:
    refused("invalid_request", param, with_options, **options)


def test_thoughts_that_come_back() -> None:
    messages = [
        {"role": "user", "content": "a", "reasoning_content": 7},
        {"role": "assistant", "content": "b", "reasoning_content": "hm", "reasoning": "hm"},
        {"role": "assistant", "content": None, "reasoning": "oh"},
        {"role": "assistant", "content": [{"type": "text", "text": "c"}], "reasoning": None},
    ]
    request = parse({"messages": messages})
    assert request.turns == (
        Turn("user", (TextPart("a"),)),
        Turn("assistant", (TextPart("b"),), "hm"),
        Turn("assistant", (), "oh"),
        Turn("assistant", (TextPart("c"),)),
    )
    wrong = {"messages": [{"role": "assistant", "content": "b", "reasoning": ["hm"]}]}
    refused("invalid_request", "messages[0].reasoning", parse, wrong)
