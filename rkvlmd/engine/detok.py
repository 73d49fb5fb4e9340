"""Turns tokens into text one by one, and never splits a character."""

from __future__ import annotations

import codecs
import json
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

#: Most tokens held back while the decoder's text ends in U+FFFD: one character is at most four
#: bytes, and a token at least one.
MAX_HELD = 4
REPLACEMENT = "\ufffd"


class Vocabulary:
    """A tokenizer, as far as text comes out of it."""

    def __init__(self, path: Path, shown: Collection[str] = ()) -> None:
        """Read ``tokenizer.json``; the special tokens ``shown`` are no special ones.

        Raises:
          ValueError: it is no tokenizer.

        """
        source = path.read_bytes()
        try:
            self.tokenizer = Tokenizer.from_buffer(source)
        except Exception as exc:  # the bindings raise no narrower class
            raise ValueError(str(exc)) from exc
        tree = json.loads(source)
        self.byte_level = _is_byte_level(tree.get("decoder"))
        added = tree.get("added_tokens", [])
        self.special = frozenset(
            t["id"] for t in added if t.get("special") and t["content"] not in shown
        )
        self._added = {t["id"]: t["content"].encode() for t in added}
        self._bytes: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of a token of a byte-level vocabulary; none for an unknown one."""
        found = self._bytes.get(token)
        if found is None:
            found = self._added.get(token)
            if found is None:
                found = _unmap(self.tokenizer.id_to_token(token) or "")
            self._bytes[token] = found
        return found


class Detokenizer:
    """The text of one answer, token by token; special tokens are left out."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids: list[int] = []
        self._read = 0

    def step(self, token: int) -> str:
        """Return the whole characters that ``token`` completes; may be empty."""
        if token in self._vocabulary.special:
            return ""
        if self._vocabulary.byte_level:
            return self._utf8.decode(self._vocabulary.bytes_of(token))
        return self._step_generic(token)

    def finish(self) -> str:
        """Return U+FFFD if the answer ended inside a character, else nothing."""
        if self._vocabulary.byte_level:
            return self._utf8.decode(b"", final=True)
        rest = self._rest()
        whole = rest.rstrip(REPLACEMENT)
        return whole + REPLACEMENT if whole != rest else rest

    def _step_generic(self, token: int) -> str:
        # Decoders such as SentencePiece's treat the start of a text in a way of their own, so a
        # token is decoded together with the tokens of the last text that came out.
        self._ids.append(token)
        rest = self._rest()
        if not rest or (rest.endswith(REPLACEMENT) and len(self._ids) - self._read <= MAX_HELD):
            return ""
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        return rest

    def _rest(self) -> str:
        decode = self._vocabulary.tokenizer.decode
        # What is special has been left out before.
        before = decode(self._ids[: self._read], skip_special_tokens=False)
        return str(decode(self._ids, skip_special_tokens=False)[len(before) :])


def _is_byte_level(decoder: Any) -> bool:
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "Sequence":
        inner = decoder.get("decoders", [])
        return len(inner) == 1 and _is_byte_level(inner[0])
    return decoder.get("type") == "ByteLevel"


def _unmap(token: str) -> bytes:
    table = _table()
    if any(c not in table for c in token):
        return token.encode()
    return bytes(table[c] for c in token)


@cache
def _table() -> dict[str, int]:
    """Return the byte of each character of a byte-level vocabulary.

    The mapping of GPT-2's ``bytes_to_unicode``: printable bytes are themselves,
    the others follow from U+0100 on.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
