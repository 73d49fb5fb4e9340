"""``rkvlmd demo``: a throw-away daemon, a few pictures, its answers, and what each stage took."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from rkvlmd.ctl import chat, render
from rkvlmd.ctl.client import CtlError

#: The pictures of the package and what is asked about them.
FOLDER = Path(__file__).parent / "data" / "demo"
INDEX = "index.json"
#: Longest wait for the daemon to listen, seconds: a cold start on a slow card.
START_SECONDS = 60.0
#: Longest wait for it to leave, seconds; after that it is killed.
STOP_SECONDS = 45.0
_MAX_FILE_BYTES = 4 << 20
_INTERRUPTED = 130
#: The stages of ``timings``, in the order in which they happen, and what people call them.
_STAGES = {
    "queue": "wait", "fetch": "fetch", "prepare": "prepare", "load": "load model",
    "encode": "look", "prefill": "read", "generate": "answer",
}  # fmt: skip


class DemoError(Exception):
    """Why the demo did not work; one sentence."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Pictures and the questions about them, asked one after the other in one conversation."""

    files: tuple[Path, ...]
    questions: tuple[str, ...]


def main(folder: Path = FOLDER, command: Sequence[str] = (sys.executable, "-m", "rkvlmd")) -> int:
    """Run the demo; return its exit status.

    Args:
      folder: the pictures and their ``index.json``.
      command: how to start the daemon; its options are added.

    """
    # Without this, kill or a closed terminal would end us and leave the daemon behind.
    before = {
        number: signal.signal(number, _interrupt)  # noqa: TID251 - no trio in this process
        for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        scenes = read_index(folder)
        with tempfile.TemporaryDirectory(prefix="rkvlmd-demo-") as scratch:
            _show(scenes, command, Path(scratch))
    except (DemoError, CtlError) as exc:
        print(f"rkvlmd demo: {render.plain(str(exc))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nrkvlmd demo: interrupted", file=sys.stderr)
        return _INTERRUPTED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)  # noqa: TID251 - as above
    return 0


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def read_index(folder: Path) -> list[Scene]:
    """Return the scenes of a folder.

    Raises:
      DemoError: the index is not what it should be, or a picture is missing.

    """
    try:
        entries = json.loads((folder / INDEX).read_bytes())
    except (OSError, ValueError) as exc:
        raise DemoError(f"the pictures of the demo cannot be read from {folder}") from exc
    if not isinstance(entries, list) or not entries:
        raise DemoError(f"{INDEX}: must be a list of scenes")
    return [_scene(folder, number, entry) for number, entry in enumerate(entries)]


def _scene(folder: Path, number: int, entry: Any) -> Scene:
    lists: dict[str, tuple[str, ...]] = {}
    for key in ("files", "questions"):
        values = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(values, list) or not values:
            raise DemoError(f"{INDEX}: [{number}].{key}: must be a list of strings")
        if not all(isinstance(value, str) for value in values):
            raise DemoError(f"{INDEX}: [{number}].{key}: must be a list of strings")
        lists[key] = tuple(values)
    files = tuple(folder / name for name in lists["files"])
    for file in files:
        if file.parent != folder or not file.is_file():
            raise DemoError(f"{INDEX}: [{number}].files: there is no picture {file.name}")
    return Scene(files, lists["questions"])


def _show(scenes: Sequence[Scene], command: Sequence[str], scratch: Path) -> None:
    started = time.monotonic()
    print("Starting a throw-away daemon with the demo model ...", flush=True)
    with running(command, scratch) as (address, log):
        print(f"It listens after {_ms(time.monotonic() - started)}.")
        endpoint = chat.Chat(address)
        try:
            for scene in scenes:
                _ask(endpoint, scene)
        except CtlError as exc:
            raise DemoError(f"{exc.message}{_last_words(log)}") from exc
    print("\nThe daemon has stopped. To keep one running: rkvlmd")


