"""The metrics of the real daemon, over HTTP."""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import trio

from rkvlmd.board import gauges
from rkvlmd.front.http import app
from rkvlmd.front.http.guard import Guard
from tests.e2e.daemon import png, question, running
from tests.fakes import house as fake
from tests.fakes.prometheus import Samples, parse
from tests.fakes.scripted import make_model


def page(url: str) -> Samples:
    answer = httpx.get(url + "/metrics", timeout=120)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return parse(answer.content)


@pytest.mark.process
def test_the_metrics_of_a_daemon(tmp_path: Path) -> None:
    make_model(tmp_path / "models")
    module = ("tools.benchlib.scripted_daemon", json.dumps({"rate": 100, "tokens": 5}))
    with running(tmp_path, tmp_path / "models", module=module) as daemon:
        chat = daemon.url + "/v1/chat/completions"

        def ask(**more: object) -> int:
            body = {"messages": question("x", png()), **more}
            return httpx.post(chat, json=body, timeout=120).status_code

        before = page(daemon.url)
        assert before["rkvlmd_lease_busy_seconds_total"] == 0
        assert ask(strange=1, stranger=2) == 200
        os.kill(daemon.children()["decoder:scripted"], signal.SIGKILL)
        assert ask() == 200
        assert ask(n=2) == 400
        assert ask(messages=question("x", "data:image/png;base64,AAAA")) == 400
        found = page(daemon.url)
        status = daemon.ctl("status")
        children = {child["name"]: child for child in status["children"]}
        decoder = children["decoder:scripted"]
        environ = Path(f"/proc/{decoder['pid']}/environ").read_bytes().split(b"\0")
    # Large buffers go back to the system, and the versions are those that are installed.
    assert b"MALLOC_MMAP_THRESHOLD_=262144" in environ
    assert decoder["info"]["numpy"] == metadata.version("numpy")
    model = '{model_name="scripted"}'
    assert found[f"rkvlmd_time_to_first_token_seconds_count{model}"] == 2
    assert found[f"rkvlmd_generation_tokens_total{model}"] == 10
    assert found[f"rkvlmd_prefix_cache_queries_total{model}"] > 0
    assert found["rkvlmd_unknown_fields_total"] == 2
    assert found['rkvlmd_child_restarts_total{role="decoder"}'] == 1
    assert found['rkvlmd_request_errors_total{code="unsupported_parameter"}'] == 1
    assert sum(v for k, v in found.items() if k.startswith("rkvlmd_image_rejected_total")) == 1
    assert found["rkvlmd_lease_busy_seconds_total"] > 0
    assert status["queue"]["refusals"] == {}


async def test_metrics_ask_for_the_key(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    plain = fake.settings()
    chosen = replace(plain, http=replace(plain.http, api_keys_file=str(keys)))
    async with fake.running(chosen) as house, fake.connected(house) as client:
        with trio.fail_after(60):
            await client.get("/metrics")
            assert (await client.reply()).status == 401
        assert house.metrics.errors.values == {("invalid_api_key",): 1}


async def test_a_request_that_is_refused_has_a_line_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    async with fake.running() as house, fake.connected(house) as client:
        with trio.fail_after(60):
            await client.post(b'{"n": 2}', "/v1/chat/completions", "x-request-id: r1")
            assert (await client.reply()).status == 400
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("request ")]
    assert line == "request r1 client=127.0.0.1 method=POST code=unsupported_parameter status=400"


async def test_a_client_that_leaves_in_its_body(tmp_path: Path) -> None:
    async with fake.running() as house:
        with trio.fail_after(60):
            async with fake.connected(house) as client:
                await client.post(b"{", length=100)
                await house.scheduler.until(admitted=1)
            await house.scheduler.until(admitted=0)
            while not house.metrics.disconnects.values:
                await trio.lowlevel.checkpoint()
        assert house.metrics.disconnects.values == {("body",): 1}


async def test_a_sensor_that_hangs_keeps_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file of a driver does that is stuck."""
    begun, go = threading.Event(), threading.Event()
    calls = []

    def read(*_: object) -> gauges.Gauges:
        calls.append(1)
        begun.set()
        go.wait()
        return gauges.Gauges()

    monkeypatch.setattr(gauges, "read", read)
    monkeypatch.setattr(app, "BOARD_SECONDS", 0.01)
    house: Any = SimpleNamespace(board=None, settings=fake.settings())
    asked = app.HttpApp(house, Guard(house.settings.http))
    with trio.fail_after(60):
        for _ in range(3):
            assert await asked.look_at_board() == gauges.Gauges()
    begun.wait(10)
    go.set()
    assert len(calls) == 1
