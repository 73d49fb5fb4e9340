"""The binding against the simulated library of every version."""

from __future__ import annotations

import ctypes as c
import os
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest

from rkvlmd.engine import rkllm_inputs as inputs
from rkvlmd.engine import rkllm_types as types
from rkvlmd.engine.rkllm_library import Library, open_library
from rkvlmd.engine.rkllm_session import (
    ImageTags,
    InitError,
    Sampling,
    Session,
    Setup,
    infer_param,
)
from rkvlmd.engine.rkllm_types import Mode, State
from rkvlmd.errors import RkvlmdError
from tests.npusim import broken, compiler, models
from tests.npusim.fixture import Sim
from tests.npusim.house import plug_in

pytestmark = pytest.mark.process

VERSIONS = list(compiler.ABIS)
NEW = ["1.3.0", "1.3.1"]
TAGS = ImageTags(b"<|vision_start|>", b"<|vision_end|>", b"<|image_pad|>")
GREEDY = Sampling(1, 1.0, 1.0, 1.0, 0.0, 0.0)


@pytest.fixture
def sim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sim:
    return plug_in(tmp_path, monkeypatch)


@pytest.fixture(params=VERSIONS)
def library(request: pytest.FixtureRequest) -> Library:
    return open_library(str(compiler.library(request.param)))


def opened(
    library: Library, folder: Path, setup: dict[str, Any] | None = None, **model: Any
) -> Session:
    session = Session(library)
    path = models.rkllm(folder / "m.rkllm", **({"embed": 8} | model))
    values: dict[str, Any] = {"context": 1024, "max_new_tokens": 200, "tags": TAGS}
    session.open(Setup(path, **(values | (setup or {}))))
    session.raw_template()
    return session


@pytest.fixture
def session(sim: Sim, library: Library) -> Iterator[Session]:
    made = opened(library, sim.folder)
    yield made
    made.close()


class Seen:
    """A sink that keeps what it is told."""

    def __init__(self, answer: int = 0) -> None:
        self.text = b""
        self.states: list[State] = []
        self.tokens: list[int] = []
        self.perf: tuple[float, int, float, int, float] | None = None
        self.threads: set[int] = set()
        self.floats: Any = None
        self.answer = answer

    def __call__(self, state: State, result: Any) -> int:
        self.threads.add(threading.get_ident())
        self.states.append(state)
        if state is State.FINISH:
            perf = result.perf
            self.perf = tuple(getattr(perf, name) for name, _ in perf._fields_)
        else:
            self.text += result.text or b""
            self.tokens.append(result.token_id)
        for part, name in ((result.last_hidden_layer, "hidden_states"), (result.logits, "logits")):
            if getattr(part, name):
                columns = part.embd_size if name == "hidden_states" else part.vocab_size
                shape = (part.num_tokens, columns)
                self.floats = np.ctypeslib.as_array(getattr(part, name), shape).copy()
        return self.answer

    @property
    def said(self) -> dict[str, str]:
        return models.answer(self.text.decode())


def ask(session: Session, prompt: bytes = b"hello", **infer: Any) -> Seen:
    seen = Seen()
    value = inputs.prompt_input(session.library.layout, prompt)
    assert session.run(value, infer_param(session.library, **infer), seen) == 0
    return seen


def test_a_text_run(session: Session, sim: Sim) -> None:
    seen = ask(session, b"<|im_start|>user\nhow are you?<|im_end|>\n")
    assert seen.said["pictures"] == "0"
    assert seen.said["prompt"] == models.text_sum("<|im_start|>user\nhow are you?<|im_end|>\n")
    assert seen.states[-1] is State.FINISH
    assert set(seen.states[:-1]) == {State.NORMAL}
    assert seen.threads == {threading.get_ident()}
    assert seen.perf is not None
    assert seen.perf[1] == int(seen.said["tokens"])  # all of it was computed
    assert seen.perf[3] == len(seen.states) - 2  # without FINISH and the first token
    run = sim.one("run")
    assert (run["kind"], run["role"], run["keep_history"], run["mode"]) == (
        "prompt",
        "user",
        False,
        0,
    )
    assert run["top_k"] == 40  # the default of the constructor
    assert run["repeat"] == pytest.approx(1.1)


