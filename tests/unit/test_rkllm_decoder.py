"""The decoder backend against the simulated library, with each of its switches both ways."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rkvlmd.engine import rkllm_log, rkllm_probe
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import rkllm
from rkvlmd.wire import child
from tests.npusim import compiler, folders, models
from tests.npusim.bench import Bench
from tests.npusim.fixture import Sim
from tests.npusim.house import plug_in

pytestmark = pytest.mark.process

ALL = ["1.2.1", "1.2.3", "1.3.0", "1.3.1"]
#: What is marked as not certain, or is an open question, both ways.
SWITCHES = [
    {},
    {"NPUSIM_PICTURES": "blind"},
    {"NPUSIM_PICTURES": "never"},
    {"NPUSIM_SPECIALS": "text"},
    {"NPUSIM_FINISH_AFTER_ABORT": "no"},
    {"NPUSIM_KV_SIZE": "zero"},
    {"NPUSIM_KV_SIZE": "prompt"},
    {"NPUSIM_KV_SIZE": "refused"},
    {"NPUSIM_EOS_EVENT": "no"},
    {"NPUSIM_KEEP_SYSTEM": "yes"},
    {"NPUSIM_IDLE_ABORT": "sticks"},
    {"NPUSIM_SPLIT": "bytes"},
    {"NPUSIM_CALLBACK_THREAD": "other"},
    {"NPUSIM_LOG": "stdout"},
    {"NPUSIM_PAUSE": "segv"},
    {"NPUSIM_HEADER": "any"},
    {"NPUSIM_AFFINITY": "fails"},
    {"NPUSIM_DOMAINS": "several"},
    {"NPUSIM_SWITCH_MS": "5"},
    {"NPUSIM_THINK": "ends"},
    {"RKLLM_LOG_LEVEL": "2"},
]


@pytest.fixture
def sim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sim]:
    yield plug_in(tmp_path, monkeypatch)
    Bench.close_all()


def use(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(f"NPUSIM_{name}", value)


# --- the right bytes arrive ------------------------------------------------------------------


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda s: "-".join(map("=".join, s.items())))
@pytest.mark.parametrize("version", ALL)
@pytest.mark.parametrize("outputs", [1, 4])
def test_a_conversation_with_pictures(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, version: str, outputs: int, switch: dict[str, str]
) -> None:
    for name, value in switch.items():
        monkeypatch.setenv(name, value)
    model = {"megabytes": 5000} if "NPUSIM_DOMAINS" in switch else {}
    bench = Bench(sim, version, outputs=outputs, model=model)
    exact = switch.get("NPUSIM_SPECIALS") != "text"
    assert (bench.ready["driver"], bench.ready["npu_cores"]) == ("0.9.8", 3)
    probed = bench.ready["probe"]
    finishes = switch.get("NPUSIM_FINISH_AFTER_ABORT") != "no"
    # Before 1.3.0 a short run is one that is aborted: without its end nothing is known.
    seen = finishes or version >= "1.3"
    assert probed["finish_after_abort"] is finishes
    if seen:
        elsewhere = switch.get("NPUSIM_CALLBACK_THREAD") == "other"
        assert probed["callbacks_elsewhere"] is elsewhere
    assert probed["pictures_told_apart"] is (seen and switch.get("NPUSIM_PICTURES") != "blind")
    assert (probed["special_strings"] == 1) is (seen and exact)
    turns: list[Any] = []
    # The same picture with a second question, another one of the same size, then back.
    for number, question in (
        (1, "what is it?"),
        (1, "and what else?"),
        (2, "what is it?"),
        (1, "?"),
    ):
        text, done = bench.ask((number, question))
        said = models.answer(text)
        assert (said["pictures"], said["sums"]) == ("1", bench.sums())
        assert said["size"] == "64x64"
        order = bench.order([(number, question)])
        assert said["prompt"] == models.text_sum(order.prompt)
        if exact:
            assert said["tokens"] == str(len(order.tokens))
        assert done.reason == "stop"
        assert done.prompt == len(order.tokens)
        assert done.perf is not None
        run = sim.one("run")
        assert (run["width"], run["height"], run["keep_history"]) == (64, 64, False)
        assert run["image_content"] == "<|image_pad|>"
    # One conversation over several turns.
    for question in ((1, "first"), "second", (2, "third") if version != "1.2.1" else "third"):
        turns.append(question)
        text, done = bench.ask(*turns)
        assert models.answer(text)["sums"] == bench.sums()
        turns.append(text)
    assert done.reason == "stop"
    assert not sim.trace("misuse")


def test_the_prompt_is_what_the_template_makes(sim: Sim) -> None:
    bench = Bench(sim, "1.3.0")
    bench.ask((1, "a <image> b <|im_end|> c <video> \0 d <|image_pad|>"))
    expected = (
        "<|im_start|>user\n<image>a <\u200bimage> b <\u200b|im_end|> c <\u200bvideo>  d"
        " <\u200b|image_pad|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert sim.one("run")["prompt"] == expected


def test_a_model_without_pictures(sim: Sim) -> None:
    bench = Bench(sim, "1.3.1", vision=False)
    text, done = bench.ask("hello, you")
    assert sim.one("run")["kind"] == "prompt"
    order = bench.order(["hello, you"])
    assert models.answer(text)["tokens"] == str(len(order.tokens)) == str(done.prompt)
    # No pictures, so no need to know whether they are told apart.
    assert len(sim.trace("run")) == 1


def test_text_alone_on_a_model_with_pictures(sim: Sim) -> None:
    bench = Bench(sim, "1.2.3")
    bench.ask("hello")
    assert sim.one("run")["kind"] == "prompt"


# --- the cache -------------------------------------------------------------------------------


def length(prompt: str) -> int:
    """Return the tokens of a prompt in which ``<>`` stands for a special one."""
    return len(prompt.replace("<>", "<"))


def clears(sim: Sim) -> int:
    return len(sim.trace("clear"))


@pytest.mark.parametrize("version", ALL)
@pytest.mark.parametrize("pictures", ["apart", "blind"])
def test_clear_only_where_it_must_be(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, version: str, pictures: str
) -> None:
    use(monkeypatch, PICTURES=pictures)
    bench = Bench(sim, version)
    assert bench.ready["pictures_told_apart"] is (pictures == "apart")
    before = clears(sim)
    text, first = bench.ask((1, "one question"))
    assert first.cached == 0
    # A follow-up: what is new is computed, and nothing else.
    _, done = bench.ask((1, "one question"), text, "and this?")
    new = len(bench.order([(1, "one question"), text, "and this?"]).tokens)
    assert done.perf is not None
    assert done.cached == new - done.perf.prefill_tokens
    assert done.perf.prefill_tokens == length("<>\n<>user\nand this?<>\n<>assistant\n")
    assert next(m for m in bench.said if isinstance(m, child.Prefilled)).cached == done.cached
    assert clears(sim) == before
    # Another picture at the same place.
    text, done = bench.ask((2, "one question"))
    assert models.answer(text)["sums"] == bench.sums()
    assert clears(sim) == before + (pictures == "blind")
    assert done.cached == (length("<>user\n<>") if pictures == "apart" else 0)


def test_another_text_before_a_picture_needs_no_clear(
    sim: Sim, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, PICTURES="blind")
    bench = Bench(sim, "1.3.0")
    before = clears(sim)
    bench.ask(("first words", 1))
    text, _ = bench.ask(("other words", 2))
    assert models.answer(text)["sums"] == bench.sums()
    assert clears(sim) == before


def test_an_unknown_cache_is_cleared(sim: Sim, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(sim, "1.3.0")
    bench.ask((1, "x"))
    before = clears(sim)
    monkeypatch.setenv("NPUSIM_FAULT", "error@prefill")
    with pytest.raises(RkvlmdError, match="failed on this request"):
        bench.ask((1, "x"))
    assert clears(sim) == before
    _, done = bench.ask((1, "x"))
    assert clears(sim) == before + 1
    assert done.cached == 0


def test_a_model_that_reuses_nothing(sim: Sim) -> None:
    bench = Bench(sim, "1.3.0", model={"reuse": False}, family="qwen3_5")
    bench.ask("x")
    _, done = bench.ask("x")
    assert done.cached == 0
    assert next(m for m in bench.said if isinstance(m, child.Prefilled)).cached == 0
    assert {"no_prefix_reuse", "leaks"} <= set(bench.ready["defects"])


def test_a_leaking_child_asks_to_be_replaced(sim: Sim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rkvlmd.engine.rkllm_defects.RECYCLE_RUNS", 3)
    leaky = Bench(sim, "1.3.0", family="qwen3_5")
    assert [leaky.ask("x")[1].recycle for _ in range(4)] == [False, False, True, True]
    sound = Bench(sim, "1.3.0", name="n")
    assert not any(sound.ask("x")[1].recycle for _ in range(4))


def test_the_probe_is_remembered(sim: Sim) -> None:
    Bench(sim, "1.3.0")
    runs = len(sim.trace("run"))
    Bench(sim, "1.3.0")
    assert len(sim.trace("run")) == runs  # by the first
    Bench(sim, "1.3.1")
    assert len(sim.trace("run")) == 2 * runs  # another library
    Bench(sim, "1.3.1", name="other", model={"toolkit": "1.3.0"})
    assert len(sim.trace("run")) == 3 * runs  # another model
    kept = json.loads((sim.folder / rkllm_probe.FILE).read_text())
    assert [found["pictures_told_apart"] for found in kept.values()] == [True, True, True]


def test_another_file_of_the_same_version_is_probed_anew(sim: Sim) -> None:
    Bench(sim, "1.3.0")
    runs = len(sim.trace("run"))
    copy = sim.folder / "librkllmrt.so"
    copy.write_bytes(Path(compiler.library("1.3.0")).read_bytes() + b"\0")
    for _ in range(2):
        Bench(sim, "1.3.0", options={"library": str(copy)})
        assert len(sim.trace("run")) == 2 * runs


@pytest.mark.parametrize("size", ["whole", "prompt", "zero"])
def test_the_probe_says_what_no_document_does(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    use(monkeypatch, KV_SIZE=size)
    probed = Bench(sim, "1.3.0").ready["probe"]
    kept, ran = probed["kept_after_run"], probed["run_tokens"]
    assert ran > folders.TOKENS
    assert kept == {"whole": ran + 1, "prompt": ran, "zero": 0}[size]
    assert sim.trace("run")[-1]["prompt"] == "a"
    assert sim.trace("clear")[-1]["t"] > sim.trace("run")[-1]["t"]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 3}', "[" * 100_000])
def test_a_damaged_memory_of_probes(sim: Sim, content: str) -> None:
    (sim.folder / rkllm_probe.FILE).write_text(content)
    assert Bench(sim, "1.3.0").ready["pictures_told_apart"] is True


def test_a_probe_that_fails_means_no(sim: Sim, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FAULT="fail@prefill")
    assert Bench(sim, "1.3.0").ready["pictures_told_apart"] is False


def test_the_memory_of_probes_is_bounded(tmp_path: Path) -> None:
    for i in range(100):
        rkllm_probe.remember(str(tmp_path), f"key {i}", rkllm_probe.Found(special_strings=i))
    assert rkllm_probe.remembered(str(tmp_path), "key 0") is None
    assert rkllm_probe.remembered(str(tmp_path), "key 99") == rkllm_probe.Found(special_strings=99)
    rkllm_probe.remember(str(tmp_path / "missing"), "key", rkllm_probe.Found())  # best effort
    assert rkllm_probe.remembered("", "key") is None


# --- the end of an answer --------------------------------------------------------------------


@pytest.mark.parametrize("version", ALL)
@pytest.mark.parametrize("eos", ["yes", "no"])
@pytest.mark.parametrize("ids", [True, False])
def test_reasons(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, version: str, eos: str, ids: bool
) -> None:
    use(monkeypatch, REPLY="text", REPLY_TEXT="four", EOS_EVENT=eos)
    bench = Bench(sim, version, vision=False, **({} if ids else {"stop_ids": []}))
    for limit, reason, text in ((500, "stop", "four"), (3, "length", "fou"), (1, "length", "f")):
        said, done = bench.ask("x", max_tokens=limit)
        assert (done.reason, said, done.completion) == (reason, text, len(text)), limit
    # All tokens of the answer, but not its end: the limit was reached.
    assert bench.ask("x", max_tokens=4)[1].reason == "length"
    assert bench.ask("x", max_tokens=5)[1].reason == "stop"
    # 1.2 knows the limit of its init alone: there the run is aborted.
    assert bool(sim.trace("abort")) == version.startswith("1.2")


@pytest.mark.parametrize("version", ALL)
@pytest.mark.parametrize("finish", ["yes", "no"])
def test_stop_strings(sim: Sim, monkeypatch: pytest.MonkeyPatch, version: str, finish: str) -> None:
    use(monkeypatch, REPLY="text", REPLY_TEXT="one two three", FINISH_AFTER_ABORT=finish)
    bench = Bench(sim, version, vision=False)
    text, done = bench.ask("x", stop=["o thr"])
    assert (text, done.reason) == ("one tw", "stop")
    assert (done.perf is None) == (finish == "no")
    assert bench.ask("x", stop=["threes"])[0] == "one two three"
    assert bench.ask("x", stop=["x", "e"])[0] == "on"


@pytest.mark.parametrize("version", ALL)
@pytest.mark.parametrize("split", ["waiting", "bytes"])
def test_characters_stay_whole(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, version: str, split: str
) -> None:
    use(monkeypatch, REPLY="text", REPLY_TEXT="a\u20ac\U0001f642", SPLIT=split)
    bench = Bench(sim, version, vision=False)
    text, done = bench.ask("x")
    assert text == "a\u20ac\U0001f642"
    assert done.completion == 8
    pieces = [m.text for m in bench.said if isinstance(m, child.Text)]
    assert pieces == ["a", "", "", "\u20ac", "", "", "", "\U0001f642"]
    # Cut inside a character: the rest of it never comes.
    text, done = bench.ask("x", max_tokens=6)
    assert text == ("a\u20ac\ufffd" if split == "bytes" else "a\u20ac")
    assert done.reason == "length"


@pytest.mark.parametrize("version", ALL)
@pytest.mark.parametrize("finish", ["yes", "no"])
@pytest.mark.parametrize("idle", ["ignored", "sticks"])
def test_abort_from_another_thread(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, version: str, finish: str, idle: str
) -> None:
    use(monkeypatch, REPLY="count", REPLY_WORDS="400", FINISH_AFTER_ABORT=finish, IDLE_ABORT=idle)
    bench = Bench(sim, version, vision=False)
    count = 0

    def on(message: Any) -> None:
        nonlocal count
        count += 1
        if count == 5:
            thread = threading.Thread(target=bench.decoder.abort)
            thread.start()
            thread.join()

    text, done = bench.ask("x", on=on, max_tokens=2000)
    assert done.reason == "aborted"
    assert text == "t0 t"
    bench.decoder.abort()  # nothing runs
    use(monkeypatch, REPLY_WORDS="3")
    before = clears(sim)
    text, done = bench.ask("x")
    assert (text, done.reason) == ("t0 t1 t2", "stop")
    assert clears(sim) == before + 1


def test_abort_during_prefill_waits_for_it(sim: Sim, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(sim, "1.3.0", vision=False)
    use(monkeypatch, PREFILL_MS="0.2", FAULT="wait@prefill")

    def abort_inside() -> None:
        while not sim.trace("fault"):
            time.sleep(0.001)
        bench.decoder.abort()
        sim.go()

    thread = threading.Thread(target=abort_inside)
    thread.start()
    text, done = bench.ask("y" * 400)
    thread.join()
    assert (text, done.reason, done.completion) == ("", "aborted", 0)
    prefill = sim.one("prefill")
    assert prefill["end"] - prefill["begin"] >= 0.2e6 * 400  # all of it


@pytest.mark.parametrize("version", ALL)
@pytest.mark.parametrize("kind", ["error", "fail"])
@pytest.mark.parametrize("place", ["prefill", "decode:after=3"])
def test_failing_runs(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, version: str, kind: str, place: str
) -> None:
    bench = Bench(sim, version, vision=False)
    use(monkeypatch, FAULT=f"{kind}@{place}")
    with pytest.raises(RkvlmdError) as caught:
        bench.ask("x")
    silent = (kind, place) == ("fail", "prefill")
    assert caught.value.code == ("context_length_exceeded" if silent else "engine_error")
    assert bench.ask("x")[1].reason == "stop"


def test_a_daemon_that_is_gone(sim: Sim) -> None:
    bench = Bench(sim, "1.3.0", vision=False)

    def on(message: Any) -> None:
        if isinstance(message, child.Text):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        bench.ask("x", on=on)
    assert bench.ask("x")[1].reason == "stop"


# --- what is refused before the library sees it ----------------------------------------------


def test_prompts_that_do_not_fit(sim: Sim) -> None:
    bench = Bench(sim, "1.3.0", vision=False, decoder={"context": 256})
    with pytest.raises(RkvlmdError, match="context is 256 tokens, but the prompt has") as caught:
        bench.ask("y" * 300)
    assert caught.value.code == "context_length_exceeded"
    assert not sim.trace("run")
    # Without a tokenizer nobody knows; the library says it by a code alone.
    with pytest.raises(RkvlmdError, match="does not fit") as caught:
        bench.ask("y" * 300, tokens=[])
    assert caught.value.code == "context_length_exceeded"


def test_orders_that_are_not_consistent(sim: Sim) -> None:
    bench = Bench(sim, "1.3.0")
    runs = len(sim.trace("run"))
    good = bench.order([(1, "x")])
    fields = {n: getattr(good, n) for n in good.__struct_fields__ if n != "fds"}
    rows = bench.rows()
    wrong = [
        (fields | {"prompt": ""}, rows),
        (fields | {"prompt": "no place"}, rows),
        (fields | {"prompt": good.prompt + "<image>"}, rows),
        (fields | {"prompt": good.prompt + "<video>"}, rows),
        (fields | {"prompt": good.prompt + "<audio>"}, rows),
        (fields | {"prompt": good.prompt + "\0"}, rows),
        (fields, []),
        (fields | {"spans": []}, rows),
        (fields, [rows[0][:-1]]),
        (fields, [rows[0][:, :-1]]),
    ]
    for values, given in wrong:
        with pytest.raises(RkvlmdError) as caught:
            bench.decoder.generate(child.Generate(**values), given, lambda _m: None)
        assert caught.value.code == "engine_error"
    assert len(sim.trace("run")) == runs
    assert bench.decoder.generate(good, rows, lambda _m: None).reason == "stop"


@pytest.mark.parametrize(("version", "family"), [("1.2.1", "smolvlm"), ("1.2.3", "qwen3_vl")])
def test_versions_that_mix_pictures_up(sim: Sim, version: str, family: str) -> None:
    bench = Bench(sim, version, family=family)
    bench.ask((1, "x"))
    with pytest.raises(RkvlmdError, match="mixes up several pictures") as caught:
        bench.ask((1, 2, "x"))
    assert caught.value.status == 400


# --- counting without a tokenizer ------------------------------------------------------------


@pytest.mark.parametrize("size", ["whole", "prompt", "zero"])
def test_without_a_tokenizer(sim: Sim, monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    use(monkeypatch, KV_SIZE=size, REPLY="text", REPLY_TEXT="yes")
    bench = Bench(sim, "1.3.0", count_tokens=False)
    order = bench.order([(1, "a question of some length, 123")])
    assert order.tokens == []
    _, done = bench.ask((1, "a question of some length, 123"))
    true = length("<>user\n<>....<>a question of some length, 123<>\n<>assistant\n")
    assert done.prompt is not None
    if size == "whole":
        assert done.prompt == true
    assert done.prompt > 20
    assert next(m for m in bench.said if isinstance(m, child.Prefilled)).prompt == order.count


@pytest.mark.parametrize("tokens", [True, False], ids=["counted", "estimated"])
def test_a_library_that_does_not_say_how_much_it_holds(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, tokens: bool
) -> None:
    use(monkeypatch, KV_SIZE="refused")
    bench = Bench(sim, "1.3.0", count_tokens=tokens)
    assert bench.ready["probe"]["kept_after_run"] == 0
    assert bench.ready["pictures_told_apart"] is True
    order = bench.order([(1, "a question")])
    text, done = bench.ask((1, "a question"))
    assert (done.reason, done.prompt) == ("stop", len(order.tokens) or order.count)
    assert text


# --- sampling --------------------------------------------------------------------------------

OTHER = {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "repetition_penalty": 1.25,
         "frequency_penalty": 0.5, "presence_penalty": -0.5}  # fmt: skip


@pytest.mark.parametrize("version", ["1.3.0", "1.3.1"])
def test_sampling_of_each_request(sim: Sim, version: str) -> None:
    bench = Bench(sim, version, vision=False)
    _, done = bench.ask("x", **OTHER)
    run = sim.one("run")
    assert done.ignored == []
    assert (run["top_k"], run["top_p"], run["temperature"]) == (3, 0.5, 0.5)
    assert (run["repeat"], run["frequency"], run["presence"]) == (1.25, 0.5, -0.5)
    assert (run["max_new"], run["mirostat"]) == (500, 0)
    bench.ask("x")  # greedy, whatever else is said
    assert (sim.one("run")["top_k"], sim.one("run")["repeat"]) == (1, 1.0)
    bench.ask("x", temperature=1.0)
    assert sim.one("run")["top_k"] > 200_000  # off


@pytest.mark.parametrize(
    "asked",
    [{"top_k": 1 << 31}, {"top_k": (1 << 32) + 1}, {"top_p": 1e-300}, {"temperature": 1e-300},
     {"repetition_penalty": 1e-300}, {"presence_penalty": 1e-300}, {"max_tokens": 1 << 40}],
    ids=str,
)  # fmt: skip
def test_numbers_beyond_32_bits(sim: Sim, asked: dict[str, Any]) -> None:
    bench = Bench(sim, "1.3.1", vision=False)
    _, done = bench.ask("x", **({"temperature": 1.0} | asked))
    assert done.reason == "stop"
    run = sim.one("run")
    greedy = asked.get("temperature", 1.0) < 0.5
    assert run["top_k"] == (1 if greedy else rkllm.ALL_TOKENS)
    assert min(run["temperature"], run["top_p"], run["repeat"]) > 0
    assert 1 <= run["max_new"] <= bench.manifest.decoder.context
    Bench.close_all()
    defaults = {"temperature": 1.0} | {k: v for k, v in asked.items() if k != "max_tokens"}
    Bench(sim, "1.2.3", name="old", vision=False, defaults=defaults)
    start = sim.one("init")
    assert start["top_k"] == (1 if greedy else rkllm.ALL_TOKENS)
    assert min(start["temperature"], start["repeat"]) > 0


@pytest.mark.parametrize("version", ["1.2.1", "1.2.3"])
def test_sampling_before_1_3(sim: Sim, version: str, capfd: Any) -> None:
    defaults = {"temperature": 0.25, "top_k": 7, "repetition_penalty": 1.5}
    bench = Bench(sim, version, vision=False, defaults=defaults)
    start = sim.one("init")
    assert (start["top_k"], start["temperature"], start["repeat"]) == (7, 0.25, 1.5)
    assert bench.ask("x", **defaults)[1].ignored == []
    assert bench.ask("x", **OTHER)[1].ignored == [
        "temperature", "top_k", "top_p", "repetition_penalty", "frequency_penalty",
        "presence_penalty",
    ]  # fmt: skip
    capfd.readouterr()
    assert bench.ask("x", repetition_penalty=1.5)[1].ignored == ["temperature"]
    assert "without effect on this RKLLM runtime: temperature\n" in capfd.readouterr().out
    strict = (
        Bench(sim, version, name="m", options={"sampling": "reject"})
        if version != "1.2.1"
        else None
    )  # one model in a process
    if strict is not None:
        with pytest.raises(RkvlmdError, match="samples in one way alone") as caught:
            strict.ask("x", **OTHER)
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "temperature")
        assert strict.ask("x", **defaults)[1].reason == "stop"


# --- load ------------------------------------------------------------------------------------


def test_what_a_load_tells(sim: Sim) -> None:
    bench = Bench(sim, "1.3.0", decoder={"cpu_mask": 0xF0, "n_keep": 4, "embed_flash": True})
    said = {k: v for k, v in bench.ready.items() if k not in {"defects", "probe"}}
    assert said == {
        "libraries": {"librkllmrt": "1.3.0"}, "layout": "1.3.0", "context": 2048, "embedding": 16,
        "adapters": [], "prompt_cache": False, "iommu_domain": 1, "pictures_told_apart": True,
        "sampling_per_request": True, "conversations": False,
        "driver": "0.9.8", "platform": "RK3588", "toolkit": "1.2.3", "context_limit": 4096,
        "npu_cores": 3, "target": "RK3588", "dtype": "W8A8",
    }  # fmt: skip
    start = sim.one("init")
    assert (start["domain"], start["mask"], start["cpus"]) == (1, 0xF0, 4)
    assert (start["n_keep"], start["embed_flash"], start["context"]) == (4, True, 2048)
    assert sim.one("template")["raw"] is True


@pytest.mark.parametrize(
    ("soc", "domain"), [("rk3588", 1), ("rk3576", 1), ("rk3562", 0), ("rv1126b", 0)]
)
def test_the_domain_follows_the_soc(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, soc: str, domain: int
) -> None:
    use(monkeypatch, PLATFORM=soc.upper())
    Bench(sim, "1.3.0", options={"soc": soc}, vision=False, model={"platform": soc.upper()})
    assert sim.one("init")["domain"] == domain
    Bench(sim, "1.3.0", name="n", options={"soc": soc}, vision=False,
          model={"platform": soc.upper()}, decoder={"iommu_domain": 3})  # fmt: skip
    assert sim.one("init")["domain"] == 3


LOADS = [
    # model file, manifest's decoder, environment, code, text
    ({"limit": 1024}, {}, {}, "invalid_model", r"decoder\.context: .* 2048, .* at most 1024"),
    ({"cores": 3}, {"cpu_mask": 3, "npu_cores": 0}, {}, "invalid_model", r"decoder\.cpu_mask"),
    ({"cores": 2}, {}, {}, "invalid_model", r"decoder\.npu_cores: .* says 3, .* for 2"),
    ({"platform": "RK3576"}, {}, {}, "invalid_model", "another SoC"),
    ({}, {}, {"FAULT": "oom@init"}, "insufficient_memory", "decoder.context"),
    ({}, {}, {"FAULT": "oom@init", "OOM": "zero"}, "insufficient_memory", "memory"),
    ({}, {}, {"FAULT": "platform@init"}, "invalid_model", "rkvlmctl doctor"),
    ({}, {}, {"FAULT": "fail@init"}, "invalid_model", "cannot load language.rkllm; its log"),
    ({}, {}, {"DRIVER": "0.9.2"}, "model_failed", r"driver is version 0\.9\.2, .* need 0\.9\.8"),
    ({"limit": 1024}, {}, {"DRIVER": "0.9.2"}, "invalid_model", r"decoder\.context"),
    ({}, {"runtime_versions": ["1.2.3"]}, {}, "model_failed", r"runtime_versions: .* 1\.2\.3, but"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "decoder", "env", "code", "says"), LOADS)
def test_loads_that_fail(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, model: Any, decoder: Any, env: Any, code: str,
    says: str,
) -> None:  # fmt: skip
    use(monkeypatch, **env)
    with pytest.raises(RkvlmdError, match=says) as caught:
        Bench(sim, "1.3.0", model=model, decoder=decoder)
    assert caught.value.code == code
    assert "/" not in caught.value.message
    for name in env:
        monkeypatch.delenv(f"NPUSIM_{name}")
    assert Bench(sim, "1.3.0", name="good").ask("x")[1].reason == "stop"


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"GGUF" + bytes(500), "no .rkllm file"), (b"", "no .rkllm file"),
     (models.HEADER + b"embed=8\n", "cut short")],
)  # fmt: skip
def test_files_that_are_no_model(sim: Sim, content: bytes, says: str) -> None:
    folder = folders.write(sim.folder / "m")
    (folder / "language.rkllm").write_bytes(content)
    with pytest.raises(RkvlmdError, match=says):
        Bench(sim, "1.3.0")
    (folder / "language.rkllm").unlink()
    with pytest.raises(RkvlmdError, match=r"language\.rkllm is missing"):
        Bench(sim, "1.3.0")


@pytest.mark.parametrize("driver", ["0.9.8", "0.9.6", "1.0.0"])
def test_an_old_driver_that_works_is_none_of_our_business(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, driver: str
) -> None:
    use(monkeypatch, DRIVER=driver, OLD_DRIVER="works")
    bench = Bench(sim, "1.3.0")
    assert bench.ready["driver"] == driver
    assert bench.ask((1, "x"))[1].reason == "stop"


def test_a_file_with_another_beginning(sim: Sim, monkeypatch: pytest.MonkeyPatch) -> None:
    # That a .rkllm begins so is a claim: the engine must not hold a file to it.
    use(monkeypatch, HEADER="any")
    assert Bench(sim, "1.3.0", model={"header": bytes(256)}).ask("x")[1].reason == "stop"


def test_what_the_library_understood_of_its_parameters(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("RKLLM_LOG_LEVEL", "2")
    wanted = {"cpu_mask": 0xF0, "n_keep": 4, "embed_flash": True, "iommu_domain": 2}
    for version in ALL:
        bench = Bench(sim, version, name=f"m{version}", decoder=wanted)
        printed = capfd.readouterr().err
        bench.close_all()
        lines = [
            "Max Context Length: 2048", "Top-K: 1", "N Keep: 4", "N Batch: 1", "Base Domain ID: 2",
            "Embed Flash: 1", "use_cross_attn: 0", "Is Async: 0", "Skip Special Token: 1",
        ]  # fmt: skip
        if version.startswith("1.2"):
            lines += ["Image Start: <|vision_start|>", "Image Content: <|image_pad|>"]
        for line in lines:
            assert f"I rkllm: {line}\n" in printed, version


def test_an_answer_that_ends_with_its_thought(sim: Sim, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, REPLY="text", REPLY_TEXT="<think>hm</think>yes", THINK="ends")
    text, done = Bench(sim, "1.3.0").ask("x")
    assert (text, done.reason) == ("<think>hm</think>", "stop")


def test_runtime_versions_may_be_a_series(sim: Sim) -> None:
    Bench(sim, "1.3.1", vision=False, decoder={"runtime_versions": ["1.2.3", "1.3"]})


def test_a_library_that_runs_as_another_version_than_its_file_says(sim: Sim) -> None:
    # The same layout, so the file's bytes and the defaults agree: only what it prints tells.
    path = str(compiler.library("1.3.0", says="1.3.1"))
    (sim.folder / "lib").mkdir()
    copy = sim.folder / "lib" / "librkllmrt.so"
    data = Path(path).read_bytes()
    copy.write_bytes(data.replace(b"RKLLM SDK (version: 1.3.1", b"RKLLM SDK (version: 1.3.0"))
    with pytest.raises(RkvlmdError, match=r"version 1\.3\.0, but at run time it is 1\.3\.1"):
        Bench(sim, "1.3.0", options={"library": str(copy)})
    Bench(sim, "1.3.0", options={"library": str(copy), "layout": "1.3.1"})


def test_what_the_library_prints_is_read_and_still_printed(capfd: Any) -> None:
    lines = (
        "I rkllm: rkllm-runtime version: 1.3.0, rknpu driver version: 0.9.8, platform: RK3588\n"
        "I rkllm: rkllm-toolkit version: 1.2.3, max_context_limit: 4096, npu_core_num: 3,"
        " target_platform: RK3588, model_dtype: W8A8\nE rkllm: first\nE RKNN: second\n"
    )
    with rkllm_log.copied() as said:
        os.write(1, lines[:100].encode())
        os.write(2, lines[100:].encode())
    assert said.errors == ["first", "second"]
    assert said.fields["context_limit"] == 4096
    assert said.fields["toolkit"] == "1.2.3"
    out = capfd.readouterr()
    assert (out.out + out.err).count("E rkllm: first") == 1
    assert rkllm_log.read("nothing of use\xff").fields == {}


def test_nothing_is_copied_where_no_process_can_be_started(
    monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("PATH", "")
    before = sorted(os.listdir("/proc/self/fd"))
    with rkllm_log.copied() as said:
        os.write(2, b"E rkllm: still seen\n")
    assert (said.text, said.errors) == ("", [])
    assert "still seen" in capfd.readouterr().err
    assert set(os.listdir("/proc/self/fd")) <= set(before)


def test_rows_are_read_from_read_only_memory(sim: Sim) -> None:
    bench = Bench(sim, "1.3.0", outputs=4)
    order = bench.order([(1, 2, "x")])
    rows = bench.rows()
    for picture in rows:
        picture.flags.writeable = False
    rows[1] = np.asfortranarray(rows[1])  # not as the library wants it
    said: list[Any] = []
    bench.decoder.generate(order, rows, said.append)
    text = "".join(m.text for m in said if isinstance(m, child.Text))
    assert models.answer(text)["sums"] == bench.sums()
