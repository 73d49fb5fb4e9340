"""rkvlmctl as a process of its own, against the real control socket."""

from __future__ import annotations

import json
import os
import pty
import resource
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import pytest
import trio
import trio.testing

from rkvlmd.errors import RkvlmdError
from rkvlmd.front import control, control_socket
from rkvlmd.messages import ModelState
from rkvlmd.settings import HttpSettings, Settings
from rkvlmd.wire.control import Peer
from tests.fakes.ctl_house import FakeHouse, a_job
from tests.fakes.http_script import HttpScript, chunk, response, sse

pytestmark = pytest.mark.process

COMMAND = [sys.executable, "-m", "rkvlmd.ctl"]


def environment(**more):
    keep = {k: v for k, v in os.environ.items() if k not in {"RKVLMD_API_KEY", "NO_COLOR"}}
    return keep | more


async def ctl(path, *args, **env):
    command = [*COMMAND, "--control", str(path), *map(str, args)]
    return await trio.run_process(
        command, capture_stdout=True, capture_stderr=True, check=False, env=environment(**env)
    )


@asynccontextmanager
async def serving(house, path, http=None):
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            if http is not None:
                await nursery.start(http.serve)
                house.http_address = http.address
            await nursery.start(partial(control.serve_control, house, path))
            yield
            nursery.cancel_scope.cancel()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "c.sock"


async def finish_when_asked(residency, name, state=ModelState.READY):
    while not residency.waiters:
        await residency.wait_change()
        await trio.testing.wait_all_tasks_blocked()
    residency.finish(name, state)


async def test_tables_for_people(path):
    house = FakeHouse()
    house.scheduler.live["j1"] = a_job("j1")
    house.residency.change("other", detail="broken\x1b[2J", state=ModelState.FAILED)
    async with serving(house, path):
        done = await ctl(path, "status")
        assert done.returncode == 0
        assert b"prep-0" in done.stdout
        done = await ctl(path, "models")
        assert done.stdout.startswith(b"NAME ")
        assert b"broken[2J" in done.stdout
        assert b"\x1b" not in done.stdout
        done = await ctl(path, "jobs")
        assert b"generating" in done.stdout
        done = await ctl(path, "cancel", "j1")
        assert done.stdout == b"cancelled j1\n"
        done = await ctl(path, "jobs")
        assert done.stdout == b"no requests are under way\n"


@pytest.mark.parametrize("place", ["before", "after"])
async def test_json_for_scripts(path, place):
    house = FakeHouse()
    async with serving(house, path):
        for command, key in {"status": "version", "models": "models", "jobs": "jobs"}.items():
            args = ["--json", command] if place == "before" else [command, "--json"]
            done = await ctl(path, *args)
            assert done.returncode == 0
            assert key in json.loads(done.stdout)


async def test_load_and_unload(path):
    house = FakeHouse()
    async with serving(house, path), trio.open_nursery() as nursery:
        nursery.start_soon(finish_when_asked, house.residency, "demo")
        done = await ctl(path, "load", "demo")
        assert (done.returncode, done.stdout, done.stderr) == (0, b"demo ready\n", b"")
        nursery.start_soon(finish_when_asked, house.residency, "demo", ModelState.ABSENT)
        done = await ctl(path, "--json", "unload", "demo")
        assert json.loads(done.stdout)["model"]["state"] == "absent"


async def test_failures_have_status_1_and_a_code(path):
    house = FakeHouse()

    async def fail():
        while not house.residency.waiters:
            await house.residency.wait_change()
            await trio.testing.wait_all_tasks_blocked()
        house.residency.fail("demo", RkvlmdError("model_failed", "the decoder did not start"))

    async with serving(house, path), trio.open_nursery() as nursery:
        nursery.start_soon(fail)
        done = await ctl(path, "load", "demo")
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr == b"rkvlmctl: the decoder did not start\n"
        done = await ctl(path, "--json", "load", "nope")
        assert done.returncode == 1
        assert json.loads(done.stdout)["error"]["code"] == "model_not_found"
        done = await ctl(path, "cancel", "nope")
        assert done.returncode == 1


@pytest.mark.parametrize(
    "args", [[], ["fly"], ["load"], ["ask"], ["ask", "--max-tokens", "0", "x"], ["--nope"]]
)
async def test_usage_is_2(path, args):
    done = await ctl(path, *args)
    assert done.returncode == 2
    assert b"usage:" in done.stderr


async def test_no_daemon_is_3(path):
    assert (await ctl(path, "status")).returncode == 3
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    done = await ctl(path, "--json", "status")
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["code"] == "no_daemon"


