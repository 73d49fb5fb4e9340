"""Published files dropped into a folder, imported, and served by the whole daemon on a simulated board.

One model of each family: nothing is written by hand, the catalogue and the files say all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from rkvlmd.ctl.__main__ import main
from rkvlmd.engine.detok import _table
from rkvlmd.models import templates
from rkvlmd.models.templates import Template
from tests.e2e.daemon import Daemon, png, question, running
from tests.fakes import published, videos
from tests.house.tree import ROOT
from tests.npusim import compiler, models
from tests.npusim.fixture import PYTHON, Sim

pytestmark = pytest.mark.process

RED, BLUE, GREEN = (200, 30, 30), (30, 30, 200), (10, 220, 40)
CATALOGUE, _ = templates.load([ROOT / "etc" / "models.d"])
MODELS = (
    "qwen2-vl-2b", "qwen2.5-vl-3b", "qwen3-vl-2b", "qwen3.5-0.8b", "internvl3-1b", "smolvlm-256m",
    "deepseek-ocr", "minicpm-v-2.6", "janus-pro-1b", "gemma3-4b", "fastvlm-0.5b", "llava-1.5-7b",
)  # fmt: skip


#: Models without an encoder; Gemma 3n is given rows of its own table in place of text.
TEXT = ("qwen3-0.6b", "gemma3n-e2b", "gemma4-e2b")
SEVERAL = [m for m in MODELS if "multi_image" in CATALOGUE[m].manifest["capabilities"]]
FRAMES = 3


@dataclass
class Board:
    """A daemon and what its libraries were called with."""

    daemon: Daemon
    sim: Sim

    def ask(self, model: str, messages: Any) -> tuple[dict[str, str], Any]:
        with openai.OpenAI(
            base_url=self.daemon.url + "/v1", api_key="x", max_retries=0, timeout=60
        ) as api:
            done = api.chat.completions.create(model=model, messages=messages, max_tokens=400)
        assert done.choices[0].finish_reason == "stop", done
        return models.answer(done.choices[0].message.content or ""), done


def download(folder: Path, template: Template) -> None:
    """Write what somebody publishes: a pair of files, and the tokenizer of the checkpoint."""
    match, special = template.match, list(template.manifest["special_strings"])
    folder.mkdir(parents=True)
    published.tokenizer(folder / "tokenizer.json", special)
    ids = {c: i for i, c in enumerate(sorted(_table()))}
    numbers = {text: 256 + i for i, text in enumerate(special)}
    models.rkllm(
        folder / f"{template.match.names[0].strip('*')}_w8a8_rk3588.rkllm", specials=numbers,
        byte_ids=[ids[c] for c, _ in sorted(_table().items(), key=lambda item: item[1])],
        embed=match.embedding, outputs=match.outputs, signed_rows=True,
        merge=match.tokens.square if match.tokens and not match.tokens.end else 0,
        eos=next(numbers[s] for s in special if s in ENDS),
    )  # fmt: skip
    if template.model == "gemma3n-e2b":
        table = np.zeros((256 + len(special), match.embedding), np.float16)
        np.save(folder / "embed.npy", table)
    if match.tokens is None:
        return
    width, height = match.sizes[0]
    tokens = match.tokens.of(width, height)
    published.rknn(
        folder / "vision.rknn",
        tree=published.trailer(
            [("pixel", [1, 3, height, width])],
            [(f"out{i}", [tokens, match.embedding]) for i in range(match.outputs)],
        )
        | {"npusim": {"width": width, "height": height, "tokens": tokens,
                      "embed": match.embedding, "outputs": match.outputs, "batched": False}},
    )  # fmt: skip


ENDS = (
    "<|im_end|>",
    "<end_of_utterance>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<end_of_turn>",
    "<turn|>",
    "</s>",
)


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    folder = tmp_path_factory.mktemp("board")
    sim = Sim(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("NPUSIM_"):
                patch.delenv(name)
        for name, value in sim.environ.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", f"{PYTHON}:{os.environ.get('PYTHONPATH', '')}")
        (folder / "models").mkdir()
        for name in (*MODELS, *TEXT):
            download(folder / "downloads" / name, CATALOGUE[name])
            argv = ["import", str(folder / "downloads" / name), "--models", str(folder / "models")]
            assert main(["--json", *argv]) == 0
        library = compiler.library("1.3.0")
        config = f'[npu]\nlibrary = "{library}"\nsoc = "rk3588"\n[models]\ndemo = false\n'
        config += f"[media]\nmax_frames = {FRAMES}\n"
        with running(folder, folder / "models", config=config) as daemon:
            yield Board(daemon, sim)
            assert daemon.stop() == 0
            assert not sim.trace("misuse")


def sums(template: Template, *colours: tuple[int, int, int]) -> str:
    """Return what the decoder must have received for these pictures, in this order."""
    match = template.match
    assert match.tokens is not None
    width, height = match.sizes[0]
    found = []
    for colour in colours:
        number = models.number_of(np.full((1, height, width, 3), colour, np.uint8))
        rows = models.rows_of(
            number, match.tokens.of(width, height), match.embedding, match.outputs
        )
        found.append(models.sum_of(rows))
    return ",".join(found)


@pytest.mark.parametrize("name", MODELS)
def test_pictures_reach_the_decoder_in_every_turn(name: str, board: Board) -> None:
    template = CATALOGUE[name]
    assert template.match.tokens is not None
    several = "multi_image" in template.manifest["capabilities"]
    tokens = template.match.tokens.of(*template.match.sizes[0])
    first = (RED, BLUE) if several else (RED,)
    messages = question("What is this?", *(png(colour) for colour in first))
    said, done = board.ask(name, messages)
    assert (said["pictures"], said["sums"]) == (str(len(first)), sums(template, *first))
    assert said["size"] == "x".join(map(str, template.match.sizes[0]))
    assert done.usage.prompt_tokens_details.image_tokens == len(first) * tokens
    # What the library counted is what the client was told.
    assert done.usage.prompt_tokens == int(said["tokens"])
    messages.append({"role": "assistant", "content": "A square."})
    later = (GREEN,) if several else ()
    messages += question("And now?", *(png(colour) for colour in later))
    said, _ = board.ask(name, messages)
    assert said["sums"] == sums(template, *first, *later)
    assert not board.sim.trace("refused")


@pytest.mark.parametrize("name", SEVERAL)
def test_frames_of_a_video_reach_the_decoder(name: str, board: Board) -> None:
    """As a video of the library where the model has tags for one, else as pictures."""
    template = CATALOGUE[name]
    assert template.match.tokens is not None
    # The library's version, which decides, is known once the model is loaded.
    assert board.daemon.ctl("load", name)["exit"] == 0
    film = {"type": "video_url", "video_url": {"url": videos.uri(videos.gif(9), "image/gif")}}
    text = {"type": "text", "text": "What moves?"}
    said, done = board.ask(name, [{"role": "user", "content": [film, text]}])
    tokens = template.match.tokens.of(*template.match.sizes[0])
    assert done.usage.prompt_tokens_details.image_tokens == FRAMES * tokens
    prompt = board.sim.one("run")["prompt"]
    if "video" in template.npu:
        assert "<video>What moves?" in prompt
        assert board.sim.one("run")["video_content"] == template.npu["video"]["content"]
    else:
        assert said["pictures"] == str(FRAMES)
        assert "3 frames of a video, at 0.0, 2.0 and 4.0 seconds:" in prompt
    assert not board.sim.trace("refused")


@pytest.mark.parametrize("name", TEXT)
def test_models_for_text_answer_in_turns(name: str, board: Board) -> None:
    messages = [{"role": "user", "content": "hello"}]
    _, done = board.ask(name, messages)
    assert board.sim.one("run")["kind"] == ("embed" if name == "gemma3n-e2b" else "prompt")
    messages += [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "and now?"}]
    _, later = board.ask(name, messages)
    assert later.usage.prompt_tokens > done.usage.prompt_tokens
    # A picture is refused, not ignored.
    with pytest.raises(openai.BadRequestError, match="takes no pictures"):
        board.ask(name, question("What is this?", png()))


def test_what_is_installed_is_what_was_imported(board: Board) -> None:
    listed = {m["name"]: m for m in board.daemon.ctl("models")["models"]}
    assert set(listed) == {*MODELS, *TEXT}
    for name in MODELS:
        said = json.dumps(listed[name])
        assert CATALOGUE[name].family in said
