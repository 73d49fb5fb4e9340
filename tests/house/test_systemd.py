"""The unit file: systemd takes every line, and its times fit the settings."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rkvlmd import __main__ as cli
from rkvlmd.settings import Settings

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "systemd" / "rkvlmd.service"
SYSUSERS = ROOT / "systemd" / "sysusers.d" / "rkvlmd.conf"


class _Lines(dict):
    """Values of a key that stands more than once are joined by newlines, as systemd adds them."""

    def __setitem__(self, key, value):
        if isinstance(value, list) and key in self:
            value = self[key] + value
        super().__setitem__(key, value)


@pytest.fixture(scope="module")
def service():
    parser = configparser.ConfigParser(
        strict=False, interpolation=None, dict_type=_Lines, comment_prefixes="#"
    )
    parser.optionxform = str
    parser.read(UNIT)
    return parser["Service"]


def tool(name):
    found = shutil.which(name)
    if found is None:
        why = f"{name} is missing: install the package systemd"
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    return found


@pytest.fixture
def installed(tmp_path):
    """Return the unit with a program that exists on this machine; systemd looks for it."""
    unit = tmp_path / UNIT.name
    text = UNIT.read_text()
    assert text.count("ExecStart=/opt/rkvlmd/bin/rkvlmd\n") == 1
    unit.write_text(text.replace("/opt/rkvlmd/bin/rkvlmd", sys.executable))
    return unit


def test_systemd_has_nothing_to_say(installed):
    # A key that it does not know gives exit status 0 and a line on standard error.
    done = subprocess.run(
        [tool("systemd-analyze"), "verify", "--man=no", str(installed)],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_misspelt_key_would_be_noticed(installed):
    installed.write_text(installed.read_text().replace("KillMode=", "KilMode="))
    done = subprocess.run(
        [tool("systemd-analyze"), "verify", "--man=no", str(installed)],
        capture_output=True,
        text=True,
    )
    assert "KilMode" in done.stderr


def test_exposure(installed):
    # 100 is open to everything. The NPU, the network and home-made code need what is left.
    done = subprocess.run(
        [tool("systemd-analyze"), "security", "--offline=true", "--threshold=25", str(installed)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_stop_time_is_above_the_longest_stop(service):
    settings = Settings()
    longest = max(settings.queue.stop_seconds, settings.http.peer_seconds)
    longest += settings.engine.abort_seconds + settings.engine.grace_seconds + 10
    assert longest < float(service["TimeoutStopSec"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("Type", "notify"),
        ("NotifyAccess", "main"),
        ("KillMode", "mixed"),
        ("ExecReload", "/bin/kill -HUP $MAINPID"),
        ("Restart", "on-failure"),
        ("OOMPolicy", "continue"),
        ("RestartPreventExitStatus", str(cli.BAD_SETTINGS)),
        ("PrivateDevices", "no"),
    ],
)
def test_what_the_daemon_relies_on(service, key, value):
    assert service[key] == value


def test_what_would_break_the_npu_is_not_there(service):
    assert "ProcSubset" not in service
    assert "MemoryDenyWriteExecute" not in service
    assert {"char-drm rw", "char-dma_heap rw"} <= set(service["DeviceAllow"].split("\n"))


def test_user_and_its_groups_are_made(service, tmp_path):
    lines = SYSUSERS.read_text().splitlines()
    assert any(line.startswith(f"u {service['User']} ") for line in lines)
    # A supplementary group that does not exist would keep the service from starting.
    assert "SupplementaryGroups" not in service
    (tmp_path / "etc").mkdir()
    done = subprocess.run(
        [tool("systemd-sysusers"), f"--root={tmp_path}", str(SYSUSERS)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    groups = (tmp_path / "etc" / "group").read_text().splitlines()
    for group in ("render", "video"):
        (line,) = [entry for entry in groups if entry.startswith(f"{group}:")]
        assert service["User"] in line.split(":")[3].split(",")
