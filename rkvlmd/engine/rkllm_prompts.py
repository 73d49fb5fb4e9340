"""Prompt-cache files of ``librkllmrt.so``: the beginning of all prompts, computed once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from rkvlmd.engine import rkllm_inputs as inputs
from rkvlmd.engine.rkllm_session import Session, infer_param
from rkvlmd.engine.rkllm_types import State

#: Folder in the state folder, and how many files it keeps, those used last.
FOLDER = "rkllm-prompts"
MOST_FILES = 8


def load(session: Session, text: str, state: str, what: str, *, proven: bool = False) -> bool:
    """Give the library the cache of ``text``, made now unless that was done before.

    ``what`` says for which library and model (``rkllm_probe.key``). Best
    effort: without it the first prompt takes longer. Leaves an empty cache
    beside the loaded one; returns whether one is loaded. ``proven``: this
    process has loaded it before.

    A mark beside the file says that the library is at work on it. Where one is
    found, the library has died of the file, which is made anew; where it has
    died of that, too, there is none.
    """
    if not state:
        return False
    name = hashlib.sha256(f"{what}\0{text}".encode()).hexdigest()
    path = Path(state) / FOLDER / f"{name}.cache"
    if proven and session.load_prompt_cache(path) == 0:
        return True
    mark = path.with_suffix(".trying")
    try:
        path.parent.mkdir(exist_ok=True)
        deaths = mark.stat().st_size if mark.is_file() else 0
        if deaths:
            print(
                f"the library died {deaths} time(s) of a prompt cache, which is deleted", flush=True
            )
            path.unlink(missing_ok=True)
        if deaths > 1:
            print(f"there is no prompt cache; remove {mark.name} to try again", flush=True)
            return False
        mark.write_bytes(b"." * (deaths + 1))
        _sync(mark)
        loaded = _load(session, text, path)
        mark.unlink(missing_ok=True)
        _forget_old(path.parent)
    except OSError as exc:
        print(f"the prompt cache could not be kept: {exc.strerror}", flush=True)
        return False
    return loaded


def _load(session: Session, text: str, path: Path) -> bool:
    if path.is_file():
        if session.load_prompt_cache(path) == 0:
            os.utime(path)
            return True
        path.unlink(missing_ok=True)
    return _make(session, text, path) and session.load_prompt_cache(path) == 0


def _sync(path: Path) -> None:
    """Have a file's content on the disk: what dies next may be the whole board."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _make(session: Session, text: str, path: Path) -> bool:
    """Run the text once and have its cache saved; returns whether there is a file."""
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)

    def sink(state: State, _result: Any) -> int:
        if state in {State.NORMAL, State.WAITING}:
            session.abort_inside()  # the answer is of no interest
        return 0

    infer = infer_param(session.library, max_new_tokens=1, save_prompt_cache=temporary)
    value = inputs.prompt_input(session.library.layout, text.encode())
    rc = session.run(value, infer, sink)
    session.clear()
    if rc != 0 or not temporary.is_file() or temporary.stat().st_size == 0:
        temporary.unlink(missing_ok=True)
        return False
    _sync(temporary)
    temporary.replace(path)
    return True


def _forget_old(folder: Path) -> None:
    for kind in ("*.cache", "*.trying"):
        kept = sorted(folder.glob(kind), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in kept[MOST_FILES:]:
            path.unlink(missing_ok=True)
