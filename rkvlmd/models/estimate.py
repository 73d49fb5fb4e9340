"""How many tokens a text may have, where no tokenizer can count them."""

from __future__ import annotations

import re

# What one token of the usual vocabularies holds at least: half a long word, one digit, one
# mark, a run of spaces, one character of any other script.
_PIECES = re.compile(r"[A-Za-z]{1,4}|[0-9]|[^\S\n]+(?=[^\S\n])|\n+|[^\sA-Za-z0-9]")


def most_tokens(text: str) -> int:
    """Return an estimate that is rarely too small: words count one token for four letters."""
    return sum(2 if ord(piece[0]) > 0xFFFF else 1 for piece in _PIECES.findall(text))
