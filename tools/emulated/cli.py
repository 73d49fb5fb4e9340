"""Builds the board, runs the daemon in it, asks it about pictures, and says what that proves."""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rkvlmd.engine import rkllm_probe
from tests.e2e.daemon import running
from tools.emulated.build import DEMO, HERE, REPOSITORY, BoardError, Workshop, enter, mirror_of_apt

MODEL = "demo-npu"
#: What a load asks of its synthetic pictures.
PROBE = rkllm_probe.PROMPT.decode()
#: Kinds of held-out questions of the demo model, and how many of each.
SKILLS = ("caption", "count", "where", "nth_picture", "follow_up")
#: Longest waits, seconds: an emulated start takes ten times as long as a real one.
START, ANSWER, CONVERT = 180.0, 120.0, 600.0

PROVED = """\
Proved: the aarch64 wheels install and import together; the daemon, its children, memory files,
sockets and templates work on aarch64; rknn-toolkit-lite2 {lite} itself loads a .rknn that
rknn-toolkit2 {toolkit} made, takes our pixels and gives our rows; the floats of its simulator reach
librkllmrt.so bit by bit at their places; the layout of librkllmrt.so is right for aarch64; the SoC
is read from a device tree; doctor runs there.
Not proved: anything of the kernel's NPU driver, of the vendor's librknnrt.so and librkllmrt.so
(stand-ins ran in their place), of speed, memory, clocks, IOMMU domains, or of how a real NPU rounds."""


@contextmanager
def _started(command: list[str], log: Path, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process; its output goes to ``log``, and it ends with the block."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **more)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(
    process: subprocess.Popen[bytes], ready: Callable[[], bool], seconds: float, log: Path
) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            tail = log.read_text(errors="replace")[-2000:]
            raise BoardError(f"{log.name} did not become ready; it ends:\n{tail}")
        time.sleep(0.2)


