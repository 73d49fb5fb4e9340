"""Requests and files that must not end a daemon which is to run for years."""

from __future__ import annotations

import http.client
import json
import signal
import urllib.parse
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.daemon import Daemon, png, question, running

pytestmark = pytest.mark.process


def ask(daemon: Daemon, **body: Any) -> tuple[int, dict[str, Any]]:
    """Send one chat request; return its status and body."""
    place = urllib.parse.urlsplit(daemon.url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=120)
    body = {"model": "tiny", "max_tokens": 2, **body}
    connection.request(
        "POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"}
    )
    answer = connection.getresponse()
    data = json.loads(answer.read())
    connection.close()
    return answer.status, data


@pytest.mark.parametrize("size", [9_000_000, 3_000_000, 100_000])
def test_a_text_that_no_frame_holds_is_a_400(daemon: Daemon, size: int) -> None:
    status, body = ask(daemon, messages=question("a" * size))
    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
    assert ask(daemon, messages=question("hi"))[0] == 200
    assert daemon.ctl("status")["prep"]["deaths"] == 0


def test_more_views_than_64(tmp_path: Path, models: Path) -> None:
    with running(tmp_path, models, config="[media]\nmax_images = 70\n") as daemon:
        pictures = [png((number, 0, 0)) for number in range(70)]
        assert ask(daemon, messages=question("hi", *pictures))[0] == 200
        children = daemon.ctl("status")["children"]
        assert [child["restarts"] for child in children] == [0] * len(children)


@pytest.mark.parametrize("text", ["x = " + "9" * 5000, "x = " + "[" * 5000])
def test_settings_that_no_parser_takes_do_not_end_it(
    tmp_path: Path, models: Path, text: str
) -> None:
    with running(tmp_path, models) as daemon:
        (tmp_path / "rkvlmd.toml").write_text(f"[queue]\n{text}\n")
        assert daemon.ctl("reload")["rejected"]
        daemon.process.send_signal(signal.SIGHUP)
        assert daemon.ctl("reload")["rejected"]
        assert daemon.stop() == 0
