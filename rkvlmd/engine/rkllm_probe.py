"""Finds out at a load what ``librkllmrt.so`` does where its documents are silent."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from rkvlmd.engine import rkllm_inputs as inputs
from rkvlmd.engine.rkllm_library import Library
from rkvlmd.engine.rkllm_session import ImageTags, Session, infer_param
from rkvlmd.engine.rkllm_types import State

#: File in the state folder, and how many results it keeps, the newest.
FILE = "rkllm-probes.json"
_MOST = 64
#: What the synthetic pictures are asked.
PROMPT = b"a <image> b"


def key(library: Library, model: str) -> str:
    """Return what a result is for: this library file, its version, and a model's SHA-256."""
    digest = hashlib.sha256()
    with library.path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return f"{library.version}:{digest.hexdigest()}:{model}"


@dataclass(frozen=True, slots=True)
class Found:
    """What a library does that no document says; ``rkvlmctl status`` shows it.

    ``pictures_told_apart``: its cache does not take one picture for another.
    ``special_strings``: how many tokens it makes of one in a raw prompt (1: it
    knows it), 0 where that could not be seen. ``finish_after_abort``: a run
    that is aborted still tells its end. ``kept_after_run``: positions of the
    cache after a run of ``run_tokens``, its one answered token not counted.
    ``callbacks_elsewhere``: they come on another thread than that which runs.
    ``unfinished``: an earlier load died in its probe, and so this is the
    careful answer: nothing is known.
    """

    pictures_told_apart: bool = False
    special_strings: int = 0
    finish_after_abort: bool = False
    kept_after_run: int = 0
    run_tokens: int = 0
    callbacks_elsewhere: bool = False
    unfinished: bool = False


@dataclass(slots=True)
class _Run:
    """The sink of one short run: what it computed, and whether it told its end."""

    session: Session
    abort: bool
    computed: int = -1
    thread: int = 0
    aborted: bool = False
    elsewhere: bool = False

    def __call__(self, state: State, result: Any) -> int:
        self.elsewhere = self.elsewhere or threading.get_ident() != self.thread
        if state is State.FINISH and result is not None:
            self.computed = int(result.perf.prefill_tokens)
        elif state in {State.NORMAL, State.WAITING} and self.abort:
            self.aborted = True
            self.session.abort_inside()
        return 0

    def do(self, value: Any, most: int = 1) -> bool:
        """Run once for a token or a few; return whether the library said how much it computed."""
        self.thread = threading.get_ident()
        infer = infer_param(self.session.library, max_new_tokens=most)
        return self.session.run(value, infer, self) == 0 and self.computed >= 0


def look(
    session: Session,
    *,
    tokens: int,
    row: int,
    width: int,
    height: int,
    tags: ImageTags,
    special: str = "",
) -> Found:
    """Run two different synthetic pictures with one text, and a special string; empties the cache.

    Pictures are told apart if the second run computed the rows of its picture
    again. Where the library does not say, the careful answer is no.
    """
    layout = session.library.layout
    # Before 1.3.0 a run has no limit of its own; one token is enough.
    abort = not layout.per_run
    computed: list[int] = []
    found = Found()
    for seed in (1, 2):
        # Small numbers, as embeddings are; only that they differ matters. (NumPy's generators
        # would stay in memory for this: 2 MB.)
        waves = np.sin(np.arange(tokens * row) * (0.7 * seed)).astype(np.float32)
        rows = waves.reshape(tokens, row) * np.float32(0.02)
        block = inputs.stack([rows], tokens=tokens, row=row, width=width, height=height, tags=tags)
        run = _Run(session, abort)
        if not run.do(inputs.multimodal_input(layout, PROMPT, block)):
            break
        computed.append(run.computed)
        if seed == 1:
            found = replace(
                found,
                kept_after_run=_kept(session),
                run_tokens=run.computed,
                callbacks_elsewhere=run.elsewhere,
            )
    told = len(computed) == 2 and computed[1] >= tokens
    session.clear()
    return replace(
        found,
        pictures_told_apart=told,
        special_strings=_tokens_of(session, special),
        finish_after_abort=_finishes(session),
    )


def _kept(session: Session) -> int:
    try:
        return session.cache_sizes()[0]
    except RuntimeError:
        return 0  # the library does not say


def _tokens_of(session: Session, special: str) -> int:
    """Return how many tokens a string more makes, 0 where the library does not say."""
    counts = []
    for times in (1, 2) if special else ():
        run = _Run(session, abort=not session.library.layout.per_run)
        text = inputs.prompt_input(session.library.layout, (special * times).encode())
        counts.append(run.computed if run.do(text) else 0)
        session.clear()
    return max(0, counts[1] - counts[0]) if all(counts) and counts else 0


def _finishes(session: Session) -> bool:
    run = _Run(session, abort=True)
    told = run.do(inputs.prompt_input(session.library.layout, b"a"), most=8)
    session.clear()
    return told and run.aborted


def remembered(state: str, what: str) -> Found | None:
    """Return an earlier result from the state folder, ``None`` where there is none."""
    if not state:
        return None
    try:
        return msgspec.convert(_read(Path(state) / FILE).get(what), Found)
    except msgspec.ValidationError:
        return None


def remember(state: str, what: str, found: Found) -> None:
    """Keep a result; best effort: without it the next load probes again."""
    if not state:
        return
    path = Path(state) / FILE
    kept = _read(path)
    kept.pop(what, None)
    kept[what] = asdict(found)
    while len(kept) > _MOST:
        del kept[next(iter(kept))]
    temporary = path.with_suffix(".new")
    try:
        with temporary.open("w") as file:
            file.write(json.dumps(kept, indent=1))
            file.flush()
            os.fsync(file.fileno())  # what dies next may be the whole board
        os.replace(temporary, path)
    except OSError as exc:
        print(f"the result of the probe could not be kept: {exc.strerror}", flush=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}
