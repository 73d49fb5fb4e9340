"""The control socket with real sockets and a house without engines."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import sys
import tempfile
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from rkvlmd import __version__
from rkvlmd.errors import RkvlmdError, SettingsError, StartError
from rkvlmd.front import control, control_socket
from rkvlmd.messages import ModelState
from rkvlmd.settings import ControlSettings, Settings
from rkvlmd.wire.control import Peer
from tests.fakes.ctl_house import FakeHouse, a_job


@pytest.fixture
def folder():
    """Return a folder that any user may enter, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="ctl-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def path(folder):
    return folder / "control.sock"


class Caller:
    """A peer that speaks lines."""

    def __init__(self, stream):
        self.stream = stream
        self._buffer = b""

    async def send(self, method, params=None, id_=1):
        message = {"jsonrpc": "2.0", "id": id_, "method": method}
        if params is not None:
            message["params"] = params
        await self.stream.send_all(json.dumps(message).encode() + b"\n")

    async def line(self):
        """Return the next line's object, or ``None`` at the end."""
        while b"\n" not in self._buffer:
            data = await self.stream.receive_some(65536)
            if not data:
                return None
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    async def until(self, key):
        """Return the next line that has a key, as notifications have neither result nor error."""
        while True:
            found = await self.line()
            if key in found:
                return found

    async def call(self, method, params=None):
        await self.send(method, params)
        return await self.line()


@asynccontextmanager
async def serving(house, path):
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(control.serve_control, house, path))
            yield
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def caller(path):
    async with await trio.open_unix_socket(str(path)) as stream:
        yield Caller(stream)


def with_limits(**limits):
    return FakeHouse(settings=replace(Settings(), control=ControlSettings(**limits)))


async def waits_for_load(house):
    while not house.residency.waiters:
        await house.residency.wait_change()
        await trio.testing.wait_all_tasks_blocked()


async def test_looking(path):
    house = FakeHouse()
    house.scheduler.live["j1"] = a_job("j1")
    async with serving(house, path), caller(path) as peer:
        assert (await peer.call("version"))["result"] == {"version": __version__, "protocol": 1}
        assert (await peer.call("status"))["result"] == house.status()
        models = (await peer.call("models"))["result"]["models"]
        assert [(m["name"], m["state"]) for m in models] == [
            ("demo", "absent"),
            ("other", "absent"),
        ]
        jobs = (await peer.call("jobs"))["result"]["jobs"]
        assert [(j["id"], j["phase"]) for j in jobs] == [("j1", "generating")]
        http = (await peer.call("http"))["result"]
        assert (http["address"], http["keys"]) == (house.http_address, False)


async def test_load_tells_progress_and_the_end(path):
    house = FakeHouse()
    async with serving(house, path), caller(path) as peer:
        await peer.send("load", {"model": "demo"})
        first = await peer.line()
        assert first["method"] == "progress"
        assert "id" not in first
        while first["params"]["state"] != "loading":
            first = await peer.line()
        house.residency.change("demo", progress=0.5, detail="decoder", seconds_left=12.345)
        step = await peer.line()
        assert step["params"] == {
            "model": "demo", "state": "loading", "progress": 0.5, "detail": "decoder",
            "seconds_left": 12.3,
        }  # fmt: skip
        house.residency.finish("demo")
        end = await peer.until("result")
        assert end["result"]["model"]["state"] == "ready"
        assert end["id"] == 1


async def test_failed_load_says_why(path):
    house = FakeHouse()
    async with serving(house, path), caller(path) as peer:
        await peer.send("load", {"model": "demo"})
        await waits_for_load(house)
        house.residency.fail("demo", RkvlmdError("model_failed", "the decoder did not start"))
        answer = await peer.until("error")
        assert answer["error"] == {
            "code": -32000,
            "message": "the decoder did not start",
            "data": {"code": "model_failed", "param": None},
        }