def test_the_parameters_arrive(sim: Sim, library: Library) -> None:
    setup = {
        "context": 512, "max_new_tokens": 77, "n_keep": 5, "domain": 1, "cpu_mask": 0xF0,
        "embed_flash": True, "sampling": GREEDY,
    }  # fmt: skip
    session = opened(library, sim.folder, setup)
    said = sim.one("init")
    for name, value in (
        ("context", 512), ("max_new", 77), ("n_keep", 5), ("domain", 1), ("mask", 0xF0),
        ("cpus", 4), ("embed_flash", True), ("top_k", 1), ("temperature", 1.0), ("repeat", 1.0),
    ):  # fmt: skip
        assert said[name] == value, name
    assert sim.one("template")["raw"] is True
    session.close()
    assert sim.trace("destroy")


def test_defaults_are_the_librarys(session: Session, sim: Sim) -> None:
    said = sim.one("init")
    assert (said["n_keep"], said["domain"], said["cpus"], said["mask"]) == (-1, 0, 4, 0xF0)
    assert said["temperature"] == pytest.approx(0.8)


@pytest.mark.parametrize("outputs", [1, 4])
def test_pictures(sim: Sim, library: Library, outputs: int) -> None:
    session = opened(library, sim.folder, outputs=outputs, merge=32, signed_rows=True)
    rows = [models.rows_of(i, 6, 8, outputs) for i in (3, 5)]
    block = inputs.stack(rows, tokens=6, row=8 * outputs, width=96, height=64, tags=TAGS)
    prompt = b"<|im_start|>user\n<image>first, <image>second<|im_end|>\n"
    seen = Seen()
    value = inputs.multimodal_input(library.layout, prompt, block)
    assert session.run(value, infer_param(library), seen) == 0
    assert seen.said["pictures"] == "2"
    assert seen.said["sums"] == ",".join(models.sum_of(r) for r in rows)
    assert seen.said["size"] == "96x64"
    run = sim.one("run")
    assert (run["picture_tokens"], run["prompt"]) == (6, prompt.decode())
    assert run["image_start"] == "<|vision_start|>"
    assert run["image_content"] == "<|image_pad|>"
    # Each picture is start, six rows and end.
    assert int(seen.said["tokens"]) > 2 * (1 + 6 + 1)
    session.close()


@pytest.mark.parametrize("version", NEW)
def test_video(sim: Sim, version: str) -> None:
    library = open_library(str(compiler.library(version)))
    session = opened(library, sim.folder, merge=32)
    frames = [np.full((4, 8), i, np.float32) for i in range(6)]
    block = inputs.stack(frames, tokens=4, row=8, width=64, height=64, tags=TAGS)
    seen = Seen()
    value = inputs.multimodal_input(
        library.layout, b"<video> or <video>", None, videos=block, frames=3
    )
    assert session.run(value, infer_param(library), seen) == 0
    assert sim.one("run")["frames"] == 6
    assert "videos=2 frames=6" in seen.text.decode()
    both = inputs.stack(
        [np.ones((4, 8), np.float32)], tokens=4, row=8, width=64, height=64, tags=TAGS
    )
    value = inputs.multimodal_input(
        library.layout, b"<image> <video> <video>", both, videos=block, frames=3
    )
    assert session.run(value, infer_param(library), seen) == 0
    session.close()


def test_video_is_refused_before_1_3(sim: Sim) -> None:
    library = open_library(str(compiler.library("1.2.3")))
    block = inputs.stack(
        [np.ones((4, 8), np.float32)], tokens=4, row=8, width=64, height=64, tags=TAGS
    )
    with pytest.raises(RkvlmdError, match="takes no video"):
        inputs.multimodal_input(library.layout, b"<video>", None, videos=block)


@pytest.mark.parametrize(
    "prompt", [b"none", b"<image><image>", b"<image><audio>", b"<image><video>"]
)
def test_places_are_counted_before_the_call(session: Session, prompt: bytes) -> None:
    block = inputs.stack(
        [np.ones((4, 8), np.float32)], tokens=4, row=8, width=64, height=64, tags=TAGS
    )
    with pytest.raises(RkvlmdError, match="The prompt has"):
        inputs.multimodal_input(session.library.layout, prompt, block)


