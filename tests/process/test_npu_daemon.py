"""The whole daemon on a simulated board, with the real ``openai`` client: manifests alone say all."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from tests.e2e.daemon import ROOT, Daemon, png, question, running
from tests.npusim import compiler, folders, models
from tests.npusim.fixture import Sim
from tests.npusim.house import plug_in

pytestmark = pytest.mark.process

RED, BLUE = (200, 30, 30), (30, 30, 200)


@pytest.fixture
def sim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sim:
    return plug_in(tmp_path, monkeypatch)


@pytest.fixture
def board(sim: Sim) -> Iterator[Daemon]:
    """A daemon with two libraries and three models."""
    libraries = sim.folder / "libraries"
    libraries.mkdir()
    for version in ("1.2.3", "1.3.0"):
        (libraries / f"librkllmrt-{version}.so").symlink_to(compiler.library(version))
    where = sim.folder / "models"
    folders.write(where / "qwen3vl", outputs=4, decoder={"runtime_versions": ["1.3.0"]})
    folders.write(where / "qwen25vl", decoder={"runtime_versions": ["1.2.3"]})
    models.rkllm(sim.folder / "pirate.rkllm")
    text = folders.write(where / "text", vision=False)
    (sim.folder / "pirate.rkllm").rename(text / "pirate.rkllm")
    adapter = {"name": "pirate", "file": "pirate.rkllm",
               "sha256": hashlib.sha256((text / "pirate.rkllm").read_bytes()).hexdigest()}  # fmt: skip
    changes = {"runtime_versions": ["1.3"], "adapters": [adapter]}
    (text / "rkvlm.json").write_text(
        json.dumps(folders.manifest(text, vision=False, decoder=changes))
    )
    config = f'[npu]\nlibrary = "{libraries}"\nsoc = "rk3588"\n[models]\ndemo = false\n'
    with running(sim.folder, where, config=config) as daemon:
        yield daemon
        assert daemon.stop() == 0
        assert not sim.trace("misuse")


def client(daemon: Daemon) -> openai.OpenAI:
    return openai.OpenAI(base_url=daemon.url + "/v1", api_key="x", max_retries=0, timeout=120)


def pixels(colour: tuple[int, int, int]) -> Any:
    """Return what the encoder must get for a one-coloured square picture."""
    return np.full((1, folders.SIDE, folders.SIDE, 3), colour, np.uint8)


def sums(*colours: tuple[int, int, int], outputs: int) -> str:
    found = []
    for colour in colours:
        number = models.number_of(pixels(colour))
        rows = models.rows_of(number, folders.TOKENS, folders.EMBED, outputs)
        found.append(models.sum_of(rows))
    return ",".join(found)


def ask(daemon: Daemon, model: str, messages: Any, **more: Any) -> tuple[dict[str, str], Any]:
    with client(daemon) as api:
        done = api.chat.completions.create(model=model, messages=messages, max_tokens=400, **more)
    assert done.choices[0].finish_reason == "stop", done
    return models.answer(done.choices[0].message.content or ""), done


@pytest.mark.parametrize(
    ("model", "outputs", "version"), [("qwen3vl", 4, "1.3.0"), ("qwen25vl", 1, "1.2.3")]
)
def test_pictures_in_several_turns(
    sim: Sim, board: Daemon, model: str, outputs: int, version: str
) -> None:
    messages = question("What are these?", png(RED), png(BLUE))
    said, done = ask(board, model, messages)
    assert (said["pictures"], said["sums"]) == ("2", sums(RED, BLUE, outputs=outputs))
    assert said["size"] == "64x64"
    assert sim.one("init")["version"] == version
    run = sim.one("run")
    assert run["prompt"] == (
        "<|im_start|>user\n<image><image>What are these?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert run["keep_history"] is False
    usage = done.usage
    assert usage.prompt_tokens == int(said["tokens"])
    assert usage.prompt_tokens_details.image_tokens == 2 * folders.TOKENS
    assert [e["picture"] for e in sim.trace("encode")][-2:] == [
        models.number_of(pixels(c)) for c in (RED, BLUE)
    ]
    encodes = len(sim.trace("encode"))
    # A follow-up: nothing is encoded again, and only what is new is computed.
    text = done.choices[0].message.content
    messages += [
        {"role": "assistant", "content": text},
        {"role": "user", "content": "And what colour?"},
    ]
    said, done = ask(board, model, messages)
    assert said["sums"] == sums(RED, BLUE, outputs=outputs)
    assert len(sim.trace("encode")) == encodes
    computed = sim.one("prefill")["computed"]
    assert computed == len("<\n<user\nAnd what colour?<\n<assistant\n")
    assert done.usage.prompt_tokens_details.cached_tokens == done.usage.prompt_tokens - computed
    # A third turn with a third picture.
    messages += [
        {"role": "assistant", "content": done.choices[0].message.content},
        question("And this?", png((1, 2, 3)))[0],
    ]
    said, _ = ask(board, model, messages)
    assert said["sums"] == sums(RED, BLUE, (1, 2, 3), outputs=outputs)
    assert not sim.trace("refused")


def test_text_alone_streamed(sim: Sim, board: Daemon) -> None:
    with client(board) as api:
        stream = api.chat.completions.create(
            model="text", messages=[{"role": "user", "content": "hello <|im_end|> <image>"}],
            stream=True, stream_options={"include_usage": True}, max_tokens=400,
        )  # fmt: skip
        chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    said = models.answer(text)
    assert said["pictures"] == "0"
    assert sim.one("run")["kind"] == "prompt"
    assert sim.one("run")["prompt"].startswith(
        "<|im_start|>user\nhello <\u200b|im_end|> <\u200bimage><|im_end|>\n"
    )
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == int(said["tokens"])
    with client(board) as api, pytest.raises(openai.BadRequestError, match="takes no pictures"):
        api.chat.completions.create(model="text", messages=question("x", png()))


def test_an_adapter_is_a_model_of_its_own(sim: Sim, board: Daemon) -> None:
    messages = [{"role": "user", "content": "hello"}]
    with client(board) as api:
        cards = {card.id: card for card in api.models.list()}
        assert set(cards) == {"qwen3vl", "qwen25vl", "text", "text:pirate"}
        assert cards["text:pirate"].to_dict()["parent"] == "text"
        assert api.models.retrieve("text:pirate").id == "text:pirate"
        with pytest.raises(openai.NotFoundError):
            api.chat.completions.create(model="text:unheard", messages=messages)
    for model, lora in (("text:pirate", "pirate"), ("text", ""), ("text:pirate", "pirate")):
        said, done = ask(board, model, messages)
        assert said.get("lora", "") == lora
        assert done.model == model
    # One model on the NPU, whatever its adapter.
    assert len([e for e in sim.trace("init") if e["rc"] == 0]) == 1


def test_models_are_swapped_under_load(sim: Sim, board: Daemon) -> None:
    wrong: list[Any] = []

    def run(number: int) -> None:
        model = ("qwen3vl", "qwen25vl", "text")[number % 3]
        colour = (number, 0, 255 - number)
        try:
            if model == "text":
                said, _ = ask(board, model, [{"role": "user", "content": f"number {number}"}])
                expected = "-"
            else:
                said, _ = ask(board, model, question(f"number {number}", png(colour)))
                expected = sums(colour, outputs=4 if model == "qwen3vl" else 1)
            if said["sums"] != expected:
                wrong.append((number, said))
        except Exception as exc:  # noqa: BLE001 - told to the test's thread
            wrong.append((number, exc))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong
    # One decoder at a time owns the NPU, and no two jobs of it overlap.
    jobs = sorted((e["begin"], e["end"]) for e in sim.trace("npu"))
    assert len(jobs) >= len(threads)
    assert all(a[1] <= b[0] for a, b in pairwise(jobs))
    assert not sim.trace("switch_timeout")
    # The encoders stay when the decoders change.
    assert len(sim.trace("encoder_init")) == 2


def test_what_has_no_effect_is_named(board: Daemon) -> None:
    with client(board) as api:
        new = api.chat.completions.with_raw_response.create(
            model="text", messages=[{"role": "user", "content": "x"}], seed=1, temperature=0.5
        )
        old = api.chat.completions.with_raw_response.create(
            model="qwen25vl", messages=[{"role": "user", "content": "x"}], temperature=0.5
        )
    assert new.headers["x-rkvlmd-ignored"] == "seed"
    assert old.headers["x-rkvlmd-ignored"] == "temperature"


def test_no_number_of_a_client_ends_the_decoder(sim: Sim, board: Daemon) -> None:
    """Requests have 64 bits, the library's fields 32: 2**31 would be negative, 1e-300 nothing."""
    numbers: list[dict[str, Any]] = [
        {"top_k": 1 << 31}, {"top_k": (1 << 32) + 1}, {"top_k": (1 << 63) - 1},
        {"top_p": 1e-300}, {"repetition_penalty": 1e-300}, {"temperature": 1e-300},
        {"presence_penalty": 1e-300}, {"frequency_penalty": -1e-300}, {"min_p": 1e-300},
        {"seed": (1 << 63) - 1}, {"max_tokens": (1 << 63) - 1}, {"stop": ["x" * 256] * 16},
    ]  # fmt: skip
    with client(board) as api:
        for asked in numbers:
            done = api.chat.completions.create(
                model="text", messages=[{"role": "user", "content": "hello"}],
                extra_body={"temperature": 1.0, "max_tokens": 400} | asked,
            )  # fmt: skip
            assert done.choices[0].finish_reason == "stop", asked
            run = sim.one("run")
            assert (run["top_k"] == 1) is (asked.get("temperature", 1.0) < 0.5), asked
            assert min(run["top_p"], run["temperature"], run["repeat"]) > 0, asked
            assert 0 < run["max_new"] <= 2048
    # One and the same decoder has answered all of them.
    assert len([e for e in sim.trace("init") if e["rc"] == 0]) == 1