async def test_unload_and_cancel(path):
    house = FakeHouse()
    house.scheduler.live["j1"] = a_job("j1")
    async with serving(house, path), caller(path) as peer:
        assert (await peer.call("cancel", {"id": "j1"}))["result"] == {"cancelled": "j1"}
        gone = (await peer.call("cancel", {"id": "j1"}))["error"]
        assert (gone["code"], gone["data"]) == (-32000, {"code": "not_found", "param": "id"})
        await peer.send("unload", {"model": "other"})
        await waits_for_load(house)
        house.residency.finish("other", ModelState.ABSENT)
        answer = await peer.until("result")
        assert answer["result"]["model"]["state"] == "absent"


async def test_unknown_model(path):
    async with serving(FakeHouse(), path), caller(path) as peer:
        error = (await peer.call("load", {"model": "nope"}))["error"]
        assert error["data"] == {"code": "model_not_found", "param": "model"}


async def test_other_calls_are_answered_during_a_load(path):
    house = FakeHouse()
    async with serving(house, path), caller(path) as peer:
        await peer.send("load", {"model": "demo"}, id_="slow")
        await waits_for_load(house)
        await peer.send("version", id_="quick")
        answer = await peer.until("result")
        assert answer["id"] == "quick"


async def test_caller_of_a_load_that_leaves_stops_the_watching_only(path):
    house = FakeHouse()
    async with serving(house, path):
        async with caller(path) as peer:
            await peer.send("load", {"model": "demo"})
            await waits_for_load(house)
        while house.residency.waiters:  # its next line does not reach it
            house.residency.change("demo", progress=house.residency.model("demo").progress + 0.01)
            await trio.testing.wait_all_tasks_blocked()
        assert house.residency.model("demo").state is ModelState.LOADING
        async with caller(path) as peer:
            assert "result" in await peer.call("version")


async def test_caller_of_an_unload_that_leaves_does_not_stop_it(path):
    house = FakeHouse()
    async with serving(house, path):
        async with caller(path) as peer:
            await peer.send("unload", {"model": "demo"})
            await waits_for_load(house)
        for share in (0.1, 0.2, 0.3):  # its next line does not reach it
            house.residency.change("demo", progress=share)
            await trio.testing.wait_all_tasks_blocked()
        assert house.residency.waiters == 1
        house.residency.finish("demo", ModelState.ABSENT)
        await trio.testing.wait_all_tasks_blocked()
        assert house.residency.waiters == 0


async def test_unload_that_fails_is_told(path):
    house = FakeHouse()
    async with serving(house, path), caller(path) as peer:
        await peer.send("unload", {"model": "demo"})
        await waits_for_load(house)
        house.residency.fail("demo", RkvlmdError("server_error", "it does not leave"))
        answer = await peer.until("error")
        assert answer["error"]["data"]["code"] == "server_error"


async def test_half_closed_caller_gets_its_answers(path):
    async with serving(FakeHouse(), path), caller(path) as peer:
        await peer.send("version")
        await peer.stream.send_eof()
        assert "result" in await peer.line()
        assert await peer.line() is None


@pytest.mark.parametrize("garbage", [b"hello\n", b"\x00\xff\xfe\n", b"GET / HTTP/1.1\r\n", b"{\n"])
async def test_garbage_gets_a_parse_error_and_the_connection_goes_on(path, garbage):
    async with serving(FakeHouse(), path), caller(path) as peer:
        await peer.stream.send_all(garbage)
        assert (await peer.line())["error"]["code"] == -32700
        assert "result" in await peer.call("version")


async def test_a_notification_gets_no_answer(path):
    house = FakeHouse()
    house.scheduler.live["j1"] = a_job("j1")
    async with serving(house, path), caller(path) as peer:
        line = b'{"jsonrpc":"2.0","method":"cancel","params":{"id":"j1"}}\n'
        await peer.stream.send_all(line)
        assert (await peer.call("jobs"))["result"] == {"jobs": []}