def test_rows_of_another_length_are_refused() -> None:
    for rows in (np.ones((4, 7), np.float32), np.ones((3, 8), np.float32), np.ones((4, 8))):
        with pytest.raises(RkvlmdError, match="takes 4 x 8"):
            inputs.stack([rows], tokens=4, row=8, width=64, height=64, tags=TAGS)


def test_tokens_and_embeddings(session: Session, sim: Sim) -> None:
    ids = np.arange(10, dtype=np.int32)
    seen = Seen()
    value = inputs.token_input(session.library.layout, ids)
    assert session.run(value, infer_param(session.library), seen) == 0
    assert (sim.one("run")["kind"], sim.one("run")["token_ids"]) == ("token", 10)
    assert seen.said["tokens"] == "10"
    rows = np.random.default_rng(0).random((12, 8), np.float32)
    seen = Seen()
    value = inputs.embed_input(session.library.layout, rows)
    assert session.run(value, infer_param(session.library), seen) == 0
    assert seen.said["embeds"] == "12"
    assert seen.said["sums"] == models.sum_of(rows)


def test_the_prefix_is_reused(session: Session) -> None:
    first = ask(session, b"the same beginning\nand one end")
    again = ask(session, b"the same beginning\nand one end")
    other = ask(session, b"the same beginning\nbut another end, longer")
    assert first.perf is not None
    assert again.perf is not None
    assert other.perf is not None
    assert again.perf[1] == 0
    assert 0 < other.perf[1] < int(other.said["tokens"])
    assert session.cache_sizes()[0] > int(other.said["tokens"])
    session.clear()
    assert session.cache_sizes() == [0]
    cleared = ask(session, b"the same beginning\nand one end")
    assert cleared.perf is not None
    assert cleared.perf[1] == first.perf[1]


@pytest.mark.parametrize("version", NEW)
def test_sampling_and_limit_of_each_run(sim: Sim, version: str) -> None:
    session = opened(open_library(str(compiler.library(version))), sim.folder)
    seen = ask(session, sampling=Sampling(7, 0.5, 0.25, 1.5, 0.125, -0.5), max_new_tokens=3)
    run = sim.one("run")
    assert run["own_sampling"] is True
    for name, value in (
        ("top_k", 7), ("top_p", 0.5), ("temperature", 0.25), ("repeat", 1.5), ("frequency", 0.125),
        ("presence", -0.5), ("mirostat", 0), ("max_new", 3),
    ):  # fmt: skip
        assert run[name] == value, name
    assert seen.states == [State.NORMAL] * 3 + [State.FINISH]
    ask(session)
    assert sim.one("run")["own_sampling"] is False
    session.close()


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("finish", ["yes", "no"])
def test_abort(
    sim: Sim, library: Library, monkeypatch: pytest.MonkeyPatch, inside: bool, finish: str
) -> None:
    monkeypatch.setenv("NPUSIM_FINISH_AFTER_ABORT", finish)
    monkeypatch.setenv("NPUSIM_REPLY", "count")
    monkeypatch.setenv("NPUSIM_REPLY_WORDS", "5000")
    session = opened(library, sim.folder, {"max_new_tokens": 100_000})
    seen, count = Seen(), 0

    def sink(state: State, result: Any) -> int:
        nonlocal count
        count += 1
        if count == 5:
            if inside:
                session.abort_inside()
            else:
                thread = threading.Thread(target=session.abort)
                thread.start()
                thread.join()
        return seen(state, result)

    value = inputs.prompt_input(library.layout, b"x")
    assert session.run(value, infer_param(library), sink) == 0
    assert len(seen.tokens) == 5
    assert (seen.states[-1] is State.FINISH) == (finish == "yes")
    session.abort()  # nothing runs: harmless
    monkeypatch.setenv("NPUSIM_REPLY_WORDS", "3")
    assert ask(session).text == b"t0 t1 t2"  # the next run is clean
    session.close()


def test_an_exception_in_the_sink_ends_the_run_and_comes_out(session: Session) -> None:
    calls = 0

    def sink(_state: State, _result: Any) -> int:
        nonlocal calls
        calls += 1
        raise KeyboardInterrupt("told")

    value = inputs.prompt_input(session.library.layout, b"x")
    with pytest.raises(KeyboardInterrupt, match="told"):
        session.run(value, infer_param(session.library), sink)
    assert calls == 1
    assert ask(session).states[-1] is State.FINISH


