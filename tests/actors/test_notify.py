"""sd_notify against a real datagram socket."""

from __future__ import annotations

import os
import socket
import time
from functools import partial

import pytest
import trio

from rkvlmd.actors.notify import Notify


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    """Return systemd's end and the name that it gives to the service."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@rkvlmd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name.replace("@", "\0"))
        sock.setblocking(False)
        yield sock, name


def said(sock):
    messages = []
    while True:
        try:
            messages.append(sock.recv(4096).decode())
        except BlockingIOError:
            return messages


def test_what_is_said(manager):
    sock, name = manager
    notify = Notify({"NOTIFY_SOCKET": name})
    notify.ready()
    notify.status("two\nlines\tand a\x85 tail")
    notify.extend_timeout(2.5)
    notify.stopping()
    assert said(sock) == [
        "READY=1",
        "STATUS=two lines and a tail",
        "EXTEND_TIMEOUT_USEC=2500000",
        "STOPPING=1",
    ]


def test_children_do_not_inherit_it(manager):
    _, name = manager
    env = {
        "NOTIFY_SOCKET": name,
        "WATCHDOG_USEC": "30000000",
        "WATCHDOG_PID": str(os.getpid()),
        "HOME": "/",
    }
    assert Notify(env).watchdog_interval == 30.0
    assert env == {"HOME": "/"}


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"NOTIFY_SOCKET": ""},
        {"NOTIFY_SOCKET": "vsock:2:1234"},
        {"NOTIFY_SOCKET": "/nowhere/at/all"},
        {"WATCHDOG_USEC": "1000000"},
    ],
)
def test_without_a_manager_nothing_happens(env):
    notify = Notify(dict(env))
    notify.ready()
    notify.status("x")
    notify.stopping()


@pytest.mark.parametrize("usec", ["", "0", "-1", "soon", "1.5"])
def test_no_watchdog_where_none_is_asked_for(manager, usec):
    _, name = manager
    assert Notify({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": usec}).watchdog_interval is None


def test_no_watchdog_where_another_process_is_meant(manager):
    _, name = manager
    env = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}
    assert Notify(env).watchdog_interval is None


async def test_watchdog_returns_where_nobody_listens():
    with trio.fail_after(60):
        await Notify({}).run_watchdog(lambda: True)


async def test_watchdog_beats_at_half_the_interval_while_healthy(manager, autojump_clock):
    sock, name = manager
    notify = Notify({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "20000000"})
    healthy = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(notify.run_watchdog, lambda: healthy))
        await trio.sleep(25)
        assert said(sock) == ["WATCHDOG=1"] * 3  # at 0, 10 and 20
        healthy = False
        await trio.sleep(30)
        assert said(sock) == []
        healthy = True
        await trio.sleep(10)
        assert said(sock) == ["WATCHDOG=1"]
        nursery.cancel_scope.cancel()


def test_a_reload_is_told_with_its_time(manager):
    sock, name = manager
    notify = Notify({"NOTIFY_SOCKET": name})
    notify.reloading()
    (message,) = said(sock)
    first, second = message.split("\n")
    assert first == "RELOADING=1"
    key, _, microseconds = second.partition("=")
    assert key == "MONOTONIC_USEC"
    assert 0 <= time.monotonic_ns() // 1000 - int(microseconds) < 60_000_000
