"""Published files dropped into a folder, imported, and served by the whole daemon on a simulated board.

One model of each family: nothing is written by hand, the catalogue and the files say all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest

from rkvlmd.ctl.__main__ import main
from rkvlmd.models import templates
from rkvlmd.models.templates import Template
from tests.e2e.daemon import png, question
from tests.fakes import videos
from tests.house.tree import ROOT
from tests.npusim import downloads, models
from tests.npusim.downloads import Board

pytestmark = pytest.mark.process

RED, BLUE, GREEN = (200, 30, 30), (30, 30, 200), (10, 220, 40)
CATALOGUE, _ = templates.load([ROOT / "etc" / "models.d"])
MODELS = (
    "qwen2-vl-2b", "qwen2.5-vl-3b", "qwen3-vl-2b", "qwen3.5-0.8b", "internvl3-1b",
    "internvl3-2b", "internvl3.5-2b", "smolvlm-256m",
    "deepseek-ocr", "minicpm-v-2.6", "janus-pro-1b", "gemma3-4b", "fastvlm-0.5b", "llava-1.5-7b",
)  # fmt: skip


#: Models without an encoder; Gemma 3n is given rows of its own table in place of text.
TEXT = ("qwen3-0.6b", "gemma3n-e2b", "gemma4-e2b")
SEVERAL = [m for m in MODELS if "multi_image" in CATALOGUE[m].manifest["capabilities"]]
FRAMES = 3


def download(folder: Path, template: Template) -> None:
    """Write what somebody publishes: a pair of files, and the tokenizer of the checkpoint."""
    match = template.match
    merge = match.tokens.square if match.tokens and not match.tokens.end else 0
    downloads.decoder(folder, template, signed_rows=True, merge=merge)
    if template.model == "gemma3n-e2b":
        words = 256 + len(template.manifest["special_strings"])
        downloads.arrays(folder, embed=np.zeros((words, match.embedding), np.float16))
    if match.tokens is not None:
        width, height = match.sizes[0]
        downloads.encoder(folder, template, width, height, match.tokens.of(width, height))


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    folder = tmp_path_factory.mktemp("board")

    def install(into: Path) -> None:
        for name in (*MODELS, *TEXT):
            download(folder / "downloads" / name, CATALOGUE[name])
            argv = ["import", str(folder / "downloads" / name), "--models", str(into)]
            assert main(["--json", *argv]) == 0

    with downloads.serving(folder, install, config=[f"[media]\nmax_frames = {FRAMES}"]) as made:
        yield made


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
