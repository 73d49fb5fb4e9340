"""The command line of the daemon, as processes."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rkvlmd import __main__ as cli
from rkvlmd.ctl.client import Client
from rkvlmd.settings import Settings

pytestmark = pytest.mark.process
COMMAND = [sys.executable, "-m", "rkvlmd"]


@pytest.fixture
def place():
    """Return a folder with a short path and a settings file without the demo model."""
    with tempfile.TemporaryDirectory(prefix="rkvlmd-") as name:
        path = Path(name)
        (path / "c.toml").write_text("[models]\ndemo = false\n")
        yield path


def options(place, **over):
    given = {"config": place / "c.toml", "http": "127.0.0.1:0", "control": place / "s"}
    given |= {"state": place / "state"} | over
    return [f"--{name}={value}" for name, value in given.items()]


def run(*args, **env):
    return subprocess.run(
        [*COMMAND, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | env,
    )


class Daemon:
    """A daemon until the end of the block; then how it ended."""

    def __init__(self, *args, **env):
        self.process = subprocess.Popen(
            [*COMMAND, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | env,
        )

    def __enter__(self):
        self.line = self.process.stdout.readline()
        return self

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        self.rest, self.log = self.process.communicate(timeout=120)
        return self.process.returncode

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_listens_and_leaves_in_order(place, number):
    with Daemon(*options(place)) as daemon:
        head, _, address = daemon.line.strip().rpartition(" listening on ")
        assert head.startswith("rkvlmd ")
        assert address.startswith("http://127.0.0.1:")
        with Client(place / "s") as client:
            assert client.call("status")["http"] == address
            assert client.call("http")["address"] == address
        assert daemon.stop(number) == 0
        assert daemon.rest == ""
    assert not (place / "s").exists()
    assert "setting http.bind = '127.0.0.1:0'" in daemon.log
    assert "models.on_demand" not in daemon.log


def test_journal_gets_priorities(place):
    # The pipe of standard error is what JOURNAL_STREAM names.
    ours, theirs = os.pipe()
    stat = os.fstat(theirs)
    env = os.environ | {"JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino}"}
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(place / "s"))
        taken.listen()
        command = [*COMMAND, *options(place)]
        subprocess.run(command, stderr=theirs, env=env, timeout=120, stdout=subprocess.DEVNULL)
    os.close(theirs)
    with os.fdopen(ours) as log:
        lines = log.read().splitlines()
    assert f"<6>rkvlmd: setting control.path = '{place / 's'}'" in lines
    assert lines[-1].startswith("rkvlmd: control.path: another rkvlmd listens")


def test_systemd_is_told(place):
    name = f"@rkvlmd-main-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:])
        manager.settimeout(30)
        with Daemon(*options(place), NOTIFY_SOCKET=name, WATCHDOG_USEC="200000") as daemon:
            said = set()
            while not {"READY", "WATCHDOG", "STATUS"} <= said:
                said.add(manager.recv(4096).decode().partition("=")[0])
            daemon.process.send_signal(signal.SIGHUP)
            heard = []
            while "RELOADING" not in heard or heard[-1] != "READY":
                heard.append(manager.recv(4096).decode().partition("=")[0])
            assert daemon.stop() == 0
            while "STOPPING" not in said:
                said.add(manager.recv(4096).decode().partition("=")[0])


def test_control_socket_taken(place):
    with Daemon(*options(place)):
        second = run(*options(place))
        assert second.returncode == 1
        assert second.stderr.splitlines()[-1].startswith("rkvlmd: control.path: another rkvlmd")
        assert "Traceback" not in second.stderr
        with Client(place / "s") as client:
            assert client.call("version")


def test_port_taken(place):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run(*options(place, http=f"127.0.0.1:{port}"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "rkvlmd: http.bind: Address already in use"
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_address_that_is_not_ours(place):
    (place / "c.toml").write_text("[http]\nallow_unauthenticated = true\n[models]\ndemo = false\n")
    done = run(*options(place, http="192.0.2.1:8080"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("rkvlmd: http.bind: ")
    assert "Traceback" not in done.stderr


def test_bad_settings_are_all_named(place):
    (place / "c.toml").write_text("[http]\nbnd = 1\nmax_parts = 0\n[nope]\n")
    for args, stream in (([], "stderr"), (["--check"], "stdout")):
        done = run(*options(place), *args)
        assert done.returncode == 78
        keys = {line.partition(":")[0] for line in getattr(done, stream).splitlines()}
        assert keys == {"http.bnd", "http.max_parts", "nope"}


@pytest.mark.parametrize(
    ("over", "key"),
    [
        ({"http": "nowhere"}, "http.bind"),
        ({"http": "0.0.0.0:80"}, "http.bind"),
        ({"config": "/nowhere/c.toml"}, "--config"),
        ({"config": "/"}, "--config"),
        ({"config": "/dev/zero"}, "--config"),
    ],
)
def test_bad_options_are_named(place, over, key):
    done = run(*options(place, **over))
    assert done.returncode == 78
    assert done.stderr.startswith(f"{key}: ")


def test_check(place):
    done = run(*options(place), "--check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
    models = place / "models"
    (models / "broken").mkdir(parents=True)
    (models / "broken" / "rkvlm.json").write_text("{}")
    done = run(*options(place, models=models), "--check")
    assert done.returncode == 78
    assert "broken" in done.stdout


def test_wrong_usage():
    assert run("--nope").returncode == 2
    assert run("fly").returncode == 2


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_quick_answers_load_nothing(option):
    code = (
        "import json, sys, rkvlmd.__main__ as m\n"
        "try: m.main([sys.argv[1]])\n"
        "except SystemExit as e: print(json.dumps([e.code, 'trio' in sys.modules,"
        " 'msgspec' in sys.modules]))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, option], capture_output=True, text=True, check=True
    )
    assert json.loads(out.stdout.splitlines()[-1]) == [0, False, False]


def test_command_line_wins_over_the_file(place):
    (place / "c.toml").write_text('[http]\nbind = "127.0.0.1:1"\n[state]\ndir = "/x"\n')
    args = cli.parser().parse_args([*options(place), "--models", "relative"])
    settings = cli.settings_of(args)
    assert settings.http.bind == "127.0.0.1:0"
    assert settings.state.dir == str(place / "state")
    assert settings.models.dir == os.path.abspath("relative")
    lines = list(cli.effective(settings))
    assert "http.bind = '127.0.0.1:0'" in lines
    assert len(lines) == 4
    assert list(cli.effective(Settings())) == []


def test_log_is_one_line_an_event(capsys):
    formatter = cli._Lines(journal=True)
    record = cli.log.makeRecord("rkvlmd", 40, "f", 1, "a\nb %s", ("\x1b",), None)
    assert formatter.format(record) == "<3>rkvlmd: a\\x0ab \\x1b"
    try:
        raise ValueError("x")
    except ValueError:
        record = cli.log.makeRecord("rkvlmd", 20, "f", 1, "m", (), sys.exc_info())
    lines = formatter.format(record).splitlines()
    assert lines[0] == "<6>rkvlmd: m"
    assert lines[-1] == "<6>    ValueError: x"
    assert len(lines) > 2


@pytest.mark.parametrize(("soft", "hard", "wanted"), [(256, 4096, 4096), (300, 300, 300)])
def test_the_soft_limit_of_open_files_is_raised(place, soft, hard, wanted):
    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    process = subprocess.Popen(
        [*COMMAND, *options(place)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=limit,
    )  # fmt: skip
    try:
        assert "listening" in process.stdout.readline()
        assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (wanted, hard)
    finally:
        process.terminate()
        process.communicate(timeout=120)
    assert process.returncode == 0


def test_more_open_files_than_anybody_needs_are_not_asked_for(monkeypatch):
    asked = []
    for soft, hard in ((1024, resource.RLIM_INFINITY), (1024, 1 << 20), (500_000, 1 << 20)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, now=(soft, hard): now)
        monkeypatch.setattr(resource, "setrlimit", lambda _, new: asked.append(new))
        cli.raise_descriptors()
    assert asked == [(102_400, resource.RLIM_INFINITY), (102_400, 1 << 20)]
