"""The simulated NPU as the encoder sees it: the same file, trace and faults as the C++ part.

``tests/npusim/README.md`` describes the environment's variables.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

SIGNALS = {
    "segv": signal.SIGSEGV, "bus": signal.SIGBUS, "ill": signal.SIGILL, "abrt": signal.SIGABRT,
}  # fmt: skip

#: Where the NPU's file keeps when the last work ended.
_LAST_END = 64
_visits: dict[str, int] = {}


def setting(name: str, otherwise: str) -> str:
    return os.environ.get(name) or otherwise


def trace(event: str, **fields: Any) -> None:
    if path := setting("NPUSIM_TRACE", ""):
        line = json.dumps({"t": time.monotonic_ns(), "pid": os.getpid(), "ev": event, **fields})
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(fd, line.encode() + b"\n")
        finally:
            os.close(fd)


def misuse(section: str, text: str) -> NoReturn:
    trace("misuse", section=section, text=text)
    print(f"npusim: misuse (fact {section}): {text}", file=sys.stderr, flush=True)
    os.abort()


def work(domain: int, milliseconds: float, what: str, spent: int = 0) -> bool:
    """Keep the NPU busy; see ``src/npu.cpp``, whose rules these are.

    ``spent`` nanoseconds of it went into what the stand-in itself had to do.
    """
    fd = -1
    if path := setting("NPUSIM_NPU", ""):
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _take(fd, domain):
            os.close(fd)
            return False
    asked = int(milliseconds * 1e6)
    now = time.monotonic_ns()
    begin = now - min(max(spent, 0), asked)
    if fd >= 0:
        begin = min(now, max(begin, _last_end(fd)))
    end = begin + asked
    while (now := time.monotonic_ns()) < end:
        time.sleep((end - now) / 1e9)
    if fd >= 0:
        os.pwrite(fd, b"%-20d\n" % now, _LAST_END)
        os.close(fd)
    trace("npu", what=what, domain=domain, begin=begin, end=now)
    return True


def _last_end(fd: int) -> int:
    return int(os.pread(fd, 31, _LAST_END).strip(b"\0 \n") or b"0")


def _active(fd: int) -> int:
    return int(os.pread(fd, 31, 0).strip(b"\0 \n") or b"0")


def _take(fd: int, domain: int) -> bool:
    patience = float(setting("NPUSIM_SWITCH_LIMIT_MS", "6000"))
    since = 0
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            at = time.monotonic_ns()
            if _active(fd) == domain:
                since = 0
            elif since == 0:
                since = at
            elif at - since > patience * 1e6:
                # Fact 5.4a: who wants another domain waits at most 6000 ms.
                print(
                    "E RKNN: switch iommu domain time out, failed to switch iommu domain,"
                    f" id: {domain}",
                    file=sys.stderr,
                )
                trace("switch_timeout", domain=domain)
                return False
            time.sleep(0.0001)
    before = _active(fd)
    if before != domain:
        os.pwrite(fd, b"%-12d\n" % domain, 0)
        trace("switch", **{"from": before, "to": domain})
        time.sleep(float(setting("NPUSIM_SWITCH_MS", "0")) / 1000)
    return True


def _count(name: str) -> int:
    path = setting("NPUSIM_FAULT_FILE", "")
    if not path:
        _visits[name] = _visits.get(name, 0) + 1
        return _visits[name] - 1
    fd = os.open(f"{path}.{name}", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        before = int(os.pread(fd, 31, 0) or b"0")
        os.pwrite(fd, str(before + 1).encode(), 0)
        return before
    finally:
        os.close(fd)


def fault(place: str) -> str:
    """Do the fault that is due at a place, or return its kind; see ``src/faults.cpp``."""
    for index, entry in enumerate(setting("NPUSIM_FAULT", "").split(";")):
        kind, _, rest = entry.partition("@")
        where, *options = rest.split(":")
        if where != place:
            continue
        wanted = dict(option.split("=", 1) for option in options)
        name = f"{index}.{kind}.{where}"
        every, skip = int(wanted.get("every", 0)), int(wanted.get("skip", 0))
        if every > 0 or skip > 0:
            visit = _count(f"{name}.visits") + 1
            if visit <= skip or (every > 0 and visit % every != 0):
                continue
        if _count(name) >= int(wanted.get("times", 1 << 30 if every > 0 else 1)):
            continue
        trace("fault", kind=kind, place=place)
        if number := SIGNALS.get(kind):
            # As it is: this is no main thread, which alone may change it.
            os.kill(os.getpid(), number)
        if kind == "hang":
            while True:
                time.sleep(1000)
        if kind == "wait":
            while not os.path.exists(setting("NPUSIM_GO", "")):
                time.sleep(0.0005)
            continue
        return kind
    return ""


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def read_file(path: str) -> bytes | None:
    try:
        return Path(path).read_bytes()
    except OSError:
        return None
