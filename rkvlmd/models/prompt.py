"""From a conversation to a prompt: neutralised texts, places of pictures, token spans.

Nothing that a client wrote may act as a special token or as the place of a
picture. Each special string in a client's text is *broken*: one character that
no text may contain goes after its first character, before the template sees
it. What the rendered prompt then holds of unbroken special strings came from
the template alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

from rkvlmd.models.manifest import Tags

# Unicode sets these noncharacters aside for use inside a program (U+FDD0 to U+FDEF); a text
# that is interchanged has none, so dropping them from a client's text loses nothing.
BREAK = "\ufdd0"
PICTURE = "\ufdd1"
#: In a layout: the number of the picture in the conversation, from 0.
NUMBER = "\ufdd2"
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
        content = parts or [{"type": "text", "text": ""}]
        messages.append({"role": turn["role"], "content": content, **_thought(turn, specials)})
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
            **_thought(turn, specials),
        }
        for turn in turns
    ]


def _thought(turn: dict[str, Any], specials: Specials) -> dict[str, str]:
    """Return what templates know as ``reasoning_content``; most of them leave it out."""
    thought = clean(turn.get("thought", ""))
    return {"reasoning_content": specials.neutralise(thought)} if thought else {}


def without_thoughts(turns: Sequence[dict[str, Any]], end: str) -> list[dict[str, Any]]:
    """Return the turns, those of the assistant without what stands before the last ``end``.

    So do the published templates of models that think; here clients' texts are
    neutralised before a template could find the tag.
    """
    return [
        {**turn, "parts": _after(_joined(turn), end)} if turn["role"] == "assistant" else turn
        for turn in turns
    ]


def _after(parts: Sequence[str | int], end: str) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, int):
            kept.append({"picture": part})
            continue
        _, found, text = part.rpartition(end)
        if found:
            kept, text = [other for other in kept if "picture" in other], text.lstrip("\n")
        kept.append({"text": text})
    return kept


def told(turns: Sequence[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Return the turns with ``text`` at the beginning of the system message."""
    if turns and turns[0]["role"] == "system":
        first = {**turns[0], "parts": [{"text": f"{text}\n\n"}, *turns[0]["parts"]]}
        return [first, *turns[1:]]
    return [{"role": "system", "parts": [{"text": text}]}, *turns]


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


def place_pictures(
    rendered: str,
    place: str,
    tags: Tags | None,
    layouts: Sequence[Sequence[str | int]],
    videos: Collection[int] = (),
    film: str = "",
) -> str:
    """Put what stands for each picture at its place, the content of the tags for each view.

    ``place`` is the string that stands there now: the manifest's marker, or
    ``PICTURE``. ``layouts`` are in the order of the places; ``videos`` numbers
    those with ``film`` for each view in place of the content.

    Raises:
      PromptError: there are more or fewer places than pictures.

    """
    pieces = _at_places(rendered, place, len(layouts))
    if tags is None:
        if layouts:
            raise PromptError("the manifest has no tags for a picture")
        return rendered
    built = [pieces[0]]
    for number, (layout, text) in enumerate(zip(layouts, pieces[1:], strict=True)):
        content = film if number in videos else tags.content
        built += [content if isinstance(i, int) else _numbered(i, number) for i in layout]
        built.append(text)
    return "".join(built)


def mark_pictures(
    rendered: str,
    place: str,
    tags: Tags | None,
    layouts: Sequence[Sequence[str | int]],
    videos: Collection[int] = (),
    *,
    shown: bool = True,
) -> str:
    """Put ``<image>`` at each place, for librkllmrt; arguments as for ``place_pictures``.

    The library itself puts the start and end of the tags around each ``<image>``.
    ``videos`` numbers the places that get ``<video>``, once for all frames.
    ``shown`` is false where the library never sees this text, but tokens' rows:
    then a layout may hold any strings.

    Raises:
      PromptError: there are not as many places as pictures, the library
        cannot put tags where this layout has them, or the template has
        written something else that the library would expand.

    """
    pieces = _at_places(rendered, place, len(layouts))
    built, views = [pieces[0]], 0
    for number, (layout, text) in enumerate(zip(layouts, pieces[1:], strict=True)):
        if number in videos:
            built += [RKLLM_PLACES[1], text]
            continue
        views += sum(isinstance(item, int) for item in layout)
        line = _library_line(layout, tags) if shown else _unseen_line(layout)
        built += [_numbered(line, number), text]
    marked = "".join(built)
    for mark, wanted in zip(RKLLM_PLACES, (views, len(videos), 0), strict=True):
        if marked.count(mark) != wanted:
            raise PromptError(f"the template wrote {mark} where no picture is")
    return marked


def _library_line(layout: Sequence[str | int], tags: Tags | None) -> str:
    """Return a layout with ``<image>`` for each view and the tags around it."""
    start, end = (tags.start, tags.end) if tags is not None else ("", "")
    line = "".join(PICTURE if isinstance(item, int) else item for item in layout)
    whole = start + PICTURE + end
    if line.count(whole) != line.count(PICTURE):
        raise PromptError("the library cannot put a picture's tags where this layout has them")
    return line.replace(whole, RKLLM_PLACES[0])


def _unseen_line(layout: Sequence[str | int]) -> str:
    """Return a layout with ``<image>`` for each view, and nowhere else."""
    return "".join(
        RKLLM_PLACES[0] if isinstance(item, int) else for_rkllm(item, ()) for item in layout
    )


def _at_places(rendered: str, place: str, pictures: int) -> list[str]:
    pieces = rendered.split(place)
    if len(pieces) - 1 != pictures:
        raise PromptError(f"the template made {len(pieces) - 1} places for {pictures} pictures")
    return pieces


def _numbered(text: str, number: int) -> str:
    return text.replace(NUMBER, str(number))


def expand(
    ids: Sequence[int], content: int, places: Sequence[tuple[int, int, int]], film: int = -1
) -> tuple[list[int], list[tuple[int, int, int, int]]]:
    """Repeat the content token at each place as often as the view there has image tokens.

    ``places`` are (picture, view, image tokens) in the order of the prompt.
    ``film`` is the content token of videos, -1 for none: ids are not negative.
    Returns the token ids and the spans as (start, count, picture, view).

    Raises:
      PromptError: the content token is there more or less often than views.

    """
    found = sum(1 for token in ids if token in (content, film)) if places else 0
    if found != len(places):
        raise PromptError(f"{found} image tokens for {len(places)} places of pictures")
    expanded: list[int] = []
    spans: list[tuple[int, int, int, int]] = []
    for token in ids:
        if places and token in (content, film):
            picture, view, count = places[len(spans)]
            spans.append((len(expanded), count, picture, view))
            expanded += [token] * count
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
