"""The files of the project, for the tests that read them."""

from __future__ import annotations

import ast
import os
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "rkvlmd"


@cache
def listed() -> tuple[Path, ...]:
    """Return every file of the project: what git knows or would take, else what is there."""
    try:
        names = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        names = list(_walk())
    paths = (ROOT / name for name in sorted(names))
    return tuple(path for path in paths if path.is_file())


def _walk() -> Iterator[str]:
    for folder, below, files in os.walk(ROOT):
        # Caches and virtual environments are none of ours.
        below[:] = [
            name
            for name in below
            if name == ".ci" or (name[0] != "." and name not in {"__pycache__", "build", "dist"})
        ]
        for name in files:
            yield os.path.relpath(os.path.join(folder, name), ROOT)


def python_files(*folders: str) -> list[Path]:
    """Return the Python files below ``folders``, programs without a suffix included."""
    found = []
    for path in listed():
        if path.relative_to(ROOT).parts[0] not in folders:
            continue
        if path.suffix == ".py" or (not path.suffix and b"python" in path.read_bytes()[:64]):
            found.append(path)
    return found


def imports(path: Path, *, at_start: bool = False) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of each import; ``at_start``: only those that run at once.

    ``from a import b`` counts as ``a.b``: ``b`` may be a module.
    """
    for node in _statements(ast.parse(path.read_bytes()), at_start=at_start):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"{path}:{node.lineno}: relative import of a parent"
            base = node.module or ""
            if node.level:
                package = ".".join(path.relative_to(ROOT).parent.parts)
                base = f"{package}.{base}".rstrip(".")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def _statements(tree: ast.AST, *, at_start: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if at_start and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_start and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _statements(node, at_start=at_start)