async def test_too_long_line_ends_the_connection_and_nothing_else(path):
    async with serving(with_limits(max_line_bytes=1024), path):
        async with caller(path) as peer:
            await peer.stream.send_all(b"x" * 1025)
            assert "more than 1024 bytes" in (await peer.line())["error"]["message"]
            assert await peer.line() is None
        async with caller(path) as peer:
            assert "result" in await peer.call("version")


async def test_peer_that_reads_nothing_is_dropped_and_blocks_nobody(path):
    async with serving(with_limits(peer_seconds=0.2), path), caller(path) as deaf:
        asked = 0
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await deaf.send("status")
                asked += 1
                if asked == 1:
                    async with caller(path) as peer:
                        assert "result" in await peer.call("version")
        async with caller(path) as peer:
            assert "result" in await peer.call("version")


async def test_idle_connection_is_closed_unless_it_waits_for_a_call(path, patient_clock):
    house = with_limits(idle_seconds=30.0)
    async with serving(house, path), caller(path) as idle, caller(path) as waiting:
        await waiting.send("load", {"model": "demo"})
        await waits_for_load(house)
        assert await idle.line() is None
        house.residency.finish("demo")
        await waiting.until("result")


async def test_connection_limit(path):
    async with serving(with_limits(max_connections=2), path):
        async with caller(path) as first, caller(path) as second, caller(path) as third:
            assert "result" in await first.call("version")
            assert "result" in await second.call("version")
            assert (await third.line())["error"]["data"]["code"] == "server_is_overloaded"
            assert await third.line() is None


async def test_a_bug_in_one_call_is_an_internal_error(path, caplog):
    house = FakeHouse()
    house.status = lambda: {"uptime": float("nan")}
    async with serving(house, path), caller(path) as peer:
        error = (await peer.call("status"))["error"]
        assert (error["code"], error["data"]["code"]) == (-32603, "server_error")
        assert "nan" not in error["message"].lower()
        assert "result" in await peer.call("version")
    assert "control call status failed" in caplog.text


async def test_while_stopping_it_shows_and_cancels_but_does_not_load(path):
    house = FakeHouse(stopping=True)
    house.scheduler.live["j1"] = a_job("j1")
    async with serving(house, path), caller(path) as peer:
        assert (await peer.call("status"))["result"]["stopping"] is True
        error = (await peer.call("load", {"model": "demo"}))["error"]
        assert error["data"]["code"] == "shutting_down"
        assert "result" in await peer.call("cancel", {"id": "j1"})


NOBODY = 65534
#: The interpreter may lie where nobody may read: it starts as root and gives its rights away.
BECOME = """
import json, os, socket, sys
os.setgroups([int(g) for g in sys.argv[2:]]); os.setgid(65534); os.setuid(65534)
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])
"""
STRANGER = """
for n, call in enumerate([("version", {}), ("load", {"model": "demo"}), ("cancel", {"id": "j1"})]):
    m = {"jsonrpc": "2.0", "id": n, "method": call[0], "params": call[1]}
    s.sendall(json.dumps(m).encode() + b"\\n")
    print(s.makefile().readline(), end="")
"""


