"""What the clients of a load ask: kinds of work, each a script of requests for one client."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from . import photos
from .chatload import Answer, Request

#: One client's script: yields a request, is sent its answer.
Script = Generator[Request, Answer, None]


@dataclass(slots=True)
class Shape:
    """What all requests of a load have in common.

    ``size``: pixels of the pictures; ``tokens``: longest answer; ``words``: of
    a text prompt; ``turns``: of a conversation; ``leave``: share of requests
    whose client leaves, within ``leave_within`` seconds; ``deadline``: seconds
    that each request gives itself, 0 for none.
    """

    size: tuple[int, int] = photos.SMALL
    tokens: int = 32
    words: int = 40
    turns: int = 4
    leave: float = 0.0
    leave_within: float = 2.0
    deadline: float = 0.0
    seed: int = 1


class Work:
    """Makes the scripts of a kind of work; the same seed gives the same requests.

    ``first`` is the number of its first picture or prompt: another load on the
    same server begins above those that its caches know.
    """

    def __init__(self, kind: str, shape: Shape | None = None, first: int = 1) -> None:
        self.kind = kind
        self.shape = shape or Shape()
        self._rng = random.Random(self.shape.seed)
        self._numbers = itertools.count(first)
        self._make = KINDS[kind]

    def script(self, client: int) -> Script:
        """Return the script of one visit of a client."""
        return self._make(self, client)

    def request(self, client: int, kind: str, messages: list[dict[str, Any]]) -> Request:
        """Return one request, with the deadline and the leaving of this load."""
        shape = self.shape
        body: dict[str, Any] = {
            "messages": messages, "max_tokens": shape.tokens, "temperature": 0
        }  # fmt: skip
        if shape.deadline:
            body["timeout"] = shape.deadline
        leaves = self._rng.random() < shape.leave
        leave = self._rng.uniform(0, shape.leave_within) if leaves else None
        return Request(body, kind, client, leave=leave)

    def text(self) -> str:
        """Return a prompt that begins as no other does."""
        words = [f"{next(self._numbers)}:"]
        words += self._rng.choices(("sun", "tree", "house", "river", "stone"), k=self.shape.words)
        return " ".join(words)

    def number(self) -> int:
        """Return the number of a picture that was not sent yet."""
        return next(self._numbers)

    def choose(self, names: tuple[str, ...]) -> str:
        """Return one of the names."""
        return self._rng.choice(names)


def turn(text: str, *numbers: int, size: tuple[int, int]) -> dict[str, Any]:
    """Return a user's message with pictures before its text."""
    if not numbers:
        return {"role": "user", "content": text}
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": photos.photo(number, *size)}}
        for number in numbers
    ]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _text(work: Work, client: int) -> Script:
    yield work.request(client, "text", [turn(work.text(), size=work.shape.size)])


def _fresh(work: Work, client: int) -> Script:
    said = turn("Describe this picture.", work.number(), size=work.shape.size)
    yield work.request(client, "fresh", [said])


def _same(work: Work, client: int) -> Script:
    yield work.request(client, "same", [turn(work.text(), 0, size=work.shape.size)])


def _two(work: Work, client: int) -> Script:
    numbers = (work.number(), work.number())
    said = turn("What is different?", *numbers, size=work.shape.size)
    yield work.request(client, "two", [said])


def _conversation(work: Work, client: int) -> Script:
    messages = [turn("What is in this picture?", work.number(), size=work.shape.size)]
    for number in range(work.shape.turns):
        answer = yield work.request(client, f"turn {number + 1}", list(messages))
        if not answer.good:
            return
        messages.append({"role": "assistant", "content": answer.text})
        messages.append(turn(f"And what else, {number + 2}?", size=work.shape.size))


def _mixed(work: Work, client: int) -> Script:
    name = work.choose(("text", "fresh", "fresh", "same", "two", "conversation"))
    yield from KINDS[name](work, client)


KINDS: dict[str, Callable[[Work, int], Script]] = {
    "text": _text,
    "fresh": _fresh,
    "same": _same,
    "conversation": _conversation,
    "two": _two,
    "mixed": _mixed,
}
