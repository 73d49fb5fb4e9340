"""From a conversation to a prompt: neutralised texts, places of pictures, token spans.

Nothing that a client wrote may act as a special token or as the place of a
picture. Each special string in a client's text is *broken*: one character that
no text may contain goes after its first character, before the template sees
it. What the rendered prompt then holds of unbroken special strings came from
the template alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from rkvlmd.models.manifest import Tags

# Unicode sets these noncharacters aside for use inside a program (U+FDD0 to U+FDEF); a text
# that is interchanged has none, so dropping them from a client's text loses nothing.
BREAK = "\ufdd0"
PICTURE = "\ufdd1"
_PRIVATE = re.compile("[\ufdd0-\ufdef]")

#: Zero width space: what breaks a string for RKLLM, whose tokenizer we cannot reach.
ZERO_WIDTH = "\u200b"
#: What librkllmrt expands wherever it finds it in a prompt.
RKLLM_PLACES = ("<image>", "<video>", "<audio>")


class PromptError(ValueError):
    """The template or the tokenizer does not do what the manifest says; no client's fault."""


class Piece(NamedTuple):
    """A part of a rendered prompt: plain text, or one unbroken special string."""

    text: str
    special: bool


class Specials:
    """Strings that clients must not be able to write, found longest first."""

    def __init__(self, strings: Iterable[str]) -> None:
        self.strings = frozenset(s for s in strings if s)
        longest = sorted(self.strings, key=lambda s: (-len(s), s))
        # A string of one character cannot be broken inside; the mark after it makes it plain.
        escaped = [re.escape(s) + (f"(?!{BREAK})" if len(s) == 1 else "") for s in longest]
        self._whole = re.compile("|".join(escaped)) if escaped else None
        # Looks ahead, to find those too that begin inside another one.
        self._begin = re.compile(f"(?=(?:{'|'.join(map(re.escape, longest))}))(.)", re.DOTALL)

    def neutralise(self, text: str, mark: str = BREAK) -> str:
        """Return the text with ``mark`` after the first character of each special string."""
        return self._begin.sub(lambda m: m[1] + mark, text) if self.strings else text

    def split(self, rendered: str) -> list[Piece]:
        """Cut a rendered prompt at its unbroken special strings; no piece is empty."""
        pieces, at = [], 0
        for match in self._whole.finditer(rendered) if self._whole else ():
            if match.start() > at:
                pieces.append(Piece(rendered[at : match.start()], special=False))
            pieces.append(Piece(match[0], special=True))
            at = match.end()
        if at < len(rendered):
            pieces.append(Piece(rendered[at:], special=False))
        return pieces

    def count(self, rendered: str) -> int:
        """Return how many unbroken special strings there are."""
        return sum(1 for _ in self._whole.finditer(rendered)) if self._whole else 0


def for_rkllm(text: str, special_strings: Iterable[str]) -> str:
    """Return a client's text in which librkllmrt finds no place and no special token."""
    return Specials([*RKLLM_PLACES, *special_strings]).neutralise(text, ZERO_WIDTH)


def clean(text: str) -> str:
    """Return a client's text without the characters that this module uses itself."""
    return _PRIVATE.sub("", text)


def as_parts(turns: Sequence[dict[str, Any]], specials: Specials) -> list[dict[str, Any]]:
    """Return messages whose content is a list of ``text`` and ``image`` parts.

    Texts are neutralised, after consecutive ones of a message are joined. A
    message without parts gets an empty text.
    """
    messages = []
    for turn in turns:
        parts: list[dict[str, Any]] = []
        for part in _joined(turn):
            if isinstance(part, str):
                parts.append({"type": "text", "text": specials.neutralise(part)})
            else:
                parts.append({"type": "image"})
        messages.append(
            {
                "role": turn["role"],
                "content": parts or [{"type": "text", "text": ""}],
            }
        )
    return messages


def as_strings(turns: Sequence[dict[str, Any]], specials: Specials) -> list[dict[str, Any]]:
    """Return messages whose content is a string, with ``PICTURE`` at each picture's place."""
    return [
        {
            "role": turn["role"],
            "content": "".join(
                specials.neutralise(part) if isinstance(part, str) else PICTURE
                for part in _joined(turn)
            ),
        }
        for turn in turns
    ]