@pytest.mark.parametrize("finish", ["yes", "no"])
@pytest.mark.parametrize("empty", ["yes", "no"])
def test_hidden_states(
    sim: Sim, library: Library, monkeypatch: pytest.MonkeyPatch, finish: str, empty: str
) -> None:
    monkeypatch.setenv("NPUSIM_HIDDEN_FINISH", finish)
    monkeypatch.setenv("NPUSIM_HIDDEN_EMPTY_FIRST", empty)
    session = opened(library, sim.folder)
    ids = np.arange(5, dtype=np.int32)
    seen = Seen(2 if library.layout.per_run else 0)
    value = inputs.token_input(library.layout, ids)
    assert session.run(value, infer_param(library, Mode.LAST_HIDDEN_LAYER), seen) == 0
    assert seen.floats.shape == (5, 8)
    assert seen.floats[3, 4] == 7
    assert sim.one("floats")["released"] is library.layout.per_run
    seen = Seen()
    assert session.run(value, infer_param(library, Mode.LOGITS), seen) == 0
    assert seen.floats.shape == (5, 1000)
    monkeypatch.setenv("NPUSIM_LOGITS_ROWS", "last")
    assert session.run(value, infer_param(library, Mode.LOGITS), seen) == 0
    assert seen.floats.shape == (1, 1000)
    session.close()


def test_lora(session: Session, sim: Sim) -> None:
    path = models.rkllm(sim.folder / "lora.rkllm")
    assert session.load_lora(b"pirate", path, 0.5) == 0
    assert sim.one("lora") | {"name": "pirate", "scale": 0.5} == sim.one("lora")
    assert ask(session, lora=b"pirate").said["lora"] == "pirate"
    assert "lora" not in ask(session).said
    value = inputs.prompt_input(session.library.layout, b"x")
    infer = infer_param(session.library, lora=b"unknown")
    assert session.run(value, infer, Seen()) == -1
    assert session.load_lora(b"bad", sim.folder / "missing", 1.0) != 0


def test_prompt_cache(session: Session, sim: Sim) -> None:
    system = b"you are a helpful assistant who answers briefly\n"
    file = sim.folder / "system.cache"
    cold = ask(session, system, save_prompt_cache=file)
    session.clear()
    assert session.load_prompt_cache(file) == 0
    warm = ask(session, system + b"question")
    assert cold.perf is not None
    assert warm.perf is not None
    assert warm.perf[1] < cold.perf[1]
    assert session.release_prompt_cache() == 0
    session.clear()
    after = ask(session, system)
    assert after.perf is not None
    assert after.perf[1] == cold.perf[1]
    assert session.load_prompt_cache(sim.folder / "missing") != 0


def test_cross_attention(sim: Sim, library: Library) -> None:
    session = opened(
        library, sim.folder, {"cross_attention": True}, cross=True, layers=2, kv_heads=3, head_dim=4
    )
    k = np.random.default_rng(1).random((2, 5, 3, 4), np.float32)
    v = np.random.default_rng(2).random((2, 3, 4, 5), np.float32)
    mask, pos = np.ones(5, np.float32), np.arange(5, dtype=np.int32)
    param = types.CrossAttnParam(
        *(a.ctypes.data_as(types.Floats) for a in (k, v, mask)), pos.ctypes.data_as(types.Ints), 5
    )
    assert session.set_cross_attention(param) == 0
    expected = zlib.crc32(b"".join(a.tobytes() for a in (k, v, mask, pos)))
    assert ask(session).said["cross"] == f"{expected:08x}"
    session.close()


