"""The Python packages that run models: rknn-toolkit-lite2 and ONNX Runtime, as folders on disk."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rkvlmd.board.finding import Finding, Needs, Status
from rkvlmd.board.root import Here, Root

# Fact sheet 5.1: wheels for CPython 3.7 to 3.12, aarch64 alone.
LAST_PYTHON = (3, 12)
MACHINE = "aarch64"
#: Most entries of a folder of packages that are looked at.
MAX_PACKAGES = 1 << 14
_INFO = re.compile(r"(.+)-(\d[^-]*)\.dist-info")


@dataclass(frozen=True, slots=True)
class Package:
    """An installed distribution."""

    name: str
    version: str
    folder: str


def package(root: Root, here: Here, name: str) -> Package | None:
    """Return the distribution ``name`` (as its folder has it) that this Python would import."""
    for folder in here.folders:
        for entry in root.names(folder, MAX_PACKAGES):
            match = _INFO.fullmatch(entry)
            if match and re.sub(r"[-.]", "_", match[1]).lower() == name:
                return Package(name, match[2], folder)
    return None


def findings(root: Root, here: Here, needs: Needs) -> list[Finding]:
    """Return the lines about both packages; none of what nobody misses."""
    found = _toolkit(root, here, needs)
    runtime = package(root, here, "onnxruntime")
    facts = {"version": runtime.version if runtime else None}
    if runtime is not None:
        found.append(Finding("onnxruntime", "ok", "onnxruntime", f"{runtime.version}", facts=facts))
    else:
        status: Status = "stop" if "onnx" in needs.engines else "note"
        says = "not installed for this Python; models of the onnx engine need it"
        todo = 'pip install "rkvlmd[cpu]"'
        found.append(Finding("onnxruntime", status, "onnxruntime", says, todo, ("onnx",), facts))
    return found


def _toolkit(root: Root, here: Here, needs: Needs) -> list[Finding]:
    key = what = "rknn-toolkit-lite2"
    have = package(root, here, "rknn_toolkit_lite2")
    facts = {
        "version": have.version if have else None,
        "python": ".".join(map(str, here.python)),
        "machine": here.machine,
    }
    bad = needs.lacking("rknn")
    if have is not None:
        says = f"{have.version} for Python {facts['python']}"
        # Fact sheet 5.1: 2.3.2 imports pkg_resources, which setuptools 81 no longer has.
        old = have.version.startswith(("1.", "2.0", "2.1", "2.2", "2.3"))
        if old and not any(root.exists(f"{folder}/pkg_resources") for folder in here.folders):
            says += "; it imports pkg_resources, which is not there"
            todo = 'pip install "setuptools<81", or a newer rknn-toolkit-lite2'
            return [Finding(key, bad, what, says, todo, ("rknn",), facts)]
        return [Finding(key, "ok", what, says, facts=facts)]
    if bad == "note":
        return []
    says = "not installed for this Python"
    todo = 'pip install "rkvlmd[npu]"'
    if here.machine != MACHINE:
        says += f": there are wheels for {MACHINE} alone, and this is {here.machine}"
        todo = "run .rknn models on a board with a 64-bit system"
    elif here.python > LAST_PYTHON:
        last = ".".join(map(str, LAST_PYTHON))
        says += f": there are no wheels for Python {facts['python']}"
        todo = f"make the virtual environment with Python {last} or older, then {todo}"
    return [Finding(key, bad, what, says, todo, ("rknn",), facts)]