async def test_a_daemon_that_leaves_is_3(path):
    house = FakeHouse()
    async with serving(house, path), trio.open_nursery() as nursery:

        async def stop():
            while not house.residency.waiters:
                await house.residency.wait_change()
                await trio.testing.wait_all_tasks_blocked()
            serving_scope.cancel()

        async with trio.open_nursery() as inner:
            serving_scope = inner.cancel_scope
            other = path.with_name("d.sock")
            await inner.start(partial(control.serve_control, house, other))
            nursery.start_soon(stop)
            with trio.CancelScope(shield=True):
                done = await ctl(other, "load", "demo")
    assert done.returncode == 3
    assert b"closed the connection" in done.stderr


async def test_refused_is_4(path, monkeypatch):
    monkeypatch.setattr(control_socket, "peer_of", lambda stream: Peer(1, 123456, 123456))
    async with serving(FakeHouse(), path):
        assert (await ctl(path, "models")).returncode == 0
        for command in ("load", "unload", "cancel"):
            done = await ctl(path, "--json", command, "demo")
            assert done.returncode == 4
            assert json.loads(done.stdout)["error"]["code"] == "permission_denied"


async def test_ctrl_c_stops_the_watching_and_not_the_load(path):
    house = FakeHouse()
    async with serving(house, path), trio.open_nursery() as nursery:
        command = [*COMMAND, "--control", str(path), "load", "demo"]
        process = await nursery.start(
            partial(trio.run_process, command, stderr=subprocess.DEVNULL, check=False)
        )
        while not house.residency.waiters:
            await house.residency.wait_change()
            await trio.testing.wait_all_tasks_blocked()
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
    assert house.residency.model("demo").state is ModelState.LOADING


async def on_a_terminal(path, *args, **env):
    """Run with a terminal for output; return what it showed."""
    ours, theirs = pty.openpty()
    shown = b""
    try:
        command = [*COMMAND, "--control", str(path), *args]
        full = environment(TERM="xterm", **env)
        await trio.run_process(command, stdin=theirs, stdout=theirs, stderr=theirs, env=full)
        os.set_blocking(ours, False)
        while True:
            try:
                shown += os.read(ours, 65536)
            except BlockingIOError:
                return shown
    finally:
        os.close(ours)
        os.close(theirs)


async def test_colour_on_a_terminal_alone(path):
    house = FakeHouse()
    house.residency.change("demo", state=ModelState.READY)
    async with serving(house, path):
        assert b"\x1b[32mready" in await on_a_terminal(path, "models")
        assert b"\x1b" not in await on_a_terminal(path, "models", NO_COLOR="1")


async def test_progress_line_on_a_terminal(path):
    house = FakeHouse()
    async with serving(house, path), trio.open_nursery() as nursery:
        nursery.start_soon(finish_when_asked, house.residency, "demo")
        shown = await on_a_terminal(path, "load", "demo")
    assert shown.endswith(b"demo ready\r\n")


async def test_ask_streams(path):
    http = HttpScript(sse(": ping", chunk("A red "), chunk("star\x1b[2J."), "data: [DONE]"))
    async with serving(FakeHouse(), path, http):
        done = await ctl(path, "ask", "--max-tokens", 9, "--model", "demo", "What is it?")
    assert (done.returncode, done.stdout) == (0, b"A red star[2J.\n")
    (body,) = http.bodies
    assert body["stream"] is True
    assert (body["model"], body["max_tokens"]) == ("demo", 9)
    assert body["messages"] == [{"role": "user", "content": "What is it?"}]
    assert "authorization" not in http.heads[0].lower()


async def test_ask_keeps_thoughts_and_answer_apart(path):
    def thought(text):
        return {"choices": [{"delta": {"reasoning_content": text, "reasoning": text}}]}

    streamed = sse(thought("Let me"), thought(" see."), chunk("Red."), "data: [DONE]")
    message = {"role": "assistant", "content": "Red.", "reasoning_content": "Let me see."}
    whole = response(200, {"choices": [{"message": message}]})
    cut = sse(thought("hm"), "data: [DONE]")
    http = HttpScript(streamed, streamed, whole, cut)
    async with serving(FakeHouse(), path, http):
        done = await ctl(path, "ask", "x")
        assert (done.stdout, done.stderr) == (b"Red.\n", b"")
        done = await ctl(path, "ask", "--think", "x")
        assert (done.stdout, done.stderr) == (b"Red.\n", b"Let me see.\n\n")
        done = await ctl(path, "ask", "--think", "--no-stream", "x")
        assert (done.stdout, done.stderr) == (b"Red.\n", b"Let me see.\n\n")
        done = await ctl(path, "ask", "--no-think", "x")
        assert (done.returncode, done.stdout) == (0, b"")
        assert b"--no-think" in done.stderr
    wishes = [body.get("chat_template_kwargs", {}).get("enable_thinking") for body in http.bodies]
    assert wishes == [None, True, True, False]