def test_templates_and_tools(session: Session, sim: Sim) -> None:
    session.set_template(b"a system text", b"before", b"after")
    assert sim.one("template")["raw"] is False
    plain = int(ask(session, b"x").said["tokens"])
    session.raw_template()
    assert int(ask(session, b"x").said["tokens"]) < plain
    assert session.set_tools(b"", b'[{"name": "f"}]', b"tool_response") == 0
    assert session.set_tools(b"", b"not JSON", b"tool_response") != 0
    value = inputs.prompt_input(session.library.layout, b"not JSON")
    value.role = b"tool"
    assert session.run(value, infer_param(session.library), Seen()) == -1
    value = inputs.prompt_input(session.library.layout, b'[{"ok": 1}]')
    value.role = b"tool"
    value.enable_thinking = True
    assert session.run(value, infer_param(session.library), Seen()) == 0


def test_batches_have_the_stride_of_the_version(sim: Sim, library: Library) -> None:
    session = opened(library, sim.folder, {"batch": 3})
    array = inputs.batch(
        library.layout,
        [inputs.prompt_input(library.layout, p) for p in (b"one", b"two, longer", b"three")],
    )
    assert c.sizeof(array) == 3 * c.sizeof(library.layout.input)
    texts = [b"", b"", b""]

    def sink(_state: State, first: Any) -> int:
        results = c.cast(c.addressof(first), c.POINTER(types.Result))
        for i in range(3):
            if results[i].token_id >= 0:
                texts[i] += results[i].text or b""
        return 0

    assert session.run(array, infer_param(library), sink) == 0
    prompts = ("one", "two, longer", "three")
    assert [models.answer(t.decode())["prompt"] for t in texts] == [
        models.text_sum(p) for p in prompts
    ]
    assert len(session.cache_sizes(3)) == 3
    # Logits are refused with several lanes.
    assert session.run(array, infer_param(library, Mode.LOGITS), Seen()) == -1
    session.close()


@pytest.mark.parametrize("version", NEW)
def test_tokenizer_and_embedding_callbacks(sim: Sim, version: str) -> None:
    library = open_library(str(compiler.library(version)))
    session = Session(library)
    asked: list[Any] = []

    def tokenizer(text: bytes) -> list[int]:
        asked.append(text)
        return list(text)

    def embeddings(tokens: Any, room: Any) -> None:
        asked.append(list(tokens))
        for i in range(len(room)):
            room[i] = 1.0

    path = models.rkllm(sim.folder / "m.rkllm", embed=8, tokenizer=False, embedding=False)
    session.open(Setup(path, 512, 100), tokenizer=tokenizer, embeddings=embeddings)
    session.raw_template()
    seen = ask(session, b"abc")
    assert asked == [b"abc", [97, 98, 99]]
    assert seen.said["tokens"] == "3"
    session.close()


@pytest.mark.parametrize("version", VERSIONS[1:])
def test_the_asynchronous_run(sim: Sim, version: str) -> None:
    session = opened(open_library(str(compiler.library(version))), sim.folder)
    seen, done = Seen(), threading.Event()

    def sink(state: State, result: Any) -> int:
        seen(state, result)
        if state is State.FINISH:
            done.set()
        return 0

    value = inputs.prompt_input(session.library.layout, b"x")
    infer = infer_param(session.library)
    assert session.run_async(value, infer, sink) == 0
    assert done.wait(60)
    assert seen.threads != {threading.get_ident()}
    session.close()  # waits for the library's thread
    assert seen.said["pictures"] == "0"


def test_running_is_said_in_two_ways(session: Session) -> None:
    idle = session.is_running()
    said = []
    value = inputs.prompt_input(session.library.layout, b"x")
    session.run(
        value, infer_param(session.library), lambda *_: said.append(session.is_running()) or 0
    )
    assert set(said) == {1 - idle}
    assert idle == (0 if session.library.layout.per_run else 1)


@pytest.mark.parametrize("text", ["a é b", "\u20ac and \U0001f642", "plain"])
@pytest.mark.parametrize("split", ["waiting", "bytes"])
def test_characters_that_come_in_parts(
    sim: Sim, library: Library, monkeypatch: pytest.MonkeyPatch, text: str, split: str
) -> None:
    monkeypatch.setenv("NPUSIM_SPLIT", split)
    monkeypatch.setenv("NPUSIM_REPLY", "text")
    monkeypatch.setenv("NPUSIM_REPLY_TEXT", text)
    session = opened(library, sim.folder, byte_ids=range(256))
    seen = ask(session)
    assert seen.text.decode() == text
    waits = sum(1 for b in text.encode() if b >= 0x80) - sum(1 for ch in text if ord(ch) >= 0x80)
    assert seen.states.count(State.WAITING) == (waits if split == "waiting" else 0)
    session.close()


