"""Several conversations on one cache of the simulated library: files, budget, and when it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rkvlmd.engine.rkllm_conversations import STRIKES, TOKENS, Conversations, Seconds
from rkvlmd.wire import prefix
from tests.npusim.bench import Bench
from tests.npusim.fixture import Sim
from tests.npusim.house import plug_in

pytestmark = pytest.mark.process

#: More than a few blocks of the prefix.
LONG = "Tell me about the number {}. " + "Say all that there is to say about it. " * 12
BUDGET = {"conversations_bytes": 1 << 20}


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sim]:
    yield plug_in(tmp_path, monkeypatch)
    Bench.close_all()


@pytest.fixture
def sim(board: Sim, monkeypatch: pytest.MonkeyPatch) -> Sim:
    monkeypatch.setenv("NPUSIM_RESTORE_MS", "0.001")
    restored = Seconds.restored
    # A file is faster than computing here, however long it takes on a busy machine.
    monkeypatch.setattr(Seconds, "restored", lambda self, tokens, _: restored(self, tokens, 0.0))
    return board


def kept_by(bench: Bench) -> Conversations:
    kept = bench.decoder._conversations
    assert kept is not None
    return kept


def files() -> int:
    return sum(
        "rkvlmd-conversation" in os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{fd}")
    )


def computed(sim: Sim) -> int:
    return int(sim.one("prefill")["computed"])


def talk(bench: Bench, turns: list[Any], text: str) -> list[Any]:
    """Ask the next question of a conversation; return the turns with the answer."""
    turns = [*turns, text]
    said, _ = bench.ask(*turns)
    return [*turns, said]


@pytest.mark.parametrize("version", ["1.2.1", "1.2.3", "1.3.0", "1.3.1"])
def test_conversations_that_take_turns_are_not_computed_again(sim: Sim, version: str) -> None:
    bench = Bench(sim, version, vision=False, options=BUDGET)
    assert bench.ready["conversations"] is True
    plain = Bench(sim, version, name="m", vision=False) if version > "1.2.1" else None
    chats: dict[int, list[Any]] = {n: talk(bench, [], LONG.format(n)) for n in range(3)}
    for turn in range(3):
        for n in chats:
            before = len(bench.order(chats[n]).tokens)
            turns = [*chats[n], f"And {turn}?"]
            said, done = bench.ask(*turns)
            # The answer of the turn before and the new one, and never the long beginning.
            assert computed(sim) < before // 2
            assert done.cached == done.prompt - computed(sim)
            if plain is not None:
                assert plain.ask(*turns)[0] == said
            chats[n] = [*turns, said]
    assert not sim.trace("misuse")


def test_it_is_off_unless_there_is_a_budget(sim: Sim) -> None:
    bench = Bench(sim, "1.3.0", vision=False)
    assert bench.ready["conversations"] is False
    a = talk(bench, [], LONG.format(1))
    talk(bench, [], LONG.format(2))
    talk(bench, a, "And?")
    assert computed(sim) > len(bench.order(a).tokens) // 2
    assert not sim.trace("save_cache")


@pytest.mark.parametrize(("version", "switch", "kept"), [
    ("1.3.0", "whole", True), ("1.3.0", "cut", False), ("1.2.2", "whole", False),
])  # fmt: skip
def test_pictures_are_kept_where_the_library_can(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, version: str, switch: str, kept: bool
) -> None:
    monkeypatch.setenv("NPUSIM_SAVED_PICTURES", switch)
    bench = Bench(sim, version, options=BUDGET)
    question = "What do you see? " * 30
    one, two = talk(bench, [], (3, question)), talk(bench, [], (4, question))  # type: ignore[arg-type]
    if version < "1.3":
        assert not sim.trace("save_cache")  # known before it is tried
    one = talk(bench, one, "And?")
    whole = len(bench.order(one[:2]).tokens)
    assert (computed(sim) < whole // 2) is kept
    two = talk(bench, two, "And?")
    assert (computed(sim) < whole // 2) is kept
    # What was seen is right in any case: each conversation has its own picture.
    said, _ = bench.ask(*one, "More?")
    assert bench.sums() in said
    # Without pictures it works on, everywhere.
    texts = {n: talk(bench, [], LONG.format(n)) for n in range(2)}
    for n in texts:
        talk(bench, texts[n], "And?")
        assert computed(sim) < len(bench.order(texts[n]).tokens) // 2


def test_a_library_that_confuses_pictures_is_never_given_another_ones(
    sim: Sim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPUSIM_PICTURES", "blind")
    bench = Bench(sim, "1.3.0", options=BUDGET)
    assert bench.ready["pictures_told_apart"] is False
    question = "What do you see? " * 30
    # Between 1 and 3 nothing else: the file of a run stands for nothing once that run has ended.
    for picture in (1, 2, 0, 1, 3, 0, 2, 1, 0, 4):
        if picture:
            said, _ = bench.ask((question, picture, question))
            assert bench.sums() in said
        else:
            bench.ask(LONG.format(9))
    # The same picture or text as before, each time after another one; the last picture is new.
    assert len([e for e in sim.trace("load_cache") if e["rc"] == 0]) == 5


def test_the_budget_holds_and_what_leaves_is_told(sim: Sim) -> None:
    bench = Bench(sim, "1.3.0", vision=False, options={"conversations_bytes": 6_000})
    kept = kept_by(bench)
    alive: set[int] = set()
    for n in range(8):
        _, done = bench.ask(LONG.format(n))
        alive = (alive | {done.conversation}) - set(done.forgot)
        assert kept.bytes <= 6_000
        assert len(kept) == len(alive - {0}) == files()
    assert 0 < len(kept) < 8
    kept.close()
    assert files() == 0


def test_what_is_held_is_named_as_the_daemon_names_it(sim: Sim) -> None:
    bench = Bench(sim, "1.3.0", vision=False, options=BUDGET)
    first = LONG.format(1)
    said, done = bench.ask(first)
    order = bench.order([first, said, "And?"])
    names = prefix.of_text(order.prompt, order.spans)
    assert tuple(done.held) == names[: len(done.held)]
    assert len(done.held) > len(names) - 3


def test_it_ends_when_computing_is_faster(board: Sim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPUSIM_RESTORE_MS", "0.5")
    bench = Bench(board, "1.3.0", vision=False, options=BUDGET)
    one = talk(bench, [], LONG.format(1))
    two = talk(bench, [], LONG.format(2))
    for lost in range(STRIKES):
        assert not kept_by(bench).why, f"given up after {lost} slow restores"
        one, two = two, talk(bench, one, "And?")
    assert "longer" in kept_by(bench).why
    assert files() == 0
    saves = len(board.trace("save_cache"))
    talk(bench, one, "And?")
    assert len(board.trace("save_cache")) == saves


def test_a_file_that_cannot_be_loaded_costs_nothing_but_time(sim: Sim) -> None:
    bench = Bench(sim, "1.3.0", vision=False, options=BUDGET)
    one = talk(bench, [], LONG.format(1))
    talk(bench, [], LONG.format(2))
    first = kept_by(bench)._kept[0]
    os.ftruncate(first.fd, 0)
    said, done = bench.ask(*one, "And?")
    assert first.number in done.forgot
    assert sim.one("load_cache")["rc"] == -1
    assert said == Bench(sim, "1.3.0", vision=False).ask(*one, "And?")[0]
    assert first not in kept_by(bench)._kept


def test_a_library_that_saves_nothing_is_asked_no_more(sim: Sim) -> None:
    bench = Bench(sim, "1.3.0", vision=False, options=BUDGET)
    kept = kept_by(bench)
    for _ in range(STRIKES):
        new = kept.begin(("a",), ("text",), [])
        assert new is not None
        kept.finish(new, well=True, prompt=1, first=0.0, perf=None)
    assert kept.begin(("a",), ("text",), []) is None
    assert "nothing" in kept.why
    assert files() == 0


def test_a_model_that_cannot_save_keeps_none(sim: Sim) -> None:
    bench = Bench(sim, "1.3.0", vision=False, family="qwen3_5", options=BUDGET)
    assert bench.ready["conversations"] is False
    assert bench.ask(LONG.format(1))[1].held == []  # nor does it reuse anything


def test_the_beginning_of_all_prompts_comes_back(sim: Sim) -> None:
    system = "<|im_start|>user\n" + "You are asked about what you see. " * 12
    bench = Bench(
        sim, "1.3.0", vision=False, options=BUDGET, decoder={"prompt_cache": system}
    )  # fmt: skip
    start = system.removeprefix("<|im_start|>user\n")
    one = talk(bench, [], LONG.format(1))
    talk(bench, [], LONG.format(2))
    talk(bench, one, "And?")  # its file took the place of the saved beginning
    bench.ask(start + "What is this?")
    assert computed(sim) < 40


def test_seconds() -> None:
    seconds = Seconds()
    assert seconds.pays
    seconds.prefilled(TOKENS - 1, 100.0)  # too few to say anything
    assert seconds.prefill is None
    seconds.prefilled(100, 1.0)
    assert seconds.pays
    seconds.restored(100, 0.5)
    assert seconds.pays
    for _ in range(20):
        seconds.restored(100, 2.0)
    assert not seconds.pays
