"""Models that think, imported from published files and served on the simulated board."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from rkvlmd.ctl.__main__ import main
from rkvlmd.engine.detok import _table
from rkvlmd.models import templates
from tests.e2e.daemon import Daemon, png, question, running
from tests.fakes import published
from tests.house.tree import ROOT
from tests.npusim import compiler, models
from tests.npusim.fixture import Sim
from tests.npusim.house import plug_in

pytestmark = pytest.mark.process

CATALOGUE, _ = templates.load([ROOT / "etc" / "models.d"])
#: How a prompt ends with thoughts and without them.
ENDS = {
    "qwen3-0.6b": ("assistant\n", "assistant\n<think>\n\n</think>\n\n"),
    "qwen3.5-0.8b": ("assistant\n<think>\n", "assistant\n<think>\n\n</think>\n\n"),
    "internvl3.5-1b": ("assistant\n", "assistant\n"),
}
THOUGHT, ANSWER = "The picture\nis red.", "It is red."


def download(folder: Path, name: str) -> None:
    """Write what somebody publishes; the decoder knows the same bytes as the tokenizer."""
    template = CATALOGUE[name]
    match, special = template.match, list(template.manifest["special_strings"])
    folder.mkdir(parents=True)
    published.tokenizer(folder / "tokenizer.json", special)
    ids = {c: i for i, c in enumerate(sorted(_table()))}
    models.rkllm(
        folder / f"{match.names[0].strip('*')}.rkllm", embed=match.embedding, signed_rows=True,
        specials={text: 256 + i for i, text in enumerate(special)}, outputs=match.outputs,
        byte_ids=[ids[c] for c, _ in sorted(_table().items(), key=lambda item: item[1])],
        eos=256 + special.index("<|im_end|>"),
    )  # fmt: skip
    if match.tokens is not None:
        width, height = match.sizes[0]
        tokens = match.tokens.of(width, height)
        more = {"width": width, "height": height, "tokens": tokens, "embed": match.embedding,
                "outputs": match.outputs, "batched": False}  # fmt: skip
        tree = published.trailer(
            [("pixel", [1, 3, height, width])],
            [(f"out{i}", [tokens, match.embedding]) for i in range(match.outputs)],
        )
        published.rknn(folder / "vision.rknn", tree=tree | {"npusim": more})


@contextmanager
def board(tmp: Path, reply: str, **switches: str) -> Iterator[tuple[Daemon, Sim]]:
    """Start a daemon whose decoder answers ``reply``."""
    with pytest.MonkeyPatch.context() as patch:
        sim = plug_in(tmp, patch)
        how = {"NPUSIM_REPLY": "text", "NPUSIM_REPLY_TEXT": reply, **switches}
        for name, value in how.items():
            patch.setenv(name, value)
        (tmp / "models").mkdir()
        for name in ENDS:
            download(tmp / "downloads" / name, name)
            argv = ["import", str(tmp / "downloads" / name), "--models", str(tmp / "models")]
            assert main(["--json", *argv]) == 0
        library = compiler.library("1.3.0")
        config = f'[npu]\nlibrary = "{library}"\nsoc = "rk3588"\n[models]\ndemo = false\n'
        with running(tmp, tmp / "models", config=config) as daemon:
            yield daemon, sim
            assert daemon.stop() == 0
            assert not sim.trace("misuse")


def client(daemon: Daemon) -> openai.OpenAI:
    return openai.OpenAI(base_url=daemon.url + "/v1", api_key="x", max_retries=0, timeout=120)


def switch(on: bool) -> dict[str, Any]:
    return {"chat_template_kwargs": {"enable_thinking": on}}


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Sim]]:
    folder = tmp_path_factory.mktemp("thinking")
    with board(folder, f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}") as found:
        yield found


@pytest.mark.parametrize("name", ENDS)
def test_a_model_thinks_when_asked_to(name: str, thinking: tuple[Daemon, Sim]) -> None:
    daemon, sim = thinking
    sees = CATALOGUE[name].match.tokens is not None
    messages = question("What is it?", *([png((200, 30, 30))] if sees else []))
    on, off = ENDS[name]
    with client(daemon) as api:
        assert "thinking" in api.models.retrieve(name).capabilities
        done = api.chat.completions.create(model=name, messages=messages, extra_body=switch(True))
        assert sim.one("run")["prompt"].endswith(f"<|im_start|>{on}")
        told = "You are an AI assistant that rigorously follows" in sim.one("run")["prompt"]
        assert told == name.startswith("internvl")
        message: Any = done.choices[0].message
        assert message.content == ANSWER
        assert message.reasoning_content == message.reasoning == THOUGHT
        details = done.usage.completion_tokens_details
        assert details.reasoning_tokens == len(f"<think>\n{THOUGHT}\n</think>\n\n")
        with api.chat.completions.create(
            model=name, messages=messages, extra_body=switch(True), stream=True
        ) as stream:
            deltas: list[Any] = [c.choices[0].delta for c in stream if c.choices]
        assert "".join(d.content or "" for d in deltas) == ANSWER
        thoughts = [d.reasoning_content for d in deltas if hasattr(d, "reasoning_content")]
        assert "".join(thoughts) == THOUGHT
        # The next turn, as clients send it: with the thoughts in their field, or in the text.
        talk = [*messages, {"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHT},
                {"role": "user", "content": "Sure?"}]  # fmt: skip
        first = api.chat.completions.create(model=name, messages=talk, extra_body=switch(False))
        prompt = sim.one("run")["prompt"]
        assert prompt.endswith(f"<|im_start|>{off}")
        assert THOUGHT not in prompt
        assert first.usage.prompt_tokens_details.cached_tokens > 0
        talk[-2] = {"role": "assistant", "content": f"<think>{THOUGHT}</think>\n{ANSWER}"}
        api.chat.completions.create(model=name, messages=talk, extra_body=switch(False))
        assert sim.one("run")["prompt"] == prompt


def test_nobody_thinks_unasked_where_the_folder_has_no_template(
    thinking: tuple[Daemon, Sim],
) -> None:
    daemon, sim = thinking
    with client(daemon) as api:
        for name in ENDS:
            raw = api.chat.completions.with_raw_response.create(
                model=name, messages=question("Hi"), reasoning_effort="none"
            )
            assert sim.one("run")["prompt"].endswith(f"<|im_start|>{ENDS[name][1]}")
            assert (
                "x-rkvlmd-ignored" not in raw.headers
                or "reasoning" not in raw.headers["x-rkvlmd-ignored"]
            )


def test_stop_strings_are_meant_for_the_answer(thinking: tuple[Daemon, Sim]) -> None:
    daemon, _ = thinking
    with client(daemon) as api:
        done = api.chat.completions.create(
            model="qwen3-0.6b", messages=question("Hi"), stop=["\n", " red"],
            extra_body=switch(True),
        )  # fmt: skip
        message: Any = done.choices[0].message
        assert message.reasoning_content == THOUGHT
        assert (message.content, done.choices[0].finish_reason) == ("It is", "stop")


def test_ask_prints_the_answer_alone(thinking: tuple[Daemon, Sim]) -> None:
    daemon, _ = thinking
    said = daemon.ctl("ask", "--model", "qwen3-0.6b", "Hi")
    assert said["choices"][0]["message"]["content"] == ANSWER


def test_a_library_that_ends_with_the_thoughts(tmp_path: Path) -> None:
    with board(tmp_path, f"<think>{THOUGHT}</think>{ANSWER}", NPUSIM_THINK="ends") as (daemon, _):
        with client(daemon) as api:
            done = api.chat.completions.create(model="qwen3-0.6b", messages=question("Hi"))
        message: Any = done.choices[0].message
        assert (message.content, message.reasoning) == ("", THOUGHT)


def test_the_catalogue_knows_who_thinks() -> None:
    able = {n for n, t in CATALOGUE.items() if "thinking" in t.manifest.get("capabilities", ())}
    assert set(ENDS) <= able
    for name in able:
        assert {"start", "end"} <= CATALOGUE[name].manifest["thinking"].keys()
        assert json.dumps(CATALOGUE[name].manifest["thinking"]["start"]) == '"<think>"'
