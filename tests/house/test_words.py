"""What must not stand in any file of the project."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.house.tree import ROOT, listed

BINARY = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".onnx", ".ttf", ".gz", ".npz"}
# Put together here, so that this file does not hold them.
MARKS = re.compile(rb"\b(" + b"|".join([b"TO" + b"DO", b"FIX" + b"ME", b"XX" + b"X"]) + rb")\b")
# Folders of one machine; a person's home is written ~ or $HOME.
PLACES = re.compile(rb"(?<![\w.~>-])/(work|root|home/[a-z]\w*|Users/\w+)/")
CONFLICT = re.compile(rb"^(<<<<<<<|>>>>>>>) ", re.MULTILINE)


@pytest.mark.parametrize("path", listed(), ids=lambda p: str(p.relative_to(ROOT)))
def test_words(path: Path) -> None:
    if path.suffix in BINARY or path.name == "tokenizer.json":
        return
    data = path.read_bytes()
    for pattern in (MARKS, PLACES, CONFLICT):
        if found := pattern.search(data):
            line = data.count(b"\n", 0, found.start()) + 1
            pytest.fail(f"{path.relative_to(ROOT)}:{line}: {found[0].decode()}")
