"""Thoughts in the life of a job: real children that say what a script tells them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from rkvlmd.actors.house import House
from rkvlmd.messages import Ended, TextPart, Turn
from tests.fakes.scripted import Scripts, chat, collect, make_model, open_house, submit

pytestmark = pytest.mark.process

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}[end]{% endfor %}"
    "{% if enable_thinking is defined %}{{ '<think>\n' if enable_thinking else '<think></think>' }}"
    "{% endif %}"
)


def thinker(tmp: Path, *, template: str = TEMPLATE, default: bool | None = None) -> None:
    """Write a model that thinks."""
    folder = make_model(tmp / "models", "scripted")
    (folder / "chat_template.jinja").write_text(template)
    built = json.loads((folder / "rkvlm.json").read_text())
    built["template"]["sha256"] = hashlib.sha256(template.encode()).hexdigest()
    built |= {"thinking": {}, "defaults": {"enable_thinking": default}}
    built["capabilities"].append("thinking")
    (folder / "rkvlm.json").write_text(json.dumps(built))


def saying(text: str, **more: Any) -> Scripts:
    return Scripts({}, {"mode": "text", "text": text, **more}, {})


async def ask(house: House, **more: Any) -> tuple[str, str, Ended]:
    """Return text, thoughts and end of one job."""
    job = submit(house, chat(**more))
    with trio.fail_after(60):
        text, end = await collect(job)
    return text, job.outbox.thoughts(), end


async def test_thoughts_and_answer_come_apart(tmp_path: Path) -> None:
    thinker(tmp_path)
    async with open_house(
        tmp_path, scripts=saying("<think> let me see </think> It is red.")
    ) as house:
        text, thoughts, end = await ask(house)
        assert (text, thoughts, end.reason) == ("It is red.", "let me see", "stop")
        assert (end.usage.completion_tokens, end.usage.reasoning_tokens) == (8, 5)
        (model,) = house.residency.models()
        assert model.thinking
        # Whom nobody shows the thoughts gets their count all the same.
        text, thoughts, end = await ask(house, thoughts=False)
        assert (text, thoughts, end.usage.reasoning_tokens) == ("It is red.", "", 5)


async def test_thoughts_that_the_prompt_has_opened(tmp_path: Path) -> None:
    thinker(tmp_path)
    async with open_house(tmp_path, scripts=saying("see </think> red")) as house:
        text, thoughts, end = await ask(house, thinking=True)
        assert (text, thoughts, end.usage.reasoning_tokens) == ("red", "see", 2)
        opened = end.usage.prompt_tokens
        text, thoughts, end = await ask(house, thinking=False)
        assert (text, thoughts, end.usage.reasoning_tokens) == ("see </think> red", "", 0)
        assert end.usage.prompt_tokens - opened == len("<think></think>") - len("<think>\n")


async def test_an_answer_that_ends_in_its_thoughts(tmp_path: Path) -> None:
    thinker(tmp_path)
    async with open_house(tmp_path, scripts=saying("<think> on and on </th")) as house:
        text, thoughts, end = await ask(house, max_tokens=3)
        assert (text, thoughts, end.reason) == ("", "on and", "length")
        text, thoughts, end = await ask(house)
        assert (text, thoughts, end.reason) == ("", "on and on </th", "stop")
        assert end.usage.reasoning_tokens == end.usage.completion_tokens == 5


@pytest.mark.parametrize(("default", "seen"), [(None, ""), (True, "a"), (False, "")])
async def test_the_default_is_the_models(tmp_path: Path, default: bool | None, seen: str) -> None:
    thinker(tmp_path, default=default)
    async with open_house(tmp_path, scripts=saying("a </think> b")) as house:
        assert (await ask(house))[1] == seen
        # What a request says goes first.
        assert (await ask(house, thinking=True))[1] == "a"
        assert (await ask(house, thinking=False))[1] == ""


async def test_a_switch_without_effect_is_named(tmp_path: Path) -> None:
    names = ("chat_template_kwargs", "reasoning_effort")
    thinker(tmp_path, template=TEMPLATE.partition("{% if enable")[0])
    make_model(tmp_path / "models", "plain")
    async with open_house(tmp_path, names=("scripted", "plain")) as house:
        for model, thinking, ignored in (
            ("scripted", False, names), ("scripted", True, names),
            ("plain", True, names), ("plain", False, ()),
        ):  # fmt: skip
            request = replace(chat(thinking=thinking, thinking_asked=names), model=model)
            job = submit(house, request)
            with trio.fail_after(60):
                await collect(job)
            assert job.ignored == ignored, (model, thinking)
        assert not house.residency.model("plain").thinking


async def test_templates_get_the_thoughts_that_clients_send_back(tmp_path: Path) -> None:
    thinker(tmp_path, template=TEMPLATE + "{{ messages[1].reasoning_content }}")
    async with open_house(tmp_path, scripts=saying("yes")) as house:
        counts = []
        for thought in ("", "hmm"):
            before = Turn("user", (TextPart("a"),)), Turn("assistant", (TextPart("b"),), thought)
            request = chat()
            job = submit(house, replace(request, turns=(*before, *request.turns)))
            with trio.fail_after(60):
                _, end = await collect(job)
            counts.append(end.usage.prompt_tokens)
        assert counts[1] - counts[0] == len("hmm")


async def test_models_without_thoughts_say_what_they_say(tmp_path: Path) -> None:
    text = "<think> is a tag </think> indeed"
    async with open_house(tmp_path, scripts=saying(text)) as house:
        said, thoughts, end = await ask(house)
        assert (said, thoughts, end.usage.reasoning_tokens) == (text, "", 0)


async def test_a_second_trial_begins_anew(tmp_path: Path) -> None:
    thinker(tmp_path)
    fault = {"at": "prefill", "kind": "kill", "file": str(tmp_path / "count")}
    scripts = saying("<think> x </think> y", fault=fault)
    async with open_house(tmp_path, scripts=scripts) as house:
        text, thoughts, end = await ask(house)
        assert (text, thoughts, end.usage.reasoning_tokens) == ("y", "x", 3)
        assert (tmp_path / "count").read_text() == "1"


async def test_what_was_held_back_comes_out_when_the_engine_fails(tmp_path: Path) -> None:
    thinker(tmp_path)
    fault = {"at": "generate", "kind": "error", "after_tokens": 3}
    scripts = saying("<think> a < b", fault=fault)
    async with open_house(tmp_path, scripts=scripts) as house:
        text, thoughts, end = await ask(house)
        assert (text, thoughts, end.reason) == ("", "a <", "error")
