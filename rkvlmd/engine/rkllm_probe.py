"""Finds out whether ``librkllmrt.so`` tells two pictures apart when it reuses its cache."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from rkvlmd.engine import rkllm_inputs as inputs
from rkvlmd.engine.rkllm_library import Library
from rkvlmd.engine.rkllm_session import ImageTags, Session, infer_param
from rkvlmd.engine.rkllm_types import State

#: File in the state folder, and how many results it keeps, the newest.
FILE = "rkllm-probes.json"
_MOST = 64
_PROMPT = b"a <image> b"


def key(library: Library, model: str) -> str:
    """Return what a result is for: this library file, its version, and a model's SHA-256."""
    digest = hashlib.sha256()
    with library.path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return f"{library.version}:{digest.hexdigest()}:{model}"


def pictures_told_apart(
    session: Session, *, tokens: int, row: int, width: int, height: int, tags: ImageTags
) -> bool:
    """Run two different synthetic pictures with one text; leaves an empty cache.

    The library tells them apart if the second run computed the rows of its
    picture again. Where it does not say, the careful answer is no.
    """
    computed: list[int] = []
    for seed in (1, 2):
        # Small numbers, as embeddings are; only that they differ matters.
        rows = np.random.default_rng(seed).standard_normal((tokens, row), dtype=np.float32)
        block = inputs.stack(
            [rows * np.float32(0.02)], tokens=tokens, row=row, width=width, height=height, tags=tags
        )
        value = inputs.multimodal_input(session.library.layout, _PROMPT, block)
        found: list[int] = []

        def sink(state: State, result: Any, found: list[int] = found) -> int:
            if state is State.FINISH and result is not None:
                found.append(int(result.perf.prefill_tokens))
            elif state is not State.ERROR:
                session.abort_inside()  # one token is enough
            return 0

        infer = infer_param(session.library, max_new_tokens=1)
        if session.run(value, infer, sink) != 0 or not found:
            break
        computed += found
    session.clear()
    return len(computed) == 2 and computed[1] >= tokens


def remembered(state: str, what: str) -> bool | None:
    """Return an earlier result from the state folder, ``None`` where there is none."""
    if not state:
        return None
    found = _read(Path(state) / FILE).get(what)
    return found if isinstance(found, bool) else None


def remember(state: str, what: str, *, told: bool) -> None:
    """Keep a result; best effort: without it the next load probes again."""
    if not state:
        return
    path = Path(state) / FILE
    kept = _read(path)
    kept.pop(what, None)
    kept[what] = told
    while len(kept) > _MOST:
        del kept[next(iter(kept))]
    temporary = path.with_suffix(".new")
    try:
        temporary.write_text(json.dumps(kept, indent=1))
        os.replace(temporary, path)
    except OSError as exc:
        print(f"the result of the probe could not be kept: {exc.strerror}", flush=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}