async def test_ask_sends_pictures_in_order(path, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"\x89PNG" + name.encode())
    answer = {"choices": [{"message": {"role": "assistant", "content": "two"}}]}
    http = HttpScript(response(200, answer), response(200, answer))
    images = ["--image", tmp_path / "a", "--image", tmp_path / "b"]
    async with serving(FakeHouse(), path, http):
        done = await ctl(path, "ask", *images, "--no-stream", "how many?")
        assert (done.returncode, done.stdout) == (0, b"two\n")
        done = await ctl(path, "--json", "ask", *images, "how many?")
        assert json.loads(done.stdout) == answer
    parts = http.bodies[0]["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in parts[:2]]
    assert urls == ["data:image/png;base64,iVBOR2E=", "data:image/png;base64,iVBOR2I="]
    assert http.bodies[0]["stream"] is False


async def test_ask_reports_what_the_server_says(path):
    error = {"message": "no such model", "type": "x", "param": "model", "code": "model_not_found"}
    http = HttpScript(
        response(404, {"error": error}),
        sse(chunk("half"), {"error": error | {"code": "engine_died", "param": None}}),
        sse(chunk("half")),
        response(401, {"error": error | {"code": "invalid_api_key", "param": None}}),
        b"nonsense\r\n\r\n",
    )
    async with serving(FakeHouse(), path, http):
        done = await ctl(path, "--json", "ask", "x")
        assert done.returncode == 1
        assert json.loads(done.stdout)["error"]["code"] == "model_not_found"
        done = await ctl(path, "ask", "x")
        assert (done.returncode, done.stdout) == (1, b"half\n")
        assert done.stderr == b"rkvlmctl: no such model\n"
        done = await ctl(path, "ask", "x")
        assert (done.returncode, done.stdout) == (3, b"half\n")
        assert (await ctl(path, "ask", "x")).returncode == 4
        assert (await ctl(path, "ask", "x")).returncode == 3


async def test_ask_with_keys(path, tmp_path):
    keyed = replace(Settings(), http=HttpSettings(api_keys_file="keys"))
    http = HttpScript(sse(chunk("yes"), "data: [DONE]"))
    async with serving(FakeHouse(settings=keyed), path, http):
        done = await ctl(path, "ask", "x")
        assert done.returncode == 4
        assert b"RKVLMD_API_KEY" in done.stderr
        done = await ctl(path, "ask", "x", RKVLMD_API_KEY="s3cret")
        assert done.stdout == b"yes\n"
    assert "Bearer s3cret" in http.heads[0]


async def test_ask_with_a_file_that_is_not_there(path):
    async with serving(FakeHouse(), path):
        done = await ctl(path, "ask", "--image", "/nowhere/x.png", "x")
    assert done.returncode == 1
    assert b"/nowhere/x.png: No such file" in done.stderr


async def test_reader_that_leaves_is_no_traceback(path):
    async with serving(FakeHouse(), path):
        line = f"{' '.join(COMMAND)} --control {path} status | true"
        done = await trio.run_process(["sh", "-c", line], capture_stderr=True)
    assert done.stderr == b""


def test_it_starts_at_once(path):
    """CPU time, as a multiple of a bare Python's: the machine may be slow, or busy."""

    def spent():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    def least(*command):
        taken = []
        for _ in range(5):
            before = spent()
            subprocess.run(command, capture_output=True)
            taken.append(spent() - before)
        return min(taken)

    bare = least(sys.executable, "-c", "pass")
    assert least(*COMMAND, "--control", str(path), "status") < 10 * bare  # 4 on a quiet machine


def test_it_imports_no_more_than_it_needs():
    code = (
        "import sys; import rkvlmd.ctl.__main__; print(sorted(m for m in sys.modules"
        " if m.split('.')[0] not in sys.stdlib_module_names or m in ('http', 'ssl', 'email')))"
    )
    out = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    mine = {"rkvlmd", "rkvlmd.paths", "rkvlmd.wire", "rkvlmd.wire.control"}
    names = ("", ".__main__", ".client", ".model_commands", ".orders", ".render")
    ctl_parts = {"rkvlmd.ctl" + part for part in names}
    assert set(eval(out.stdout)) - {"__main__"} == mine | ctl_parts
