"""The real daemon with engines that follow a script: stops, deaths and clients that leave."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.daemon import Daemon, gone, png, question, running
from tests.fakes.scripted import make_model

pytestmark = pytest.mark.process


@contextlib.contextmanager
def scripted(tmp: Path, config: str = "", **script: Any) -> Iterator[Daemon]:
    make_model(tmp / "models")
    module = ("tools.benchlib.scripted_daemon", json.dumps(script))
    with running(tmp, tmp / "models", module=module, config=config) as daemon:
        yield daemon


@contextlib.contextmanager
def stream(daemon: Daemon, text: str = "hello", **more: Any) -> Iterator[Iterator[Any]]:
    """Post one streaming request; yields its SSE data, parsed, ``[DONE]`` as a string."""
    body = {"stream": True, "messages": question(text, png()), **more}
    with (
        httpx.Client(timeout=120) as client,
        client.stream("POST", daemon.url + "/v1/chat/completions", json=body) as answer,
    ):
        assert answer.status_code == 200, answer.read()

        def events() -> Iterator[Any]:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    data = line.removeprefix("data: ")
                    yield data if data == "[DONE]" else json.loads(data)

        yield events()


def texts(events: list[Any]) -> str:
    chunks = [e for e in events if isinstance(e, dict) and e.get("choices")]
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)


def test_sigterm_lets_the_answer_end(tmp_path: Path) -> None:
    with scripted(tmp_path, rate=40, tokens=40) as daemon:
        with stream(daemon) as events:
            first = [next(events), next(events)]
            daemon.process.send_signal(signal.SIGTERM)
            rest = list(events)
        assert texts([*first, *rest]) == " ".join(f"t{i}" for i in range(40))
        assert rest[-1] == "[DONE]"
        assert daemon.process.wait(30) == 0


def test_a_second_signal_ends_the_answer(tmp_path: Path) -> None:
    with scripted(tmp_path, rate=5, tokens=10_000) as daemon:
        with stream(daemon) as events:
            next(events), next(events)
            pids = daemon.children().values()
            assert len(pids) >= 2
            daemon.process.send_signal(signal.SIGINT)
            with pytest.raises(OSError, match=r"refused|reset"):  # the listener closes first
                while True:
                    host, port = daemon.url.removeprefix("http://").split(":")
                    socket.create_connection((host, int(port)), 60).close()
            daemon.process.send_signal(signal.SIGINT)
            rest = list(events)
        assert rest[-1]["error"]["code"] == "shutting_down"
        assert daemon.process.wait(30) == 0
        assert all(gone(pid) for pid in pids)


def test_the_bound_of_the_drain(tmp_path: Path) -> None:
    with scripted(tmp_path, "[queue]\nstop_seconds = 0.3", rate=5, tokens=10_000) as daemon:
        with stream(daemon) as events:
            next(events), next(events)
            daemon.process.send_signal(signal.SIGTERM)
            rest = list(events)
        assert rest[-1]["error"]["code"] == "shutting_down"
        assert daemon.process.wait(30) == 0


def test_death_in_the_middle_costs_that_answer_alone(tmp_path: Path) -> None:
    with (
        scripted(tmp_path, rate=30, tokens=10_000) as daemon,
        stream(daemon, "one") as first,
        stream(daemon, "two", max_tokens=30) as second,
    ):
        seen = [next(first), next(first)]
        os.kill(daemon.children()["decoder:scripted"], signal.SIGKILL)
        seen += list(first)
        assert seen[-1]["error"]["code"] == "engine_died"
        assert "[DONE]" not in seen
        whole = list(second)
        assert texts(whole) == " ".join(f"t{i}" for i in range(30))
        assert whole[-1] == "[DONE]"


def test_cancel_and_deadline(tmp_path: Path) -> None:
    with scripted(tmp_path, rate=5, tokens=10_000) as daemon:
        with stream(daemon) as events:
            next(events), next(events)
            (job,) = daemon.ctl("jobs")["jobs"]
            assert job["phase"] == "generating"
            assert daemon.ctl("cancel", job["id"])["exit"] == 0
            assert list(events)[-1]["error"]["code"] == "cancelled"
        body = {"messages": question("late"), "timeout": 0.3}
        late = httpx.post(daemon.url + "/v1/chat/completions", json=body, timeout=120)
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "deadline_exceeded"


def test_a_client_that_leaves_frees_the_engine(tmp_path: Path) -> None:
    with scripted(tmp_path, rate=5, tokens=10_000) as daemon:
        with stream(daemon) as events:
            next(events), next(events)
        body = {"messages": question("next"), "max_tokens": 2}
        answer = httpx.post(daemon.url + "/v1/chat/completions", json=body, timeout=120)
        assert answer.json()["choices"][0]["message"]["content"] == "t0 t1"
        assert daemon.ctl("status")["queue"]["ended"]["client_gone"] == 1


def test_load_and_unload_while_clients_wait(tmp_path: Path) -> None:
    make_model(tmp_path / "models", "second")
    with scripted(tmp_path, "[models]\ndefault = 'scripted'", rate=30, tokens=30) as daemon:
        with stream(daemon, "one") as first, stream(daemon, "two") as second:
            next(first)
            assert daemon.ctl("load", "second")["model"]["state"] == "ready"
            assert texts(list(first)) == " ".join(f"t{i}" for i in range(30))
            assert texts(list(second)) == " ".join(f"t{i}" for i in range(30))
        assert daemon.ctl("unload", "scripted")["model"]["state"] == "absent"
        refused = httpx.post(
            daemon.url + "/v1/chat/completions", json={"messages": question("x")}, timeout=120
        )
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "model_unloaded"
        assert refused.headers.get("x-should-retry") == "false"


def test_a_full_queue_says_when_to_come_back(tmp_path: Path) -> None:
    with (
        scripted(tmp_path, "[queue]\nmax_jobs = 1", rate=5, tokens=10_000) as daemon,
        stream(daemon) as events,
    ):
        next(events)
        refused = httpx.post(
            daemon.url + "/v1/chat/completions",
            json={"messages": question("x", png(size=1500))},
            timeout=120,
        )
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "server_is_overloaded"
        assert 1 <= int(refused.headers["retry-after"]) <= 120
