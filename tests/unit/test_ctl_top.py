"""``rkvlmctl top`` and ``rkvlmctl bench``: what they make of what the daemon says."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rkvlmd.board.gauges import Gauges
from rkvlmd.board.root import Root
from rkvlmd.ctl import bench, published, top
from rkvlmd.ctl.client import CtlError
from tests.fakes.boards import trees


def sample(
    at: float, busy: float, tokens: float, *jobs: dict[str, Any], **board: Any
) -> top.Sample:
    status = {
        "version": "0.1.0", "state": "serving", "uptime": 61.0,
        "models": [{"name": "m", "state": "ready"}, {"name": "n", "state": "absent"}],
        "lease": {"busy_seconds": busy}, "tokens": {"generated": tokens},
    }  # fmt: skip
    return top.Sample(at, status, list(jobs), Gauges(**board))


def job(name: str, phase: str, age: float, phase_age: float = 0.5) -> dict[str, Any]:
    return {
        "id": name, "client": "10.0.0.1", "model": "m", "priority": "normal", "phase": phase,
        "phase_age": phase_age, "age": age, "pictures": 1, "prompt_tokens": 9,
        "completion_tokens": 2,
    }  # fmt: skip


def test_rates_are_between_two_looks() -> None:
    shown = top.summary(sample(12.0, 7.5, 130), sample(10.0, 6.0, 100))
    assert (shown["busy"], shown["tokens_per_second"]) == (0.75, 15.0)
    # One look says nothing of rates; a daemon that was started anew has none below 0.
    assert top.summary(sample(12.0, 7.5, 130), None)["busy"] is None
    assert top.summary(sample(12.0, 0.5, 3), sample(10.0, 6.0, 100))["tokens_per_second"] == 0


def test_who_waits_in_which_phase_and_how_long() -> None:
    jobs = [job("young", "waiting", 1.0), job("old", "waiting", 9.0, 3.0), job("run", "prefill", 2)]
    shown = top.summary(sample(1.0, 0, 0, *jobs), None)
    assert [j["id"] for j in shown["jobs"]] == ["run", "old", "young"]
    assert (shown["running"], shown["waiting"]) == (1, 2)
    text = top.screen(shown, colour=False)
    (line,) = [line.split("  ") for line in text.splitlines() if line.startswith("old")]
    cells = [cell.strip() for cell in line if cell.strip()]
    assert cells[4:7] == ["waiting", "3.0 s", "9.0 s"]
    assert "1 running, 2 waiting" in text
    assert "models: m ready" in text


def test_the_npu_is_shown_where_there_is_one() -> None:
    load = (("0", 0.95), ("1", 0.0))
    shown = top.summary(sample(1.0, 0, 0, load=load, hertz=10**9, celsius=46.2), None)
    text = top.screen(shown, colour=False)
    assert "NPU 0: 95% 1: 0%, 1000 MHz, 46 °C" in text
    assert "NPU" not in top.screen(top.summary(sample(1.0, 0, 0), None), colour=False)


class Script:
    """Answers ``status`` and ``jobs`` in order; the last one again and again."""

    def __init__(self, *samples: top.Sample) -> None:
        self._samples = list(samples)
        self.calls = 0

    def call(self, method: str) -> dict[str, Any]:
        self.calls += 1
        now = self._samples[0]
        if method == "status":
            return now.status
        self._samples = self._samples[1:] or self._samples
        return {"jobs": now.jobs}


@pytest.mark.parametrize("as_json", [False, True])
def test_once(as_json: bool, tmp_path: Path) -> None:
    client: Any = Script(sample(0, 0, 0), sample(0, 0.001, 0, job("a", "waiting", 1)))
    out = io.StringIO()
    status = top.run(client, interval=0.05, once=True, as_json=as_json, root=tmp_path, out=out)
    assert status == 0
    if as_json:
        shown = json.loads(out.getvalue())
        assert 0 < shown["busy"] < 0.03
        assert shown["jobs"][0]["id"] == "a"
    else:
        assert "engine busy" in out.getvalue()


class Enough(Exception):
    """The test has seen enough."""


class Terminal(io.StringIO):
    """A terminal that somebody leaves after two screens."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.getvalue().count("\x1b[2J") == 2:
            raise Enough
        return super().write(text)


def test_a_terminal_is_drawn_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rkvlmd.ctl.render.window", lambda _stream: (30, 4))
    many = [job(f"j{i}", "waiting", 1) for i in range(20)]
    client: Any = Script(sample(0, 0, 0, *many))
    out = Terminal()
    with pytest.raises(Enough):
        top.run(client, interval=0.05, once=False, as_json=False, root=tmp_path, out=out)
    screens = out.getvalue().split("\x1b[2J\x1b[H")[1:]
    assert len(screens) == 2
    for text in screens:
        lines = text.strip("\n").split("\n")
        assert 1 < len(lines) <= 3
        assert all(len(line) <= 30 for line in lines)


# --- published figures ---------------------------------------------------------------------


def test_published_figures_are_found_by_name_and_soc() -> None:
    found = published.find("Qwen3_VL-2B-Instruct-w8a8", "rk3588s")
    assert found is not None
    assert (found.model, found.encode, found.decode, found.prompt) == (
        "qwen3-vl-2b", 2.08, 14.91, 196,
    )  # fmt: skip
    assert found.prefill == round(196 / 0.649, 1)
    assert "rknn-llm" in found.source
    assert published.find("qwen3-vl-2b", "rk3562") is None
    assert published.find("demo", "rk3588") is None
    # The longest name counts: 0.8B is not 2B.
    near = published.find("qwen3.5-0.8b", "rk3576")
    assert near is not None
    assert near.decode == 15.4


def test_every_published_figure_has_a_source_and_sane_values() -> None:
    tree = json.loads(published.FILE.read_text())
    names = [name for entry in tree["models"] for name in entry["names"]]
    assert len(names) == len(set(names))
    for entry in tree["models"]:
        assert entry["source"] in tree["sources"]
        for soc, figures in entry["figures"].items():
            assert soc in {"rk3588", "rk3576", "rk3562"}
            tokens, seconds = figures["prefill"]
            assert 0.05 < seconds < 10
            assert 30 <= tokens <= 256
            assert 2 < figures["decode"] < 100
            assert ("encode" in figures) == (entry["source"] == "multimodal")


# --- bench ---------------------------------------------------------------------------------


class Endpoint:
    """Answers every request with the same figures, and keeps what was asked."""

    def __init__(self, **answer: Any) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.answer = answer

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        self.bodies.append(body)
        timings = {
            "encode": 2.0, "prefill": 0.5, "first_token": 3.0, "total": 5.0, "generate": 2.5
        }  # fmt: skip
        usage = {
            "prompt_tokens": 210, "completion_tokens": 21,
            "prompt_tokens_details": {"cached_tokens": 10},
        }  # fmt: skip
        return {"timings": timings, "usage": usage} | self.answer


def figures(report: dict[str, Any]) -> dict[str, Any]:
    return {row["name"]: row for row in report["figures"]}


def test_bench_measures_beside_what_is_published(tmp_path: Path) -> None:
    endpoint = Endpoint()
    root = trees.rk3588().write(tmp_path)
    report = bench.measure(
        endpoint,
        {"name": "qwen3-vl-2b", "image": True},
        lambda: {"decoder:qwen3-vl-2b": os.getpid()},
        repeats=2, tokens=21, like="", soc="", root=root,
    )  # fmt: skip
    found = figures(report)
    assert (report["soc"], report["like"]) == ("rk3588", "qwen3-vl-2b")
    assert found["encode (448 pixels)"]["here"] == 2.0
    assert found["encode (448 pixels)"]["published"] == 2.08
    assert found["prefill (196 tokens)"]["here"] == 200 / 0.5
    assert found["decode"]["here"] == 20 / 2
    assert found["decode"]["ratio"] == round(10 / 14.91, 3)
    assert found["picture: first token"]["published"] == pytest.approx(2.729, abs=0.001)
    assert found["peak memory, decoder:qwen3-vl-2b"]["here"] > 1
    assert "1868.98 MB" in bench.screen(report)
    # No request is one that a cache knows: no prompt and no picture comes twice.
    contents = [json.dumps(body["messages"]) for body in endpoint.bodies]
    assert len(contents) == len(set(contents)) == 5


def test_bench_of_a_model_that_nobody_has_published(tmp_path: Path) -> None:
    report = bench.measure(
        Endpoint(), {"name": "demo", "image": False}, dict, repeats=1, tokens=9, like="", soc="",
        root=trees.x86().write(tmp_path),
    )  # fmt: skip
    assert report["source"] is None
    assert "encode" not in figures(report)
    assert figures(report)["decode"]["published"] is None
    assert "nothing is published" in bench.screen(report)


def test_bench_of_a_server_without_timings(tmp_path: Path) -> None:
    with pytest.raises(CtlError, match="no timings"):
        bench.measure(
            Endpoint(timings=None), {"name": "m"}, dict, repeats=1, tokens=9, like="", soc="rk3588",
            root=tmp_path,
        )  # fmt: skip


def test_the_picture_is_a_picture() -> None:
    image = Image.open(io.BytesIO(bench.picture(70, 33)))
    image.load()
    assert (image.size, image.mode) == ((70, 33), "RGB")
    assert len(image.getcolors() or []) > 4


def test_a_root_that_is_not_the_machine(tmp_path: Path) -> None:
    assert top.take(Script(sample(0, 0, 0)), Root(trees.rk3588().write(tmp_path))).board.hertz  # type: ignore[arg-type]
