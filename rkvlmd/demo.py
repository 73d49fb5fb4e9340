"""``rkvlmd demo``: a throw-away daemon, a few pictures, its answers, and what each stage took."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rkvlmd import throwaway
from rkvlmd.ctl import chat, render
from rkvlmd.ctl.client import CtlError

#: The pictures of the package and what is asked about them.
FOLDER = Path(__file__).parent / "data" / "demo"
INDEX = "index.json"
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
    except (DemoError, throwaway.ThrowawayError, CtlError) as exc:
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
    print("Starting a throw-away daemon with the demo model ...", flush=True)
    with throwaway.running(command, scratch) as daemon:
        print(f"It listens after {_ms(daemon.ready_seconds)}.")
        endpoint = chat.Chat(daemon.address)
        try:
            for scene in scenes:
                _ask(endpoint, scene)
        except CtlError as exc:
            raise DemoError(f"{exc.message}{throwaway.last_words(daemon.log)}") from exc
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