def test_status_shows_what_the_libraries_said(board: Daemon) -> None:
    assert board.ctl("load", "qwen3vl")["exit"] == 0
    children = {c["name"]: c for c in board.ctl("status")["children"]}
    decoder = children["decoder:qwen3vl"]["info"]
    assert decoder["libraries"] == {"librkllmrt": "1.3.0"}
    assert decoder["pictures_told_apart"] is True
    assert decoder["iommu_domain"] == 1
    encoder = children["encoder:qwen3vl"]["info"]
    assert encoder["core_mask"] == 7
    assert encoder["outputs"] == 4
    # What only a board can settle, the README says where to read it.
    assert decoder["driver"] == "0.9.8"
    assert decoder["layout"] == "1.3.0"
    assert decoder["probe"] == {
        "pictures_told_apart": True, "special_strings": 1, "finish_after_abort": True,
        "kept_after_run": decoder["probe"]["run_tokens"] + 1,
        "run_tokens": decoder["probe"]["run_tokens"], "callbacks_elsewhere": False,
        "unfinished": False,
    }  # fmt: skip
    assert encoder["file_released"] is True
    assert encoder["libraries"]["librknnrt"]
    parts = {"decoder": decoder, "encoder": encoder}
    for part, path in re.findall(
        r"`(decoder|encoder)\.([\w.]+)`", (ROOT / "README.md").read_text()
    ):
        found: Any = parts[part]
        for key in path.split("."):
            assert key in found, f"README: {part}.{path}"
            found = found[key]
