"""Where ``librkllmrt.so`` and ``librknnrt.so`` are, and which versions, without loading them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from rkvlmd.board import elf
from rkvlmd.board.finding import Finding, Needs
from rkvlmd.board.root import Here, Root

_CHUNK = 1 << 20
#: No version string is longer, bytes; so much of a chunk is looked at again with the next one.
_OVERLAP = 128
#: By how much a match may grow with more bytes behind it, at most.
_LONGER = 16


@dataclass(frozen=True, slots=True)
class Library:
    """``folders``: where it is looked for, in order; ``also``: where else copies lie about."""

    name: str
    engine: str
    pattern: re.Pattern[bytes]
    folders: tuple[str, ...]
    also: tuple[str, ...] = ()


_COMMON = (
    "/usr/lib",
    "/usr/lib64",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/local/lib",
    "/usr/local/lib/aarch64-linux-gnu",
)
# Fact sheet 1.6: "RKLLM SDK (version: 1.2.0 | target: Linux ...", betas "1.2.1b1"; very old files
# say "rknn llm lib version: ". Found by the engine after npu.library and LD_LIBRARY_PATH.
RKLLM = Library(
    "librkllmrt.so",
    "rkllm",
    re.compile(
        rb"(?:RKLLM SDK \(version:|rknn llm lib version:)\s{0,8}"
        rb"(\d{1,4}\.\d{1,4}\.\d{1,4}(?:b\d{1,3})?)"
    ),
    _COMMON,
    ("/lib", "/usr/local/lib64", "/opt/lib"),
)
# Fact sheet 1.6: "librknnrt version: 2.3.2 (429f97ae6b@...". Fact sheet 5.1: rknn-toolkit-lite2
# opens fixed paths and does not look at LD_LIBRARY_PATH.
RKNN = Library(
    "librknnrt.so",
    "rknn",
    re.compile(rb"librknnrt version:\s{0,8}(\d{1,4}\.\d{1,4}\.\d{1,4}(?:b\d{1,3})?)"),
    ("/usr/lib", "/usr/lib64"),
    ("/lib", *_COMMON[2:], "/usr/local/lib64", "/opt/lib"),
)
#: What counts in a folder that ``npu.library`` names.
FOLDER_FILES = "librkllmrt*.so*"
#: The versions of librkllmrt.so whose memory layout is known (fact sheet 1.3).
RKLLM_VERSIONS = ("1.2.1", "1.2.2", "1.2.3", "1.3.0", "1.3.1")


def versions_of(path: Path, library: Library = RKLLM) -> set[str]:
    """Return every version that the bytes of a file say, read a mebibyte at a time.

    Raises:
      OSError: it cannot be read.

    """
    found: set[str] = set()
    kept = b""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            window = kept + chunk
            # What ends near the window's end may go on in the next chunk ("1.2.1" of "1.2.1b1").
            found |= {
                match[1].decode()
                for match in library.pattern.finditer(window)
                if match.end() < len(window) - _LONGER
            }
            kept = window[-_OVERLAP:]
    found |= {match[1].decode() for match in library.pattern.finditer(kept)}
    return found


def version_of(path: Path, library: Library = RKLLM) -> str | None:
    """Return the version of a library file, ``None`` where it says none or several, or is unreadable."""
    try:
        found = versions_of(path, library)
    except OSError:
        return None
    return found.pop() if len(found) == 1 else None


@dataclass(frozen=True, slots=True)
class Copy:
    """One file; ``machine`` is ``None`` for what is no ELF file, ``used``: the engine takes it.

    ``offered``: it is one of the folder that ``npu.library`` names, from which
    the engine takes the first whose version the model works with.
    """

    path: str
    version: str | None
    machine: str | None
    used: bool
    missing: tuple[str, ...] = ()
    offered: bool = False


def copies(root: Root, library: Library, here: Here, setting: str = "") -> list[Copy]:
    """Return every copy that lies where libraries lie, the one in use first."""
    searched = library.folders
    if library is RKLLM:
        searched = (*here.library_path, *searched)
    paths = [f"{folder}/{library.name}" for folder in searched]
    first = [setting] if setting else paths
    folder = bool(setting) and root.real(setting).is_dir()
    if folder:
        # The order of the engine: the last name first.
        names = [n for n in reversed(root.names(setting)) if fnmatch(n, FOLDER_FILES)]
        first = [f"{setting.rstrip('/')}/{name}" for name in names]
    others = [*(paths if setting else ()), *(f"{folder}/{library.name}" for folder in library.also)]
    found: list[Copy] = []
    seen: set[str] = set()
    for path in (*first, *others):
        real = root.real(path)
        # /lib is a link to /usr/lib on most systems.
        key = os.path.realpath(real) if root.live else str(real)
        if key in seen or not real.is_file():
            continue
        seen.add(key)
        # An existing npu.library is used, and nothing else; else the first of the search.
        used = path in first and not any(copy.used for copy in found)
        offered = folder and path in first
        found.append(_copy(root, library, here, path, real, used=used, offered=offered))
    return found


def _copy(
    root: Root, library: Library, here: Here, path: str, real: Path, *, used: bool, offered: bool
) -> Copy:
    head = elf.read(real)
    folders = (
        os.path.dirname(path), "/lib", "/lib64", f"/lib/{here.machine}-linux-gnu",
        f"/usr/lib/{here.machine}-linux-gnu", "/usr/local/lib", "/usr/lib", "/usr/lib64",
        *here.library_path,
    )  # fmt: skip
    needed = head.needed if head is not None else ()
    missing = [n for n in needed if not any(root.real(f"{f}/{n}").exists() for f in folders)]
    version = version_of(real, library)
    machine = head.machine if head else None
    return Copy(path, version, machine, used, tuple(missing), offered)


def offered(found: list[Copy]) -> tuple[str, ...]:
    """Return the versions of which the engine takes the first that a model works with."""
    copies = [c for c in found if c.offered] or [c for c in found if c.used]
    return tuple(c.version for c in copies if c.version is not None)


def in_use(found: list[Copy]) -> Copy | None:
    """Return the copy that the engine takes."""
    return next((copy for copy in found if copy.used), None)


def findings(
    library: Library,
    found: list[Copy],
    here: Here,
    needs: Needs,
    setting: str = "",
    layout: str = "",
) -> list[Finding]:
    """Return the lines about one library; none where nobody misses it."""
    used = in_use(found)
    key = library.name.removesuffix(".so")
    bad = needs.lacking(library.engine)
    engines = (library.engine,)
    if used is None:
        if bad == "note" and not found:
            return []
        says, todo = _absent(library, found, setting)
        return [Finding(key, bad, library.name, says, todo, engines, _facts(None, found))]
    lines = []
    # The engine looks at each file of a folder until it has one, and stops at what is wrong.
    for copy in [c for c in found if c.offered] or [used]:
        says = f"{copy.version or 'of an unknown version'} in {copy.path}"
        facts = _facts(copy, found)
        if unfit := _unfit(library, copy, here, layout):
            says = f"{says}; {unfit[0]}"
            lines.append(Finding(key, bad, library.name, says, unfit[1], engines, facts))
        else:
            lines.append(Finding(key, "ok", library.name, says, facts=facts))
    others = [copy for copy in found if not copy.offered and copy.version != used.version]
    if others:
        said = ", ".join(f"{copy.version or 'unknown'} in {copy.path}" for copy in others)
        todo = "keep one version, so that every program uses the same"
        lines.append(Finding(f"{key}.copies", "warn", "another copy", f"{said}", todo))
    if used.missing:
        # Fact sheet 1.6: on some images librkllmrt.so needs libomp.so.
        says = f"{library.name} needs {', '.join(used.missing)}, which was not found"
        todo = "install it, or put it beside the library"
        lines.append(Finding(f"{key}.needs", "warn", "needed library", says, todo))
    return lines


def _facts(copy: Copy | None, found: list[Copy]) -> dict[str, object]:
    return {
        "path": copy.path if copy else None,
        "version": copy.version if copy else None,
        "machine": copy.machine if copy else None,
        "copies": [{"path": c.path, "version": c.version, "machine": c.machine} for c in found],
    }


def _absent(library: Library, found: list[Copy], setting: str) -> tuple[str, str]:
    """Return what to say of a library that is not where it is looked for."""
    if setting:
        says = f"npu.library: there is no file {setting}, and no folder with {FOLDER_FILES}"
        return says, "correct npu.library"
    if found and library is RKNN:
        # Fact sheet 5.1 and 7: "Can not find dynamic library".
        where = found[0].path
        says = f"in {where}, where rknn-toolkit-lite2 does not look"
        return says, f"sudo ln -s {where} /usr/lib/{library.name}"
    todo = f"copy {library.name} for aarch64 to /usr/lib"
    if library is RKLLM:
        todo += ", or set npu.library"
    return "not found", todo


def _unfit(library: Library, used: Copy, here: Here, layout: str) -> tuple[str, str] | None:
    """Return why a copy cannot be used, and what to do; ``None`` when it can."""
    if used.machine is None:
        return "it is no ELF library, or cut short", "copy it again"
    if used.machine != here.machine:
        says = f"it is built for {used.machine}, but this Python for {here.machine}"
        return says, f"take the file for {here.machine}"
    if library is not RKLLM:
        return None
    known = ", ".join(RKLLM_VERSIONS)
    if used.version is None:
        return "it does not say one version of the RKLLM runtime", f"take one of {known}"
    if layout and layout not in RKLLM_VERSIONS:
        return f"npu.layout is none of {known}", "correct npu.layout, or remove it"
    if not layout and used.version not in RKLLM_VERSIONS:
        return f"supported are {known}", "take one of them, or set npu.layout"
    return None
