"""``tools/bench load`` and ``compare``: workloads, outcomes and reports, against real daemons."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

for needed in ("numpy", "tokenizers", "PIL"):
    pytest.importorskip(needed)

from tests.fakes.scripted import make_model  # noqa: E402
from tools.benchlib import chatload, cli, load, photos, process  # noqa: E402
from tools.benchlib.work import KINDS, Shape, Work  # noqa: E402

pytestmark = pytest.mark.process

SCRIPT = {"rate": 400, "tokens": 6}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    make_model(tmp_path / "models", context=2048)
    return tmp_path / "models"


@pytest.fixture
def daemon(models: Path) -> Iterator[process.Daemon]:
    program = ("tools.benchlib.scripted_daemon", json.dumps(SCRIPT))
    with process.running(models=models, program=program) as running:
        yield running


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    status = cli.main([*arguments])
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report | {"exit": status}


def url(running: process.Daemon) -> str:
    return f"http://{running.host}:{running.port}/v1"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_work_is_answered(
    kind: str, daemon: process.Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    report = bench(
        capsys, "load", url(daemon), "--work", kind, "--clients", "2", "--requests", "4",
        "--turns", "2", "--size", "64x48", "--tokens", "4", "--pid", str(daemon.pid),
    )  # fmt: skip
    assert report["exit"] == 0
    assert report["requests"] == sum(report["outcomes"].values()) == 4
    assert set(report["outcomes"]) <= {"stop", "length"}
    assert report["first_token_ms"]["p50"] > 0
    assert report["inter_token_ms"] is not None
    assert report["tokens_per_second"] > report["answers_per_second"] > 0
    assert report["peak_pss_mb"]["all"] >= report["peak_pss_mb"]["daemon"] > 1


def test_open_loop_leavers_and_deadlines(
    daemon: process.Daemon, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Nobody gets the whole of an answer that never ends.
    script = json.dumps({"rate": 10, "tokens": 10_000})
    slow = process.running(models=models, program=("tools.benchlib.scripted_daemon", script))
    with slow as running:
        report = bench(
            capsys, "load", url(running), "--work", "text", "--rate", "50", "--requests", "8",
            "--leave", "1", "--leave-within", "0.001", "--warm-up", "0",
        )  # fmt: skip
    assert report["outcomes"] == {"left": 8}
    assert report["exit"] == 1  # nothing was answered
    report = bench(
        capsys, "load", url(daemon), "--work", "text", "--clients", "1", "--requests", "2",
        "--deadline", "30",
    )  # fmt: skip
    assert sum(report["outcomes"].values()) == 2


def test_errors_are_outcomes(daemon: process.Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    report = bench(
        capsys, "load", url(daemon), "--model", "none", "--requests", "2", "--warm-up", "0"
    )
    assert report["outcomes"] == {"model_not_found": 2}
    assert (report["exit"], report["first_token_ms"]) == (1, None)


def test_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    report = bench(capsys, "load", "http://127.0.0.1:1", "--requests", "1", "--warm-up", "0")
    assert report["outcomes"] == {"unreachable": 1}


def test_compare(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ExitStack() as stack:
        urls = []
        for rate in (400, 40):
            program = ("tools.benchlib.scripted_daemon", json.dumps({"rate": rate, "tokens": 6}))
            running = process.running(models=models, program=program)
            urls.append(url(stack.enter_context(running)))
        options = ("--work", "text", "--clients", "1", "--requests", "3")
        report = bench(capsys, "compare", *urls, *options)
        assert report["exit"] == 0
        assert report["first"]["outcomes"] == report["second"]["outcomes"]
        assert set(report["second_over_first"]) >= {"answers_per_second", "inter_token_ms p50"}
        assert cli.main(["compare", *urls, *options, "--markdown"]) == 0
    table = capsys.readouterr().out
    assert "| first token, p95, ms |" in table
    assert all(u in table for u in urls)


# --- what it is made of ----------------------------------------------------------------


def test_the_same_seed_asks_the_same() -> None:
    def bodies(seed: int) -> list[Any]:
        work = Work("text", Shape(seed=seed, leave=0.5))
        found = [next(work.script(client)) for client in range(5)]
        return [(request.body, request.leave) for request in found]

    assert bodies(1) == bodies(1)
    assert bodies(1) != bodies(2)


def test_a_conversation_carries_its_answers() -> None:
    script = Work("conversation", Shape(turns=2, size=(64, 48))).script(0)
    first = next(script)
    said = chatload.Answer("turn 1", 0.0, outcome="stop", text="a star")
    second = script.send(said)
    assert second.body["messages"][: len(first.body["messages"])] == first.body["messages"]
    assert second.body["messages"][1] == {"role": "assistant", "content": "a star"}
    with pytest.raises(StopIteration):
        script.send(said)
    # Who was not answered does not go on.
    script = Work("conversation", Shape(size=(64, 48))).script(0)
    next(script)
    with pytest.raises(StopIteration):
        script.send(chatload.Answer("turn 1", 0.0, outcome="server_error"))


def test_pictures_differ_in_their_pixels() -> None:
    found = {photos.photo(number, 64, 48) for number in range(20)}
    assert len(found) == 20
    assert photos.photo(3, 64, 48) == photos.photo(3, 64, 48)


@pytest.mark.parametrize(
    ("given", "path", "port", "tls"),
    [
        ("http://h:1", "/v1/chat/completions", 1, False),
        ("http://h:1/v1/", "/v1/chat/completions", 1, False),
        ("https://h/api/v1", "/api/v1/chat/completions", 443, True),
        ("h:8080", "/v1/chat/completions", 8080, False),
        ("http://h/v1/chat/completions", "/v1/chat/completions", 80, False),
    ],
)
def test_urls(given: str, path: str, port: int, tls: bool) -> None:
    found = chatload.target(given)
    assert (found.host, found.path, found.port, found.tls) == ("h", path, port, tls)


def test_a_summary() -> None:
    done = load.Load(0.0, 2.0)
    done.answers = [
        chatload.Answer("a", 0.0, 200, "stop", [0.5, 0.6, 0.8], 1.0, usage={"completion_tokens": 5}),
        chatload.Answer("b", 0.0, 200, "left", [0.1], 0.2, gone=0.2),
    ]  # fmt: skip
    found = load.summary(done)
    assert found["outcomes"] == {"left": 1, "stop": 1}
    assert (found["answers_per_second"], found["tokens_per_second"]) == (0.5, 2.5)
    assert found["inter_token_ms"]["max"] == pytest.approx(200)
    assert found["first_token_ms_by_kind"]["b"]["p50"] == 100
    npu = {"ev": "npu", "what": "decode"}
    events = [npu | {"begin": 0, "end": 10**9}, npu | {"begin": 3 * 10**9, "end": 4 * 10**9}]
    assert load.summary(done, events)["npu"]["busy"] == 0.5
