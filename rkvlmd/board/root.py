"""Reads files below one root folder, each with a bound; never leaves the folder.

A folder other than ``/`` may be a tree recorded on a board. What files cannot
hold (device nodes, who asks, on which machine) is then in ``recorded.json``::

    {"here": {"user": "pi", "uid": 1000, "gids": [1000, 44], "machine": "aarch64",
              "python": [3, 11], "folders": ["/usr/lib/python3/dist-packages"],
              "library_path": []},
     "nodes": {"/dev/dri/renderD128": {"mode": "0660", "uid": 0, "gid": 105}}}
"""

from __future__ import annotations

import json
import os
import pwd
import stat
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkvlmd.board import elf

RECORD = "recorded.json"
#: Longest text file that is read, bytes, and most names of a folder.
MAX_TEXT = 64 << 10
MAX_NAMES = 1024
#: Most symbolic links on one path, as the kernel has it (path_resolution(7)).
MAX_LINKS = 40


@dataclass(frozen=True, slots=True)
class Here:
    """Who asks, and on which machine; ``folders`` are those of ``sys.path``."""

    user: str
    uid: int
    gids: frozenset[int]
    machine: str
    python: tuple[int, int]
    folders: tuple[str, ...]
    library_path: tuple[str, ...]

    @classmethod
    def now(cls) -> Here:
        """Return this process's own."""
        program = elf.read(Path("/proc/self/exe"))
        given = os.environ.get("LD_LIBRARY_PATH", "")
        return cls(
            user=_name(os.geteuid()),
            uid=os.geteuid(),
            gids=frozenset({os.getegid(), *os.getgroups()}),
            # The program, not the kernel: a 32-bit Python on a 64-bit kernel loads 32-bit libraries.
            machine=program.machine if program is not None else os.uname().machine,
            python=sys.version_info[:2],
            folders=tuple(folder for folder in sys.path if folder.startswith("/")),
            library_path=tuple(folder for folder in given.split(":") if folder),
        )


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


@dataclass(frozen=True, slots=True)
class Node:
    """A device node or what stands in its place; ``mode`` holds the permission bits."""

    path: str
    device: bool
    mode: int
    uid: int
    gid: int

    def opens_for(self, uid: int, gids: frozenset[int]) -> bool:
        """Whether the mode lets a user read and write it (ACLs are not looked at)."""
        if uid == 0:
            return True
        if uid == self.uid:
            return self.mode & 0o600 == 0o600
        if self.gid in gids:
            return self.mode & 0o060 == 0o060
        return self.mode & 0o006 == 0o006


class Root:
    """The files below ``path``; every argument is a path as a program on that machine has it."""

    def __init__(self, path: Path = Path("/"), nodes: dict[str, Node] | None = None) -> None:
        self.path = path
        self.live = path == Path("/")
        self._nodes = nodes or {}

    def real(self, path: str) -> Path:
        """Return where ``path`` lies for us; symbolic links are followed below the root."""
        if self.live:
            return Path(path)
        done: list[str] = []
        parts = deque(path.split("/"))
        links = 0
        while parts:
            part = parts.popleft()
            if part in {"", "."}:
                continue
            if part == "..":
                done = done[:-1]
                continue
            try:
                target = os.readlink(self.path.joinpath(*done, part))
            except OSError:
                done.append(part)
                continue
            links += 1
            if links > MAX_LINKS:
                return self.path / "link-loop"  # is not there, as the kernel would say
            if target.startswith("/"):
                done = []
            parts.extendleft(reversed(target.split("/")))
        return self.path.joinpath(*done)

    def text(self, path: str, most: int = MAX_TEXT) -> str | None:
        """Return the first ``most`` bytes of a file as text, or ``None`` where that cannot be."""
        try:
            # Not blocking: a pipe in the file's place must not hold us up.
            fd = os.open(self.real(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            with open(fd, "rb") as file:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    return None
                return file.read(most).decode(errors="replace")
        except OSError:
            return None

    def word(self, path: str) -> str:
        """Return a one-line file without its line feed; empty where there is none."""
        return (self.text(path, 4096) or "").strip("\0 \n")

    def number(self, path: str) -> int | None:
        """Return a file that holds one whole number."""
        word = self.word(path)
        return int(word) if word.lstrip("-").isdecimal() and len(word) < 20 else None

    def exists(self, path: str) -> bool:
        """Whether something is there, behind the links."""
        return path in self._nodes or os.path.lexists(self.real(path))

    def names(self, folder: str, most: int = MAX_NAMES) -> list[str]:
        """Return what is in a folder, in order of names, at most ``most``."""
        found = set(map(os.path.basename, self._below(folder)))
        try:
            with os.scandir(self.real(folder)) as entries:
                for entry in entries:
                    found.add(entry.name)
                    if len(found) >= most:
                        break
        except OSError:
            pass
        return sorted(found)

    def _below(self, folder: str) -> list[str]:
        return [path for path in self._nodes if os.path.dirname(path) == folder.rstrip("/")]

    def link(self, path: str) -> str | None:
        """Return where a symbolic link points, ``None`` where there is no link."""
        parent = self.real(os.path.dirname(path))
        try:
            return os.readlink(parent / os.path.basename(path))
        except OSError:
            return None

    def node(self, path: str) -> Node | None:
        """Return what is at a device's path; links are followed."""
        if path in self._nodes:
            return self._nodes[path]
        try:
            found = self.real(path).stat()
        except OSError:
            return None
        return Node(
            path=path,
            device=stat.S_ISCHR(found.st_mode),
            mode=stat.S_IMODE(found.st_mode),
            uid=found.st_uid,
            gid=found.st_gid,
        )

    def opens(self, node: Node, here: Here) -> bool:
        """Whether the one who asks may read and write a node."""
        if self.live and here.uid == os.geteuid():
            return os.access(node.path, os.R_OK | os.W_OK, effective_ids=True)  # knows ACLs too
        return node.opens_for(here.uid, here.gids)


def open_root(path: Path = Path("/")) -> tuple[Root, Here]:
    """Return the files below ``path``, and who asks: this process, or whom ``recorded.json`` names.

    Raises:
      ValueError: ``recorded.json`` is not what it should be.

    """
    text = None if path == Path("/") else Root(path).text(RECORD, 1 << 20)
    if text is None:
        return Root(path), Here.now()
    try:
        tree = json.loads(text)
        nodes = {where: _node(where, node) for where, node in tree.get("nodes", {}).items()}
        return Root(path, nodes), _here(tree["here"])
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as exc:
        raise ValueError(f"{RECORD}: is not what it should be: {exc!r}") from exc


def _here(tree: dict[str, Any]) -> Here:
    major, minor = tree["python"]
    return Here(
        user=str(tree["user"]),
        uid=int(tree["uid"]),
        gids=frozenset(map(int, tree["gids"])),
        machine=str(tree["machine"]),
        python=(int(major), int(minor)),
        folders=tuple(map(str, tree["folders"])),
        library_path=tuple(map(str, tree["library_path"])),
    )


def _node(path: str, tree: dict[str, Any]) -> Node:
    return Node(path, True, int(tree["mode"], 8), int(tree["uid"]), int(tree["gid"]))