def _ask(endpoint: chat.Chat, scene: Scene) -> None:
    print("\n" + " and ".join(file.name for file in scene.files))
    messages: list[dict[str, Any]] = []
    pictures = [chat.picture(file, _MAX_FILE_BYTES) for file in scene.files]
    for question in scene.questions:
        messages.append(chat.user_turn(question, pictures))
        pictures = []  # they are in the conversation already
        print(f"  {question}\n  > ", end="", flush=True)
        answer = ""
        timings: Any = {}
        try:
            # Greedy, so that everybody sees the same demo.
            for chunk in endpoint.stream({"messages": messages, "temperature": 0}):
                text = render.plain(chat.text_of(chunk))
                answer += text
                print(text, end="", flush=True)
                timings = chunk.get("timings") or timings
        finally:
            print()
        if not answer.strip():
            raise DemoError("the model said nothing")
        messages.append({"role": "assistant", "content": answer})
        print(f"    {stages(timings)}")


def stages(timings: Any) -> str:
    """Return what each stage took, for people; those that did not run are left out."""
    if not isinstance(timings, dict):
        return ""
    taken = {key: value for key, value in timings.items() if isinstance(value, int | float)}
    parts = [
        f"{title} {_ms(taken[key])}" for key, title in _STAGES.items() if taken.get(key, 0) > 0
    ]
    if "first_token" in taken:
        parts.append(f"first token after {_ms(taken['first_token'])}")
    if "total" in taken:
        parts.append(f"total {_ms(taken['total'])}")
    return ", ".join(parts)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


@contextmanager
def running(command: Sequence[str], scratch: Path) -> Iterator[tuple[str, Path]]:
    """Run a daemon inside the block; give its HTTP address and its log.

    It gets its own sockets and folders below ``scratch``, reads no settings
    of this machine, and is stopped with SIGTERM.

    Raises:
      DemoError: it did not come up, or did not end as it should.

    """
    config, log = scratch / "rkvlmd.toml", scratch / "log"
    config.write_text("")
    options = ["--config", str(config), "--http", "127.0.0.1:0"]
    options += ["--control", str(scratch / "control.sock")]
    options += ["--state", str(scratch / "state"), "--models", str(scratch / "models")]
    with log.open("wb") as errors:
        try:
            daemon = subprocess.Popen(
                [*command, *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                process_group=0,  # a terminal's Ctrl-C comes to us alone, and we stop it in order
            )
        except OSError as exc:
            raise DemoError(f"the daemon cannot be started: {exc.strerror}") from exc
    assert daemon.stdout is not None
    try:
        with daemon.stdout:
            yield _address(daemon.stdout, log), log
            daemon.terminate()
            _wait(daemon)
        if daemon.returncode != 0:
            message = f"the daemon ended with status {daemon.returncode}{_last_words(log)}"
            raise DemoError(message)
    finally:
        if daemon.poll() is None:
            daemon.terminate()
            _wait(daemon)


def _wait(daemon: subprocess.Popen[bytes]) -> None:
    try:
        daemon.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _address(stdout: IO[bytes], log: Path) -> str:
    """Wait for the line that ends in ``listening on ADDRESS``; return the address."""
    deadline = time.monotonic() + START_SECONDS
    said = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        while b"\n" not in said:
            if not selector.select(max(deadline - time.monotonic(), 0)):
                what = f"did not listen within {START_SECONDS:.0f} s"
                raise DemoError(f"the daemon {what}{_last_words(log)}")
            data = os.read(stdout.fileno(), 4096)
            if not data:
                raise DemoError(f"the daemon did not start{_last_words(log)}")
            said += data
    line = said.partition(b"\n")[0].decode(errors="replace")
    _, found, address = line.rpartition("listening on ")
    if not found:
        raise DemoError(f"the daemon said {line[:200]!r} instead of its address")
    return address.strip()


def _last_words(log: Path) -> str:
    """Return the end of the daemon's log, to be put after a sentence."""
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return "; its last words:\n" + "\n".join(f"  {line}" for line in lines[-8:]) if lines else ""
