"""Names for the beginnings of prompts, so that the daemon and a decoder speak of the same one.

A prompt is cut into blocks; the name of the n-th block stands for everything up to its end. So
two prompts share their first names as far as they share their beginning, and a name that one side
knows says that everything before it is the same too.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Protocol

#: Bytes of a block: 64 tokens of four bytes, or as many bytes of text.
BLOCK = 256
#: Bytes of text that stand for one token of a picture.
TOKEN_BYTES = 4
#: What stands at a picture's place in a prompt that is text.
IMAGE = "<image>"

#: The names of all whole blocks of a prompt, in order: 16 hexadecimal digits each.
Chain = tuple[str, ...]


class Span(Protocol):
    """As ``wire.child.Span``."""

    @property
    def start(self) -> int: ...

    @property
    def count(self) -> int: ...

    @property
    def key(self) -> str: ...


def of_tokens(tokens: Sequence[int], spans: Iterable[Span], seed: str = "") -> Chain:
    """Return the chain of a prompt in tokens; ``seed`` names what else must be the same.

    A picture counts by its key: its tokens are all alike.
    """
    marks = [
        (span.start * TOKEN_BYTES, (span.start + span.count) * TOKEN_BYTES, span.key)
        for span in spans
    ]
    return _chain(array("I", tokens).tobytes(), marks, seed)


def of_text(prompt: str, spans: Sequence[Span], seed: str = "") -> Chain:
    """Return the chain of a prompt in text with ``<image>`` at each picture's place.

    A picture counts by its key, with the weight of its tokens.
    """
    texts = prompt.split(IMAGE)
    if len(texts) != len(spans) + 1:
        # Other places than those of pictures: then all of them count from the first byte on.
        return _chain(prompt.encode(), [], f"{seed} {[span.key for span in spans]}")
    data = bytearray(texts[0].encode())
    marks = []
    for span, text in zip(spans, texts[1:], strict=True):
        start = len(data)
        data += bytes(span.count * TOKEN_BYTES)
        marks.append((start, len(data), span.key))
        data += text.encode()
    return _chain(bytes(data), marks, seed)


def _chain(data: bytes, marks: Iterable[tuple[int, int, str]], seed: str) -> Chain:
    names = []
    digest = blake2b(seed.encode(), digest_size=8).digest()
    pictures = sorted(marks, reverse=True)
    view = memoryview(data)
    for start in range(0, len(data) - BLOCK + 1, BLOCK):
        block = blake2b(digest, digest_size=8)
        block.update(view[start : start + BLOCK])
        while pictures and pictures[-1][1] <= start:
            pictures.pop()
        for first, end, key in reversed(pictures):
            if first >= start + BLOCK:
                break
            block.update(f"{key} {start - first} {end - first}".encode())
        digest = block.digest()
        names.append(digest.hex())
    return tuple(names)
