"""What ``librkllmrt.so`` prints at a load: copied while it goes to standard error, then read."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

#: Most bytes of a load's output that are read; ``RKLLM_LOG_LEVEL=2`` prints some thousand.
_MOST = 1 << 20
_DRAIN_SECONDS = 2.0

# As printed by 1.2 and 1.3, for example:
#   I rkllm: rkllm-runtime version: 1.3.0, rknpu driver version: 0.9.8, platform: RK3588
#   I rkllm: rkllm-toolkit version: 1.2.3, max_context_limit: 4096, npu_core_num: 3,
#     target_platform: RK3588, model_dtype: W8A8                              (on one line)
_FIELDS = {
    "runtime": r"rkllm-runtime version: ([\w.]+)",
    "driver": r"rknpu driver version: v?([\w.]+)",
    "platform": r"(?<!target_)platform: (\w+)",
    "toolkit": r"rkllm-toolkit version: ([\w.]+)",
    "context_limit": r"max_context_limit: (\d+)",
    "npu_cores": r"npu_core_num: (\d+)",
    "target": r"target_platform: (\w+)",
    "dtype": r"model_dtype: (\w+)",
}
_NUMBERS = {"context_limit", "npu_cores"}
_ERRORS = re.compile(r"^\s*E (?:rkllm|RKNN): (.*)$", re.MULTILINE)


@dataclass(slots=True)
class Said:
    """The text of a load, and what could be read from it."""

    text: str = ""
    fields: dict[str, str | int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


def read(text: str) -> Said:
    """Return what a load's output says; what is not there is left out."""
    found: dict[str, str | int] = {}
    for name, pattern in _FIELDS.items():
        if match := re.search(pattern, text):
            found[name] = int(match[1]) if name in _NUMBERS else match[1]
    return Said(text, found, _ERRORS.findall(text))


@contextmanager
def copied() -> Iterator[Said]:
    """Copy what any code of this process prints; the result is filled in at the end.

    A process of its own does the copying: if the library ends this one, its
    last words have left all the same. Where it cannot be started, nothing is
    copied.
    """
    said = Said()
    copy = os.memfd_create("rkllm-log", os.MFD_CLOEXEC)
    ours, theirs = os.pipe()
    try:
        tee = subprocess.Popen(
            ["tee", f"/proc/self/fd/{copy}"], stdin=ours, stdout=2, pass_fds=[copy]
        )
    except OSError:
        os.close(copy)
        os.close(ours)
        os.close(theirs)
        yield said
        return
    os.close(ours)
    _flush()
    saved = {number: os.dup(number) for number in (1, 2)}
    try:
        for number in saved:
            os.dup2(theirs, number)
        os.close(theirs)
        yield said
    finally:
        _flush()
        for number, before in saved.items():
            os.dup2(before, number)
            os.close(before)
        try:
            tee.wait(_DRAIN_SECONDS)
        except subprocess.TimeoutExpired:
            # Something that the library started holds the pipe; what is there is enough.
            tee.kill()
            tee.wait()
        text = os.pread(copy, _MOST, 0).decode(errors="replace")
        os.close(copy)
        whole = read(text)
        said.text, said.fields, said.errors = whole.text, whole.fields, whole.errors


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    # What C code has printed to a pipe waits in a buffer of the C library.
    ctypes.CDLL(None).fflush(None)