@pytest.mark.process
async def test_another_user_may_look_and_not_change(path):
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    house = FakeHouse()
    house.scheduler.live["j1"] = a_job("j1")
    async with serving(house, path):
        command = [sys.executable, "-c", BECOME + STRANGER, str(path)]
        done = await trio.run_process(command, capture_stdout=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert "result" in answers[0]
    for answer in answers[1:]:
        assert answer["error"]["code"] == -32001
        assert answer["error"]["data"]["code"] == "permission_denied"
    assert house.residency.asked == []
    assert "j1" in house.scheduler.live


@pytest.mark.process
async def test_supplementary_groups_are_seen(path):
    if os.geteuid() != 0:
        pytest.skip("only root can give itself groups")
    command = [sys.executable, "-c", BECOME + "s.recv(1)", str(path), "4711", "4712"]
    with trio.fail_after(60), control_socket.bound(path) as listener:
        async with listener, trio.open_nursery() as nursery:
            nursery.start_soon(trio.run_process, command)
            async with await listener.accept() as stream:
                peer = control_socket.peer_of(stream)
    assert peer == Peer(peer.pid, NOBODY, NOBODY, frozenset({4711, 4712}))


async def test_injected_stranger_is_refused(path, monkeypatch):
    """The same refusal where the tests do not run as root."""
    stranger = Peer(1, 123456, 123456)
    monkeypatch.setattr(control_socket, "peer_of", lambda stream: stranger)
    house = FakeHouse()
    async with serving(house, path), caller(path) as peer:
        assert "result" in await peer.call("status")
        assert (await peer.call("unload", {"model": "demo"}))["error"]["code"] == -32001
    assert house.residency.asked == []


async def test_strangers_cannot_fill_the_house(path, monkeypatch):
    peers = [Peer(1, 123456, 1)] * 3 + [Peer(1, 0, 0)]
    monkeypatch.setattr(control_socket, "peer_of", lambda stream: peers.pop(0))
    async with serving(with_limits(max_connections=3), path):
        async with caller(path) as one, caller(path) as two:
            assert "result" in await one.call("version")
            assert "result" in await two.call("version")
            async with caller(path) as three, caller(path) as owner:
                assert (await three.line())["error"]["data"]["code"] == "server_is_overloaded"
                assert "result" in await owner.call("version")


async def test_the_file_is_open_to_all_whatever_the_umask_and_goes_away(folder):
    path = folder / "new" / "control.sock"
    before = os.umask(0o077)
    try:
        async with serving(FakeHouse(), path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o666
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
            assert os.listdir(path.parent) == ["control.sock"]
    finally:
        os.umask(before)
    assert os.listdir(path.parent) == []


def test_two_daemons_cannot_share_a_socket(path):
    async def second():
        async with serving(FakeHouse(), path):
            with pytest.raises(StartError, match="another rkvlmd listens"):
                with control_socket.bound(path):
                    pass
            async with caller(path) as peer:
                assert "result" in await peer.call("version")

    trio.run(second)


async def test_a_socket_left_by_a_dead_daemon_is_replaced(path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with serving(FakeHouse(), path), caller(path) as peer:
        assert "result" in await peer.call("version")


async def test_what_is_no_socket_is_left_alone(path):
    path.write_text("mine")
    with pytest.raises(StartError, match="no socket"):
        await control.serve_control(FakeHouse(), path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", ["x" * 200, ""])
async def test_impossible_paths(folder, name):
    with pytest.raises(StartError, match=r"control\.path"):
        await control.serve_control(FakeHouse(), folder / name)


async def test_folder_of_another_user(folder):
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    theirs = folder / "theirs"
    theirs.mkdir()
    os.chown(theirs, NOBODY, NOBODY)
    with pytest.raises(StartError, match="another user"):
        await control.serve_control(FakeHouse(), theirs / "control.sock")


async def test_a_socket_that_replaced_ours_stays(path):
    async with serving(FakeHouse(), path):
        path.unlink()
        other = socket.socket(socket.AF_UNIX)
        other.bind(str(path))
    with other:
        assert path.exists()


async def test_operator_group_must_exist(path):
    house = with_limits(operator_group="no-such-group-here")
    with pytest.raises(SettingsError, match=r"control\.operator_group"):
        await control.serve_control(house, path)


async def test_socat_style_session(path):
    """A script needs a connect, a line and a read, nothing more."""
    async with serving(FakeHouse(), path):

        def script():
            with socket.socket(socket.AF_UNIX) as plain:
                plain.connect(str(path))
                plain.sendall(b'{"jsonrpc":"2.0","id":1,"method":"version"}\n')
                plain.shutdown(socket.SHUT_WR)
                with suppress(ConnectionResetError):
                    return plain.makefile().read()

        answer = await trio.to_thread.run_sync(script)
    assert json.loads(answer)["id"] == 1
