"""Hidden states of the RKLLM runtime, for ``/v1/embeddings``."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rkvlmd.engine import rkllm_defects, vectors
from rkvlmd.errors import RkvlmdError
from rkvlmd.models.manifest import Embeddings
from rkvlmd.wire import child
from tests.npusim import folders, models
from tests.npusim.bench import Bench
from tests.npusim.fixture import Sim
from tests.npusim.house import plug_in

pytestmark = pytest.mark.process

ALL = ["1.2.1", "1.2.3", "1.3.0", "1.3.1"]


@pytest.fixture
def sim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sim]:
    yield plug_in(tmp_path, monkeypatch)
    Bench.close_all()


def opened(sim: Sim, version: str, pool: str = "last", **more: Any) -> Bench:
    section = {"inputs": ["text", "image"], "pool": pool, "normalise": False}
    return Bench(sim, version, embeddings=section, **more)


def order(bench: Bench, *turns: Any) -> child.Embed:
    asked = bench.order(turns)
    return child.Embed(id=1, tokens=asked.tokens, prompt=asked.prompt, spans=asked.spans)


def expected(tokens: list[int]) -> Any:
    """Return what the simulator gives of text: it counts up from the token's id."""
    ids = np.asarray(tokens, np.int64)[:, None] + np.arange(folders.EMBED)
    return (ids % 997).astype(np.float32)


@pytest.mark.parametrize("version", ALL)
@pytest.mark.parametrize("finish", ["yes", "no"])
@pytest.mark.parametrize("empty", ["yes", "no"])
@pytest.mark.parametrize("thread", ["caller", "other"])
def test_states_of_every_token(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, version: str, finish: str, empty: str, thread: str
) -> None:
    monkeypatch.setenv("NPUSIM_HIDDEN_FINISH", finish)
    monkeypatch.setenv("NPUSIM_HIDDEN_EMPTY_FIRST", empty)
    monkeypatch.setenv("NPUSIM_CALLBACK_THREAD", thread)
    bench = opened(sim, version, vision=False)
    for text in ("hello", "hello, you", "hello, you"):
        asked = order(bench, text)
        found = bench.decoder.embed(asked, [])
        # Before 1.3.0 the library leaves out what its cache holds, so that is cleared.
        np.testing.assert_array_equal(found, expected(asked.tokens))
        assert sim.one("run")["mode"] == 1
        assert sim.one("floats")["released"] is (version >= "1.3")
    assert bench.ask("and now an answer")[1].reason == "stop"
    assert not sim.trace("misuse")


def test_pictures_take_part(sim: Sim) -> None:
    bench = opened(sim, "1.3.0")
    asked = order(bench, (1, "what is it?"))
    found = bench.decoder.embed(asked, bench.rows())
    start = asked.spans[0].start
    text = expected(asked.tokens)
    np.testing.assert_array_equal(found[:start], text[:start])
    assert (found[start] != text[start]).any()
    assert sim.one("run")["kind"] == "multimodal"


def test_an_answer_after_states_is_right(sim: Sim) -> None:
    bench = opened(sim, "1.3.0")
    bench.ask((1, "x"))
    bench.decoder.embed(order(bench, (2, "x")), bench.rows())
    text, done = bench.ask((1, "x"))
    assert models.answer(text)["sums"] == bench.sums()
    assert done.cached == 0  # what is held after such a run is not known


@pytest.mark.parametrize("rows", ["all", "last"])
@pytest.mark.parametrize("pool", ["last", "mean"])
def test_the_last_token_alone(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, rows: str, pool: str
) -> None:
    monkeypatch.setenv("NPUSIM_HIDDEN_ROWS", rows)
    bench = opened(sim, "1.3.0", pool, vision=False)
    asked = order(bench, "some words")
    if (rows, pool) == ("last", "mean"):
        with pytest.raises(RkvlmdError, match=r"the hidden states of 1 of \d+ tokens"):
            bench.decoder.embed(asked, [])
        return
    how = Embeddings(pool=pool, normalise=False)  # type: ignore[arg-type]
    done = vectors.embed(bench.decoder, asked, [], how)
    vector = np.frombuffer(base64.b64decode(done.vector), np.float32)
    wanted = expected(asked.tokens)
    np.testing.assert_allclose(vector, wanted[-1] if pool == "last" else wanted.mean(0), rtol=1e-6)
    assert done.tokens == len(asked.tokens)


@pytest.mark.parametrize(
    ("fault", "code"),
    [("fail@prefill", "context_length_exceeded"), ("error@prefill", "engine_error")],
)
def test_runs_that_fail(sim: Sim, monkeypatch: pytest.MonkeyPatch, fault: str, code: str) -> None:
    bench = opened(sim, "1.3.0", vision=False)
    monkeypatch.setenv("NPUSIM_FAULT", fault)
    with pytest.raises(RkvlmdError) as caught:
        bench.decoder.embed(order(bench, "x"), [])
    assert caught.value.code == code
    assert len(bench.decoder.embed(order(bench, "x"), []))


def test_another_size_of_states(sim: Sim) -> None:
    bench = opened(sim, "1.3.0", vision=False, model={"embed": 8})
    with pytest.raises(RkvlmdError, match="hidden states of 8 values that are no 16 numbers"):
        bench.decoder.embed(order(bench, "x"), [])


def test_what_is_too_long(sim: Sim) -> None:
    bench = opened(sim, "1.3.0", vision=False, decoder={"context": 64})
    with pytest.raises(RkvlmdError) as caught:
        bench.decoder.embed(order(bench, "x" * 100), [])
    assert caught.value.code == "context_length_exceeded"


def test_a_library_that_keeps_its_buffers_is_replaced(
    sim: Sim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rkllm_defects, "KEPT_BYTES", 4096)
    bench = opened(sim, "1.2.3", vision=False)
    how = Embeddings()
    assert not vectors.embed(bench.decoder, order(bench, "x"), [], how).recycle
    assert vectors.embed(bench.decoder, order(bench, "x" * 200), [], how).recycle
    sound = opened(sim, "1.3.0", name="n", vision=False)
    assert not vectors.embed(sound.decoder, order(sound, "x" * 200), [], how).recycle
