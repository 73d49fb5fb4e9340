"""Breaks one promise after the other in a copy of the tree and looks whether a test notices."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

from tools.promises.table import ALL, Break

ROOT = Path(__file__).resolve().parents[2]
#: What a copy needs to run the tests.
PARTS = ("rkvlmd", "tests", "tools", "etc", "pyproject.toml", "README.md", "LICENSE")
#: Longest time for the tests of one promise, seconds; a hang is noticed, too.
LIMIT = 300.0
#: What pytest says when tests ran and some failed.
FAILED = 1

Outcome = Literal["caught", "SURVIVED", "no longer applies", "tests could not run"]


def copy(into: Path) -> Path:
    """Copy what the tests need, without what they built."""
    leave_out = shutil.ignore_patterns("__pycache__", "build", "checkpoints")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, into / part, ignore=leave_out)
        else:
            shutil.copy(source, into / part)
    return into


def broken(text: str, change: Break) -> str | None:
    """Return a file's text with the promise broken; ``None`` unless ``old`` stands in it once."""
    return text.replace(change.old, change.new) if text.count(change.old) == 1 else None


def tests(tree: Path, change: Break) -> int:
    """Run the tests of one promise; return pytest's exit status, that of a failure after a hang."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        *change.tests.split(),
        "-qx",
        "-p",
        "no:cacheprovider",
    ]
    where = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        return subprocess.run(
            command, cwd=tree, env=where, capture_output=True, timeout=LIMIT, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        return FAILED


def attempt(tree: Path, change: Break) -> Outcome:
    """Break one promise in a copy, run its tests, and put the file back."""
    file = tree / "rkvlmd" / change.file
    before = file.read_text()
    text = broken(before, change)
    if text is None:
        return "no longer applies"
    file.write_text(text)
    try:
        status = tests(tree, change)
    finally:
        file.write_text(before)
    if status == 0:
        return "SURVIVED"
    return "caught" if status == FAILED else "tests could not run"


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each promise; return 0 when each break was caught."""
    parser = argparse.ArgumentParser(prog="break_promises", description=__doc__)
    parser.add_argument("--processes", type=int, default=2, help="how many at one time (2)")
    parser.add_argument("--only", default="", help="promises whose text or file holds this")
    options = parser.parse_args(argv)
    chosen = [c for c in ALL if options.only in c.promise or options.only in c.file]
    with tempfile.TemporaryDirectory(prefix="rkvlmd-promises-") as folder:
        trees: SimpleQueue[Path] = SimpleQueue()
        for number in range(options.processes):
            tree = Path(folder) / str(number)
            tree.mkdir()
            trees.put(copy(tree))

        def one(change: Break) -> Outcome:
            tree = trees.get()
            try:
                return attempt(tree, change)
            finally:
                trees.put(tree)

        bad = 0
        with ThreadPoolExecutor(options.processes) as pool:
            for change, outcome in zip(chosen, pool.map(one, chosen), strict=True):
                bad += outcome != "caught"
                print(f"{outcome:20} {change.promise} ({change.file})", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} broken promises were caught")
    return 1 if bad or not chosen else 0
