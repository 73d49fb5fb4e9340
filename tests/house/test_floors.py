"""The floors, the size limit and what each part may import, read from the source."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.tree import PACKAGE, ROOT, imports, python_files

MOST_LINES = 400

FLOORS = {
    "__init__": 0, "errors": 0, "hosts": 0, "live": 0, "messages": 0, "paths": 0, "sections": 0, "settings": 0,
    "board": 1, "models": 1, "wire": 1,
    "actors": 2, "engine": 2, "ctl": 2,
    "front": 3,
    "__main__": 4, "daemon": 4, "demo": 4, "reload": 4, "throwaway": 4,
}  # fmt: skip

#: Floors whose parts may import each other.
BESIDE = (0, 4)

LOOPS = {"trio", "anyio", "asyncio", "outcome"}
HTTP = {"quart", "quart_trio", "hypercorn", "werkzeug", "flask", "h2", "httpx", "requests"}
#: What costs memory and can crash: it belongs into children.
HEAVY = {
    "numpy", "PIL", "tokenizers", "jinja2", "onnxruntime", "rknnlite", "torch", "transformers",
    "onnx", "cv2", "scipy",
}  # fmt: skip
OUTSIDE = {"socket", "ssl", "select", "selectors", "subprocess", "threading", "multiprocessing"}
NEVER = {
    "__init__": LOOPS | HTTP | HEAVY | OUTSIDE,
    "errors": LOOPS | HTTP | HEAVY | OUTSIDE,
    "hosts": LOOPS | HTTP | HEAVY | OUTSIDE,
    "live": LOOPS | HTTP | HEAVY | OUTSIDE,
    "messages": LOOPS | HTTP | HEAVY | OUTSIDE,
    "paths": LOOPS | HTTP | HEAVY | OUTSIDE,
    "sections": LOOPS | HTTP | HEAVY | OUTSIDE,
    "settings": LOOPS | HTTP | HEAVY | OUTSIDE,
    "board": LOOPS | HTTP | HEAVY | OUTSIDE | {"msgspec"},
    "models": LOOPS | HTTP | HEAVY | OUTSIDE,
    "wire": LOOPS | HTTP | HEAVY | OUTSIDE | {"h11"},
    "actors": HTTP | HEAVY | {"anyio", "asyncio", "multiprocessing"},
    "engine": LOOPS | HTTP | {"multiprocessing", "torch", "transformers"},
    "ctl": LOOPS | HTTP | HEAVY | {"multiprocessing", "threading"},
    "front": HEAVY | {"anyio", "asyncio", "multiprocessing", "httpx", "requests"},
    "daemon": HTTP | HEAVY | {"anyio", "asyncio", "multiprocessing"},
    "demo": HTTP | HEAVY | {"anyio", "asyncio", "multiprocessing"},
    "throwaway": LOOPS | HTTP | HEAVY | {"multiprocessing", "threading"},
    "reload": HTTP | HEAVY | {"anyio", "asyncio", "multiprocessing"},
    "__main__": HTTP | HEAVY | {"anyio", "asyncio", "multiprocessing"},
}
MODULES = python_files("rkvlmd")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", python_files("rkvlmd", "tools"), ids=name)
def test_no_module_is_too_long(path: Path) -> None:
    assert len(path.read_bytes().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_go_downwards(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for line, dotted in imports(path):
        top, *rest = dotted.split(".")
        where = f"{name(path)}:{line}: {part} imports {dotted}"
        assert top not in NEVER[part], where
        if top != "rkvlmd":
            continue
        other = rest[0] if rest and rest[0] in FLOORS else "__init__"
        beside = other == part or (FLOORS[other] == FLOORS[part] and FLOORS[part] in BESIDE)
        assert FLOORS[other] < FLOORS[part] or beside, where


@pytest.mark.parametrize("path", [p for p in MODULES if "ctl" in p.parts], ids=name)
def test_ctl_starts_with_the_standard_library(path: Path) -> None:
    for line, dotted in imports(path, at_start=True):
        top, *rest = dotted.split(".")
        if top == "rkvlmd":
            assert rest[0] in {"board", "ctl", "wire", "paths", "__version__"}, (
                f"{name(path)}:{line}"
            )
        else:
            assert top in sys.stdlib_module_names, f"{name(path)}:{line}"


def modules_after(statement: str) -> set[str]:
    """Return the top-level names in ``sys.modules`` of a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    )
    return set(done.stdout.split())


@pytest.mark.process
def test_ctl_loads_nothing_else() -> None:
    before = modules_after("")
    after = modules_after("import rkvlmd.ctl.__main__")
    assert {m for m in after - before if m not in sys.stdlib_module_names} <= {"rkvlmd"}


@pytest.mark.process
@pytest.mark.parametrize("module", ["rkvlmd.daemon", "rkvlmd.__main__"])
def test_the_daemon_loads_nothing_heavy(module: str) -> None:
    assert not modules_after(f"import {module}") & HEAVY


@pytest.mark.process
def test_the_children_load_no_loop() -> None:
    assert not modules_after("import rkvlmd.engine.__main__") & (LOOPS | HTTP)
