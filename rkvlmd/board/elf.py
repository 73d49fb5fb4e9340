"""Reads what an ELF file is built for and which libraries it needs, without loading it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

#: ``e_machine`` (elf.h) to what ``uname -m`` calls it.
_MACHINES = {3: "i686", 40: "armv7l", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NEEDED, _DT_STRTAB = 1, 5
#: Most program headers and entries of the dynamic section that are read; longest name, bytes.
_MAX_HEADERS, _MAX_ENTRIES, _MAX_NAME = 128, 4096, 256


@dataclass(frozen=True, slots=True)
class Elf:
    """``machine`` as ``uname -m`` has it; ``needed``: file names of libraries, 64-bit files only."""

    machine: str
    needed: tuple[str, ...] = ()


def read(path: Path) -> Elf | None:
    """Return what the file is built for, ``None`` for what is no ELF file or cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
            if len(head) < 20 or head[:4] != b"\x7fELF":
                return None
            order = "<" if head[5] == 1 else ">"
            (number,) = struct.unpack_from(order + "H", head, 18)
            machine = _MACHINES.get(number, f"machine {number}")
            if head[4] != 2 or len(head) < 64:
                return Elf(machine)
            try:
                return Elf(machine, _needed(file, head, order))
            except (struct.error, OverflowError, ValueError):
                return Elf(machine)  # cut short behind its header
    except OSError:
        return None


def _needed(file: BinaryIO, head: bytes, order: str) -> tuple[str, ...]:
    """Return the DT_NEEDED names of a 64-bit file."""
    (offset,) = struct.unpack_from(order + "Q", head, 32)
    size, count = struct.unpack_from(order + "HH", head, 54)
    loads: list[tuple[int, int, int]] = []
    dynamic = b""
    for index in range(min(count, _MAX_HEADERS)):
        file.seek(offset + index * size)
        kind, _, at, address, _, length = struct.unpack(order + "IIQQQQ", file.read(40))
        if kind == _PT_LOAD:
            loads.append((address, at, length))
        elif kind == _PT_DYNAMIC:
            file.seek(at)
            dynamic = file.read(min(length, _MAX_ENTRIES * 16))
    names: list[int] = []
    table = 0
    for tag, value in struct.iter_unpack(order + "qQ", dynamic[: len(dynamic) // 16 * 16]):
        if tag == _DT_NEEDED:
            names.append(value)
        elif tag == _DT_STRTAB:
            table = value
    # The table of names is given by its address in memory.
    start = next((at + table - a for a, at, n in loads if a <= table < a + n), None)
    if start is None:
        return ()
    found = []
    for name in names:
        file.seek(start + name)
        found.append(file.read(_MAX_NAME).partition(b"\0")[0].decode(errors="replace"))
    return tuple(found)