def picture_order(turns: Sequence[dict[str, Any]]) -> list[int]:
    """Return the indices of the pictures as they come in the conversation."""
    return [part["picture"] for turn in turns for part in turn["parts"] if "picture" in part]


def _joined(turn: dict[str, Any]) -> list[str | int]:
    parts: list[str | int] = []
    for part in turn["parts"]:
        if "picture" in part:
            parts.append(part["picture"])
        elif parts and isinstance(parts[-1], str):
            parts[-1] += clean(part["text"])
        else:
            parts.append(clean(part["text"]))
    return parts


def place_pictures(rendered: str, place: str, pictures: int, tags: Tags | None) -> str:
    """Put the tags of a picture, its content once, at each place.

    ``place`` is the string that stands there now: the manifest's marker, or
    ``PICTURE``.

    Raises:
      PromptError: there are more or fewer places than pictures.

    """
    found = rendered.count(place)
    if found != pictures:
        raise PromptError(f"the template made {found} places for {pictures} pictures")
    if tags is None:
        if pictures:
            raise PromptError("the manifest has no tags for a picture")
        return rendered
    return rendered.replace(place, tags.start + tags.content + tags.end)


def mark_pictures(rendered: str, place: str, pictures: int) -> str:
    """Put ``<image>`` at each place, for librkllmrt; ``place`` as in ``place_pictures``.

    Raises:
      PromptError: there are not as many places as pictures, or the template
        has written something else that the library would expand.

    """
    found = rendered.count(place)
    if found != pictures:
        raise PromptError(f"the template made {found} places for {pictures} pictures")
    marked = rendered.replace(place, RKLLM_PLACES[0])
    for mark in RKLLM_PLACES:
        if marked.count(mark) != (pictures if mark == RKLLM_PLACES[0] else 0):
            raise PromptError(f"the template wrote {mark} where no picture is")
    return marked


def expand(
    ids: Sequence[int], content: int, order: Sequence[int], counts: Sequence[int]
) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Repeat each picture's content token as often as it has image tokens.

    ``order`` says which picture is at which place, ``counts`` how many tokens
    each picture has, by index. Returns the token ids and the spans as (start,
    count, picture).

    Raises:
      PromptError: the content token is there more or less often than pictures.

    """
    found = sum(1 for token in ids if token == content) if order else 0
    if found != len(order):
        raise PromptError(f"{found} image tokens for {len(order)} pictures")
    expanded: list[int] = []
    spans: list[tuple[int, int, int]] = []
    for token in ids:
        if order and token == content:
            picture = order[len(spans)]
            spans.append((len(expanded), counts[picture], picture))
            expanded += [content] * counts[picture]
        else:
            expanded.append(token)
    return expanded, spans


def tokenise(
    prompt: str,
    encode: Callable[[str], list[int]],
    encode_plain: Callable[[str], list[int]],
    special_ids: dict[str, int],
) -> list[int]:
    """Return the token ids of a prompt, clients' special strings as plain text.

    ``encode`` knows special tokens, ``encode_plain`` takes them for text.
    ``special_ids`` are the special strings that are one token. A prompt
    without any broken string costs one ``encode`` and gets exactly its ids.
    """
    specials = Specials(special_ids)
    forbidden = frozenset(special_ids.values())
    if BREAK not in prompt:
        ids = encode(prompt)
        # A tokenizer may normalise text before it looks for special tokens, so that some other
        # spelling of one counts too.
        own = specials.count(prompt)
        if sum(1 for token in ids if token in forbidden) == own:
            return ids
    ids = []
    for piece in specials.split(prompt):
        if piece.special:
            ids.append(special_ids[piece.text])
        else:
            ids += _plain(piece.text.replace(BREAK, ""), encode_plain, forbidden)
    return ids


def _plain(text: str, encode_plain: Callable[[str], list[int]], never: frozenset[int]) -> list[int]:
    ids = encode_plain(text)
    if never.isdisjoint(ids):
        return ids
    # A token that the manifest forbids but the tokenizer does not call special. One character
    # at a time finds no string of several; what is still one is dropped.
    return [token for letter in text for token in encode_plain(letter) if token not in never]
