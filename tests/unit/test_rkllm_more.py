"""LoRA adapters, prompt-cache files and embedding input of the decoder backend."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rkvlmd.engine import rkllm_inputs as inputs
from rkvlmd.engine import rkllm_prompts
from rkvlmd.engine.rkllm_session import infer_param
from rkvlmd.errors import ManifestError, RkvlmdError
from rkvlmd.models import manifest
from tests.npusim import folders, models
from tests.npusim.bench import Bench
from tests.npusim.fixture import Sim
from tests.npusim.house import plug_in

pytestmark = pytest.mark.process


@pytest.fixture
def sim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sim]:
    yield plug_in(tmp_path, monkeypatch)
    Bench.close_all()


def add_file(folder: Path, name: str) -> dict[str, str]:
    return {"file": name, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}


def edit(folder: Path, **decoder: Any) -> None:
    tree = json.loads((folder / "rkvlm.json").read_text())
    tree["decoder"] |= {k: v for k, v in decoder.items() if k != "files"}
    tree["decoder"]["files"] |= decoder.get("files", {})
    (folder / "rkvlm.json").write_text(json.dumps(tree))
    manifest.parse((folder / "rkvlm.json").read_bytes())


# --- adapters --------------------------------------------------------------------------------


def with_adapters(sim: Sim, **more: Any) -> Path:
    folder = folders.write(sim.folder / "m", vision=False, **more)
    for name in ("pirate", "poet"):
        models.rkllm(folder / f"{name}.rkllm")
    edit(folder, adapters=[
        {"name": "pirate", **add_file(folder, "pirate.rkllm"), "scale": 0.5},
        {"name": "poet", **add_file(folder, "poet.rkllm")},
    ])  # fmt: skip
    return folder


@pytest.mark.parametrize("version", ["1.2.3", "1.3.1"])
def test_adapters_are_loaded_and_chosen(sim: Sim, version: str) -> None:
    with_adapters(sim)
    bench = Bench(sim, version)
    assert bench.ready["adapters"] == ["pirate", "poet"]
    assert [(e["name"], e["scale"]) for e in sim.trace("lora")] == [("pirate", 0.5), ("poet", 1.0)]
    for adapter in ("", "pirate", "pirate", "poet", ""):
        text, _ = bench.ask("hello", adapter=adapter)
        assert models.answer(text).get("lora", "") == adapter
    # What the cache holds was computed by one adapter and is of no use to another.
    cached = [e["cached"] for e in sim.trace("prefill")]
    assert [c > 0 for c in cached] == [False, False, True, False, False]
    with pytest.raises(RkvlmdError, match="no such adapter"):
        bench.ask("hello", adapter="unheard")


def test_an_adapter_that_cannot_be_loaded(sim: Sim) -> None:
    folder = with_adapters(sim)
    (folder / "poet.rkllm").write_bytes(b"rubbish" * 100)
    with pytest.raises(RkvlmdError, match=r"decoder\.adapters\[1\]\.file: .* poet\.rkllm"):
        Bench(sim, "1.3.0")


# --- prompt caches ---------------------------------------------------------------------------

SYSTEM = "<|im_start|>user\nYou are asked about what you see. Answer in one sentence.\n"


@pytest.mark.parametrize("version", ["1.2.1", "1.2.3", "1.3.0", "1.3.1"])
@pytest.mark.parametrize("saved", [{}, {"NPUSIM_SAVED_CACHE": "token"}], ids=str)
def test_the_beginning_of_all_prompts_is_computed_once(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, version: str, saved: dict[str, str]
) -> None:
    for name, value in saved.items():
        monkeypatch.setenv(name, value)
    question = SYSTEM.removeprefix("<|im_start|>user\n") + "What is this?"
    bench = Bench(sim, version, vision=False, decoder={"prompt_cache": SYSTEM})
    assert bench.ready["prompt_cache"] is True
    assert len(sim.trace("save_cache")) == 1
    first = len(bench.order([question]).tokens)
    _, done = bench.ask(question)
    tail = len("What is this?<\n<assistant\n")
    assert (done.cached, done.prompt) == (first - tail, first)
    Bench.close_all()
    bench = Bench(sim, version)
    assert len(sim.trace("save_cache")) == 1
    _, done = bench.ask(question)
    assert done.cached == first - tail
    # After a clear it is still there.
    bench.decoder._record.unknown()
    _, done = bench.ask(question)
    assert done.cached == first - tail


def test_a_damaged_prompt_cache_is_made_again(sim: Sim) -> None:
    Bench(sim, "1.3.0", vision=False, decoder={"prompt_cache": SYSTEM})
    (file,) = (sim.folder / rkllm_prompts.FOLDER).iterdir()
    file.write_text("rubbish")
    assert Bench(sim, "1.3.0").ready["prompt_cache"] is True
    assert len(sim.trace("save_cache")) == 2
    assert [e["rc"] for e in sim.trace("load_cache")] == [0, -1, 0]


def test_each_version_and_model_has_its_own(sim: Sim) -> None:
    Bench(sim, "1.3.0", vision=False, decoder={"prompt_cache": SYSTEM})
    Bench(sim, "1.3.1")
    Bench(sim, "1.3.1", name="n", vision=False, decoder={"prompt_cache": SYSTEM + "x"})
    assert len(list((sim.folder / rkllm_prompts.FOLDER).iterdir())) == 3
    other = {"model": {"toolkit": "1.3.0"}, "decoder": {"prompt_cache": SYSTEM}}
    Bench(sim, "1.3.1", name="o", vision=False, **other)
    assert len(list((sim.folder / rkllm_prompts.FOLDER).iterdir())) == 4


def test_prompt_caches_are_bounded(sim: Sim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rkllm_prompts, "MOST_FILES", 2)
    for i in range(4):
        Bench(sim, "1.3.0", name=f"m{i}", vision=False, decoder={"prompt_cache": f"{SYSTEM}{i}"})
    assert len(list((sim.folder / rkllm_prompts.FOLDER).iterdir())) == 2


def test_where_no_prompt_cache_can_be(sim: Sim, monkeypatch: pytest.MonkeyPatch) -> None:
    # A family that cannot save one, a state folder that cannot be written, none at all, a failure.
    made = {"vision": False, "decoder": {"prompt_cache": SYSTEM}}
    assert Bench(sim, "1.3.0", name="a", family="qwen3_5", **made).ready["prompt_cache"] is False
    for state in (str(sim.folder / "a" / "rkvlm.json"), ""):
        bench = Bench(sim, "1.3.0", name="b", options={"state": state}, **made)
        assert bench.ready["prompt_cache"] is False
        assert bench.ask("x")[1].reason == "stop"
    monkeypatch.setenv("NPUSIM_FAULT", "fail@prefill")
    bench = Bench(sim, "1.3.0", name="c", **made)
    assert bench.ready["prompt_cache"] is False
    assert bench.ask("x")[1].reason == "stop"


# --- embeddings ------------------------------------------------------------------------------

VOCABULARY = 256 + len(folders.SPECIALS)


def with_table(sim: Sim, dtype: Any = np.float16, **more: Any) -> Any:
    """Write a folder whose decoder takes rows; return the table as float32."""
    folder = folders.write(sim.folder / "m", **more)
    random = np.random.default_rng(5)
    if dtype == np.int8:
        table = random.integers(-100, 100, (VOCABULARY, folders.EMBED)).astype(np.int8)
        scale = random.random(VOCABULARY, np.float32)
        np.save(folder / "scale.npy", scale)
        found = table.astype(np.float32) * scale[:, None]
    else:
        table = random.standard_normal((VOCABULARY, folders.EMBED)).astype(dtype)
        found = table.astype(np.float32)
    np.save(folder / "embed.npy", table)
    files = {"embed": add_file(folder, "embed.npy")}
    if dtype == np.int8:
        files["embed_scale"] = add_file(folder, "scale.npy")
    edit(folder, input="embeddings", files=files)
    return found


@pytest.mark.parametrize("version", ["1.2.1", "1.2.3", "1.3.1"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8])
@pytest.mark.parametrize("blind", ["apart", "blind"])
def test_rows_of_text_and_pictures(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, version: str, dtype: Any, blind: str
) -> None:
    monkeypatch.setenv("NPUSIM_PICTURES", blind)
    table = with_table(sim, dtype, model={"merge": 0})
    bench = Bench(sim, version)
    for turns in ([(1, "what is it?")], [("two: ", 1, 2)], [(2, "what is it?")], ["text alone"]):
        text, done = bench.ask(*turns)
        order = bench.order(turns)
        rows = table[order.tokens]
        for span, values in zip(order.spans, bench.rows(), strict=True):
            rows[span.start : span.start + span.count] = values
        said = models.answer(text)
        assert sim.one("run")["kind"] == "embed"
        assert said["embeds"] == str(len(order.tokens)) == str(done.prompt)
        assert said["sums"] == models.sum_of(rows)
    assert not sim.trace("misuse")


def test_a_follow_up_with_embeddings(sim: Sim) -> None:
    with_table(sim, model={"merge": 0})
    bench = Bench(sim, "1.3.0")
    text, _ = bench.ask((1, "one"))
    _, done = bench.ask((1, "one"), text, "two")
    assert done.cached is not None
    # The library compares rows with rows, and what it generated itself has none.
    assert done.cached == len(bench.order([(1, "one")]).tokens)


def break_table(folder: Path, how: str) -> None:
    if how == "shape":
        np.save(folder / "embed.npy", np.zeros((VOCABULARY, 3), np.float16))
    elif how == "type":
        np.save(folder / "embed.npy", np.zeros((VOCABULARY, folders.EMBED), np.int32))
    elif how == "scale":
        np.save(folder / "embed.npy", np.zeros((VOCABULARY, folders.EMBED), np.int8))
    elif how == "rubbish":
        (folder / "embed.npy").write_bytes(b"rubbish")
    else:
        np.save(folder / "embed.npy", np.zeros((5, folders.EMBED), np.float16))


@pytest.mark.parametrize(
    ("how", "says"),
    [("shape", r"decoder\.embedding is 16"), ("type", "not int32"), ("rubbish", "no .npy file"),
     ("scale", "int8 needs decoder.files.embed_scale")],
)  # fmt: skip
def test_tables_that_are_none(sim: Sim, how: str, says: str) -> None:
    with_table(sim)
    break_table(sim.folder / "m", how)
    with pytest.raises(RkvlmdError, match=says) as caught:
        Bench(sim, "1.3.0")
    assert caught.value.code == "invalid_model"


def test_a_table_that_lacks_tokens(sim: Sim) -> None:
    with_table(sim)
    break_table(sim.folder / "m", "short")
    with pytest.raises(RkvlmdError, match="a token that the model lacks"):
        Bench(sim, "1.3.0").ask("hello")


# --- tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.2.1", "1.2.3", "1.3.1"])
@pytest.mark.parametrize("specials", ["parsed", "text"])
def test_tokens_in_the_place_of_text(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, version: str, specials: str
) -> None:
    # Whether the library knows special strings in a raw prompt is of no matter then.
    monkeypatch.setenv("NPUSIM_SPECIALS", specials)
    bench = Bench(sim, version, vision=False, decoder={"input": "tokens"})
    for order, text, done in bench.talk("how are <|im_end|> you?", "and now?", "and now?"):
        run = sim.one("run")
        assert (run["kind"], run["token_ids"]) == ("token", len(order.tokens))
        assert models.answer(text)["tokens"] == str(len(order.tokens)) == str(done.prompt)
    # A follow-up computes what is new, as with text.
    assert done.cached is not None
    assert done.cached > len(order.tokens) // 2
    if specials == "parsed":
        # They are the tokens that the library makes of the text: it has nothing to compute.
        session = bench.decoder._session
        value = inputs.prompt_input(session.library.layout, order.prompt.encode())
        assert session.run(value, infer_param(session.library), lambda *_: 0) == 0
        assert sim.one("prefill")["computed"] == 0
    with pytest.raises(RkvlmdError, match="has no tokens"):
        bench.ask("x", tokens=[])
    for token in (-1, 1 << 31, (1 << 32) + 5):
        with pytest.raises(RkvlmdError, match="a token that the model lacks"):
            bench.ask("x", tokens=[5, token])
    assert bench.ask("x")[1].reason == "stop"
    assert not sim.trace("misuse")


# --- manifests -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decoder", "says"),
    [
        ({"input": "embeddings"}, "decoder.input: embeddings need decoder.files.embed"),
        ({"input": "tokens"}, "decoder.input: tokens need a tokenizer, no encoder and no"),
        ({"adapters": [{"name": "a", "file": "x", "sha256": "0" * 64}] * 2}, "have the same name"),
        ({"adapters": [{"name": "a", "file": "x", "sha256": "0" * 64}], "prompt_cache": "x"},
         "decoder.prompt_cache: would be wrong for decoder.adapters"),
        ({"adapters": [{"name": "a", "file": "../x", "sha256": "0" * 64}]},
         "decoder.adapters[0].file: must lie inside"),
    ],
)  # fmt: skip
def test_manifests_that_cannot_be(tmp_path: Path, decoder: Any, says: str) -> None:
    tree = folders.manifest(folders.write(tmp_path / "m"), decoder=decoder)
    with pytest.raises(ManifestError) as caught:
        manifest.parse(json.dumps(tree).encode())
    assert any(says in problem for problem in caught.value.problems), caught.value.problems


def test_one_output_alone_can_be_given_as_rows(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "m", outputs=4)
    tree = json.loads((folder / "rkvlm.json").read_text())
    tree["decoder"] |= {"input": "embeddings"}
    tree["decoder"]["files"]["embed"] = tree["tokenizer"]
    with pytest.raises(ManifestError) as caught:
        manifest.parse(json.dumps(tree).encode())
    assert caught.value.problems == [
        "decoder.input: embeddings allow one output and no prompt_cache"
    ]
