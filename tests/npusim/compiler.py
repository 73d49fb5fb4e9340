"""Finds a C++ compiler and builds the simulator's libraries, each once per content of its sources."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
INCLUDE = HERE / "include"
SOURCES = tuple(sorted((HERE / "src").glob("*.cpp")))
HEADERS = (*sorted(INCLUDE.glob("*.h")), *sorted((HERE / "src").glob("*.h")))
#: What is compiled anew for each version; the rest does not know the layout.
DEPENDENT = {"api", "handle", "version"}
#: Built files are kept here; ``build`` folders are not checked in.
BUILD = HERE / "build"
FLAGS = ("-std=c++17", "-O1", "-g0", "-Wall", "-Wextra", "-Werror", "-fPIC")
#: The versions of ``librkllmrt`` that are simulated, and what chooses the layout of each.
ABIS = {"1.2.1": 121, "1.2.2": 122, "1.2.3": 123, "1.3.0": 130, "1.3.1": 131}


@cache
def compiler() -> tuple[str, ...]:
    """Return the command of a C++ compiler: the system's, else the one of the ``ziglang`` wheel."""
    if named := os.environ.get("CXX"):
        return tuple(named.split())
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return (path,)
    if importlib.util.find_spec("ziglang") is not None:
        return (sys.executable, "-m", "ziglang", "c++")
    raise RuntimeError("no C++ compiler: install one, or the package ziglang")


@cache
def library(abi: str, *, says: str = "") -> Path:
    """Return a simulated ``librkllmrt.so`` of one version; it is built if need be.

    ``says`` is the version that the file shall claim, where that is another one.
    """
    objects = []
    for source in SOURCES:
        flags = ["-c", "-pthread", "-fvisibility=hidden"]
        if source.stem in DEPENDENT:
            flags.append(f"-DNPUSIM_ABI={ABIS[abi]}")
        if source.stem == "version":
            flags.append(f'-DNPUSIM_VERSION="{says or abi}"')
        objects.append(_built(f"{source.stem}.o", (source,), flags))
    name = f"librkllmrt-{abi}" + (f"-says-{says}" if says else "")
    return _built(f"{name}.so", objects, ["-shared", "-pthread"])


def program(name: str, source: str, flags: Sequence[str] = ()) -> Path:
    """Return the program that ``source`` is the text of."""
    BUILD.mkdir(exist_ok=True)
    file = BUILD / f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:16]}.cpp"
    file.write_text(source)
    return _built(name, (file,), list(flags))


def _built(name: str, sources: Sequence[Path], flags: list[str]) -> Path:
    command = [*compiler(), *FLAGS, f"-I{INCLUDE}", *flags]
    content = hashlib.sha256(repr(command).encode())
    for path in (*sources, *HEADERS):
        content.update(path.name.encode() + path.read_bytes())
    stem, dot, suffix = name.rpartition(".")
    named = (stem, f".{suffix}") if dot and suffix in {"o", "so"} else (name, "")
    target = BUILD / f"{named[0]}-{content.hexdigest()[:16]}{named[1]}"
    if not target.exists():
        BUILD.mkdir(exist_ok=True)
        # Another test process may build the same: each into its own file, the last one wins.
        own = BUILD / f"{os.getpid()}-{target.name}"
        subprocess.run([*command, "-o", str(own), *map(str, sources)], check=True, timeout=600)
        own.replace(target)
    return target