@pytest.mark.parametrize(
    ("model", "setup"),
    [
        ({"cores": 3}, {"cpu_mask": 0b11}),
        ({"limit": 512}, {"context": 1024}),
        ({"platform": "RK3576"}, {}),
        ({}, {"batch": 0}),
        ({}, {"batch": 101}),
    ],
)
def test_what_a_load_refuses(
    sim: Sim, library: Library, model: Any, setup: Any, capfd: Any
) -> None:
    with pytest.raises(InitError):
        opened(library, sim.folder, setup, **model)
    assert "E rkllm:" in capfd.readouterr().err


@pytest.mark.parametrize("how", ["rc", "zero"])
def test_no_memory_at_init(
    sim: Sim, library: Library, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setenv("NPUSIM_OOM", how)
    monkeypatch.setenv("NPUSIM_FAULT", "oom@init")
    with pytest.raises(InitError):
        opened(library, sim.folder)
    opened(library, sim.folder).close()  # once alone


@pytest.mark.parametrize("kind", ["error", "fail"])
@pytest.mark.parametrize("place", ["prefill", "decode:after=2"])
def test_runs_that_fail(
    session: Session, monkeypatch: pytest.MonkeyPatch, kind: str, place: str
) -> None:
    monkeypatch.setenv("NPUSIM_FAULT", f"{kind}@{place}")
    seen = Seen()
    value = inputs.prompt_input(session.library.layout, b"x")
    assert session.run(value, infer_param(session.library), seen) == -1
    assert (State.ERROR in seen.states) == (kind == "error")
    assert State.FINISH not in seen.states
    assert ask(session).states[-1] is State.FINISH


def test_a_prompt_longer_than_the_context(session: Session) -> None:
    seen = Seen()
    value = inputs.prompt_input(session.library.layout, b"word " * 3000)
    assert session.run(value, infer_param(session.library), seen) == -1
    assert seen.states == []


def test_a_pause_and_a_ranged_clear(session: Session) -> None:
    value = inputs.prompt_input(session.library.layout, b"a text of some words")
    seen = Seen(answer=1)
    assert session.run(value, infer_param(session.library), seen) == 0
    assert len(seen.tokens) == 1
    size = session.cache_sizes()[0]
    assert session.clear_range([0], [2]) == 0
    assert session.cache_sizes() == [size - 2]
    assert ask(session).states[-1] is State.FINISH


# --- the simulator fails callers that are wrong --------------------------------------------

ONLY_NEW = {
    "top_k_as_a_float", "sampling_filled_in_part", "a_callback_structure_that_changed",
    "no_image_tags", "more_videos_than_places", "a_video_in_a_picture_s_place",
    "frames_with_another_stride", "frames_of_another_size",
}  # fmt: skip
WHERE = {"sound_that_was_not_zeroed": ["1.3.1"], "image_tags_of_null": ["1.2.3"],
         "a_second_model_in_one_process": ["1.2.1"]}  # fmt: skip
WRONG = [
    (name, version)
    for name in [*broken.CALLERS, *broken.CROSSING, *broken.SETUPS, "a_second_model_in_one_process"]
    for version in WHERE.get(name, ["1.3.0"] if name in ONLY_NEW else ["1.2.3", "1.3.1"])
]


@pytest.mark.parametrize(("name", "version"), WRONG)
def test_a_wrong_caller_is_told(tmp_path: Path, name: str, version: str) -> None:
    made = Sim(tmp_path)
    model = models.rkllm(
        tmp_path / "m.rkllm", embed=broken.EMBED, outputs=broken.OUTPUTS, merge=32, signed_rows=True
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.npusim.broken", name, compiler.library(version), model],
        env={**os.environ, **made.environ}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    section = (broken.CALLERS | broken.CROSSING | broken.SETUPS).get(name, ("2.1", None))[0]
    said = made.one("misuse")["section"]
    assert said.rstrip(ascii_lowercase) == section, done.stderr
    assert f"npusim: misuse (fact {said})" in done.stderr
    assert done.returncode == -signal.SIGABRT