def _connects(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True


def _get(url: str, body: dict[str, Any] | None = None, seconds: float = 10.0) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        return json.load(answer)


def _serves(url: str) -> bool:
    try:
        _get(f"{url}/v1/models")
    except (OSError, ValueError):
        return False
    return True


def _cases(each: int) -> list[Any]:
    sys.path.insert(0, str(REPOSITORY / "tools"))
    from demoworld import heldout
    from demoworld.text import Fonts

    return [c for s in SKILLS for c in heldout.cases(s, each, Fonts(None), "independent")]


def _messages(case: Any) -> list[dict[str, Any]]:
    pictures = iter(case.pictures)

    def part(value: dict[str, Any]) -> dict[str, Any]:
        if value["type"] == "text":
            return value
        file = io.BytesIO()
        next(pictures).save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": url}}

    return [
        m if isinstance(m["content"], str) else m | {"content": [part(p) for p in m["content"]]}
        for m in case.messages
    ]


def _ask(url: str, model: str, case: Any) -> str:
    body = {"model": model, "messages": _messages(case), "max_tokens": 140, "temperature": 0}
    try:
        answer = _get(f"{url}/v1/chat/completions", body, ANSWER)
    except urllib.error.HTTPError as exc:
        raise BoardError(f"{model} answered {exc.code}: {exc.read().decode()[:500]}") from exc
    return str(answer["choices"][0]["message"]["content"])


class Board:
    """A built board, and the processes around it."""

    def __init__(self, shop: Workshop, toolkit: Path) -> None:
        self.shop, self.toolkit = shop, toolkit
        run = shop.root / "run"
        self.trace, self.control = run / "npusim.jsonl", run / "rkvlmd.sock"
        self.mind, self.npu_log = run / "mind.sock", shop.folder / "npu.jsonl"
        self.environ = {
            "PATH": "/usr/bin:/bin", "HOME": "/root", "LANG": "C.UTF-8", "PYTHONPATH": "/site",
            "NPUSIM_TRACE": "/run/npusim.jsonl", "NPUSIM_NPU": "/run/npu",
            "NPUSIM_MIND": "/run/mind.sock", "NPUSIM_LOAD_MS": "1", "NPUSIM_PREFILL_MS": "0.001",
            "NPUSIM_DECODE_MS": "0.05",
        }  # fmt: skip

    @contextmanager
    def npu(self) -> Iterator[None]:
        """Run rknn-toolkit2's simulator behind the stand-in, and the decoder's mind."""
        order = self.shop.order()
        path = self.shop.folder / "order.json"
        path.write_text(json.dumps(order))
        for old in (self.trace, self.npu_log, self.mind):
            old.unlink(missing_ok=True)
        Path(order["socket"]).parent.mkdir(parents=True, exist_ok=True)
        logs = self.shop.folder
        with ExitStack() as stack:
            with self.shop.step("the demo's vision tower to .rknn, and its simulator"):
                command = [str(self.toolkit), str(HERE / "toolkit.py"), str(path)]
                toolkit = stack.enter_context(
                    _started(command, logs / "toolkit.log", cwd=logs)
                )  # fmt: skip
                _wait(toolkit, lambda: _connects(order["socket"]), CONVERT, logs / "toolkit.log")
            command = [sys.executable, "-m", "tests.npusim.mind", str(self.mind), str(DEMO)]
            mind = stack.enter_context(_started(command, logs / "mind.log", cwd=REPOSITORY))
            _wait(mind, lambda: _connects(str(self.mind)), START, logs / "mind.log")
            yield

    def doctor(self) -> dict[str, Any]:
        """Return the report of ``rkvlmctl doctor`` inside."""
        command = ["/usr/bin/python3", "-m", "rkvlmd.ctl", "doctor", "--json",
                   "--config", "/etc/rkvlmd.toml"]  # fmt: skip
        done = subprocess.run(
            enter(self.shop.root, command), env=self.environ, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        try:
            report: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            raise BoardError(f"doctor: {done.stdout[-500:]}{done.stderr[-1500:]}") from None
        return report

    @contextmanager
    def daemon(self) -> Iterator[str]:
        """Run the daemon inside; yields its URL."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        url, log = f"http://127.0.0.1:{port}", self.shop.folder / "daemon.log"
        command = [
            "/usr/bin/python3", "-m", "rkvlmd", "--config", "/etc/rkvlmd.toml",
            "--http", f"127.0.0.1:{port}",
        ]  # fmt: skip
        with _started(enter(self.shop.root, command), log, env=self.environ) as process:
            with self.shop.step("the daemon starts in the board"):
                _wait(process, lambda: _serves(url), START, log)
            yield url

    def configure(self) -> None:
        """Write the settings of the daemon inside."""
        (self.shop.root / "etc" / "rkvlmd.toml").write_text(
            '[control]\npath = "/run/rkvlmd.sock"\n[state]\ndir = "/var/lib/rkvlmd"\n'
            '[models]\ndir = "/models"\ndemo = false\n'
            "[engine]\nhello_seconds = 120.0\nencode_seconds = 120.0\nfirst_token_seconds = 120.0\n"
            "token_seconds = 60.0\n[prep]\njob_seconds = 120.0\n"
        )
        shutil.rmtree(self.shop.root / "var" / "lib" / "rkvlmd", ignore_errors=True)

    def status(self) -> list[dict[str, Any]]:
        """Return what the children inside said at their load."""
        done = subprocess.run(
            [sys.executable, "-m", "rkvlmd.ctl", "--control", str(self.control), "--json",
             "status"],
            cwd=REPOSITORY, capture_output=True, check=False,
        )  # fmt: skip
        return list(json.loads(done.stdout or b"{}").get("children", []))

    def rows(self) -> tuple[list[str], list[str]]:
        """Return the checksums of rows that the simulator gave, and of those that arrived."""
        gave = [json.loads(line)["rows"] for line in self.npu_log.read_text().splitlines()]
        arrived: list[str] = []
        asked = False
        for line in self.trace.read_text().splitlines():
            event = json.loads(line)
            if event["ev"] == "run":
                # A load probes the library with pictures that no encoder has made.
                asked = event["prompt"] != PROBE
            if event["ev"] == "misuse":
                raise BoardError(f"the simulated library: {event['text']}")
            if asked and event["ev"] == "prefill" and event["rows"] != "-":
                arrived += event["rows"].split(",")
        return gave, arrived


def work(arguments: argparse.Namespace) -> bool:
    """Do everything; return whether all that was looked at is right."""

    def say(line: str) -> None:
        print(line, flush=True)

    begin = time.monotonic()
    shop = Workshop(arguments.folder.resolve(), say)
    if arguments.set_up:
        shop.set_up()
    shop.check()
    toolkit = shop.toolkit()
    shop.userland(arguments.mirror or mirror_of_apt())
    shop.wheels()
    shop.libraries()
    board = Board(shop, toolkit)
    board.configure()
    with board.npu():
        shop.model(MODEL, shop.folder / "vision.rknn")
        with shop.step("rkvlmctl doctor in the board"):
            report = board.doctor()
        say("           (a machine without the NPU's driver and device nodes, as it should say)")
        for line in report["findings"]:
            say(f"           {line['status']:<5} {line['what']}: {line['says']}")
        cases = _cases(arguments.each)
        with board.daemon() as url:
            with shop.step(f"{len(cases)} conversations with pictures, in the board"):
                answers = [_ask(url, MODEL, case) for case in cases]
            children = board.status()
        with shop.step("the same on the CPU engine of this machine"):
            (shop.folder / "cpu" / "models").mkdir(parents=True, exist_ok=True)
            with running(shop.folder / "cpu", shop.folder / "cpu" / "models") as cpu:
                expected = [_ask(cpu.url, "demo", case) for case in cases]
    gave, arrived = board.rows()
    strangers = [rows for rows in arrived if rows not in gave]
    same = sum(a == b for a, b in zip(answers, expected, strict=True))
    true = sum(a == case.expected for a, case in zip(answers, cases, strict=True))
    true_cpu = sum(a == case.expected for a, case in zip(expected, cases, strict=True))
    soc = next((f["says"] for f in report["findings"] if f["id"] == "soc"), "")
    said = {c["name"]: c["info"] for c in children if c.get("info", {}).get("libraries")}
    say(f"SoC in the board: {soc}")
    for name, info in said.items():
        say(f"{name}: {', '.join(f'{k} {v}' for k, v in info['libraries'].items())}")
    say(f"pictures that the simulated NPU encoded: {len(gave)}")
    say(f"rows that reached librkllmrt.so: {len(arrived)}, of them not from it: {len(strangers)}")
    say(f"answers as on the CPU engine: {same} of {len(cases)}")
    say(f"exactly right: {true} of {len(cases)} in the board, {true_cpu} on the CPU engine")
    say(f"{time.monotonic() - begin:7.1f} s  in all")
    say(told(shop.sizes()))
    right = not strangers and len(arrived) > 0 and true >= true_cpu - max(1, len(cases) // 10)
    right = right and len(said) == 2
    if right:
        lite = next(iter((shop.root / "site").glob("rknn_toolkit_lite2-*.dist-info"))).name
        made = report_of(shop.folder / "vision.rknn")
        say(PROVED.format(lite=lite.split("-")[1].removesuffix(".dist"), toolkit=made))
    else:
        say(f"Something is wrong; the logs are in {shop.folder}.")
    return right


def told(sizes: dict[str, int]) -> str:
    """Return a line that says how much disk the board takes."""
    whole, *parts = (f"{name} {size / 1e9:.2f} GB" for name, size in sizes.items() if size > 5e6)
    return f"disk: {whole}: {', '.join(parts)}"


def report_of(file: Path) -> str:
    """Return the version of the toolkit that a ``.rknn`` names."""
    from rkvlmd.board import rknn

    return rknn.read(file).toolkit or "of an unknown version"


def main() -> int:
    """Parse the command line; 0 when everything was right."""
    parser = argparse.ArgumentParser(
        prog="tools/emulated_board",
        description="The daemon on an emulated arm64 board with real aarch64 wheels, a real .rknn"
        " and the real rknn-toolkit-lite2. Needs root, qemu's user emulation, debootstrap and a"
        " cross compiler (--set-up brings them with apt), the test extra of this project, some GB"
        " of disk (the end says how many) and the configured package indexes. What is built is"
        " kept.",
        epilog="rknn-toolkit2 needs torch: an index of CPU wheels configured for pip spares the"
        " libraries of CUDA, which are larger than all else.",
    )
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument(
        "--folder", type=Path, default=home / "rkvlmd" / "emulated-board", metavar="DIR",
        help="where it is built (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--mirror", default="", metavar="URL", help="Debian archive, else apt's")
    parser.add_argument(
        "--set-up", action="store_true",
        help="install the Debian packages and register qemu with the kernel first",
    )  # fmt: skip
    parser.add_argument(
        "--each", type=int, default=2, metavar="N", help="questions of each kind (default: 2)"
    )
    try:
        return 0 if work(parser.parse_args()) else 1
    except BoardError as exc:
        print(exc, file=sys.stderr)
        return 1
