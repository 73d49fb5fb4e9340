"""Tells a model's thoughts from its answer while the text comes in; pure."""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec


class Thinking(msgspec.Struct, frozen=True, kw_only=True):
    """The tags around thoughts. ``opened``: the prompt ends with the first of them."""

    start: str
    end: str
    opened: bool = False


class Said(NamedTuple):
    """What a piece of an answer adds to the thoughts and to the text."""

    thought: str
    text: str


class Divider:
    """Cuts an answer, in pieces of any size, at the end of the thoughts that it begins with.

    An answer begins with thoughts where the prompt has opened them, or where
    its first text is the start tag. What is held back could still become a tag.
    The pieces that come out, joined, are those that went in: the tags, and the
    white space up to the answer, are part of the thoughts.
    """

    def __init__(self, tags: Thinking) -> None:
        self._tags = tags
        self._held = ""
        self.part: Literal["start", "thoughts", "gap", "answer"] = "start"

    def feed(self, text: str) -> Said:
        """Take the next piece; return what is certain."""
        if self.part == "answer":
            return Said("", text)
        held, self._held = self._held + text, ""
        if self.part == "gap":
            return self._after("", held)
        if self.part == "start":
            begun = held.lstrip()
            if begun.startswith(self._tags.start):
                self.part = "thoughts"
            elif self._tags.start.startswith(begun):
                self._held = held
                return Said("", "")
            elif self._tags.opened:
                self.part = "thoughts"
            else:
                self.part = "answer"
                return Said("", held)
        return self._within(held)

    def finish(self) -> Said:
        """Return what was held back, at the end of the answer."""
        held, self._held = self._held, ""
        if self.part == "start" and self._tags.opened:
            self.part = "thoughts"
        return Said("", held) if self.part in {"start", "answer"} else Said(held, "")

    def _within(self, held: str) -> Said:
        end = self._tags.end
        if (at := held.find(end)) >= 0:
            at += len(end)
            return self._after(held[:at], held[at:])
        for at in range(max(0, len(held) - len(end) + 1), len(held)):
            if end.startswith(held[at:]):
                self._held = held[at:]
                return Said(held[:at], "")
        return Said(held, "")

    def _after(self, thought: str, text: str) -> Said:
        answer = text.lstrip()
        self.part = "answer" if answer else "gap"
        return Said(thought + text.removesuffix(answer), answer)


class Splitter:
    """An answer to thoughts and text, without the tags.

    White space around the thoughts belongs to the tags; an answer without
    thoughts stays as it is. ``tokens`` counts those of the thoughts, tags
    included.
    """

    def __init__(self, tags: Thinking) -> None:
        self._tags = tags
        self._divider = Divider(tags)
        self._pending = 0
        self._space = ""
        self._thought = False
        self.tokens = 0

    def feed(self, text: str, tokens: int = 1) -> Said:
        """Take the next piece and how many tokens it has; return what is certain."""
        before = self._divider.part
        said = self._divider.feed(text)
        after = self._divider.part
        if after == "start":
            self._pending += tokens
        elif after in {"thoughts", "gap"} or (said.thought and before != "gap"):
            self.tokens += self._pending + tokens
            self._pending = 0
        return self._trimmed(said, before, after)

    def finish(self) -> Said:
        """Return what was held back, at the end of the answer."""
        before = self._divider.part
        said = self._divider.finish()
        if before == "start" and self._divider.part == "thoughts":
            self.tokens += self._pending
        return self._trimmed(said, before, self._divider.part)

    def _trimmed(self, said: Said, before: str, after: str) -> Said:
        thought = said.thought
        if before == "gap" or not thought:
            return Said("", said.text)
        if before == "start":
            thought = thought.lstrip().removeprefix(self._tags.start)
        if after != "thoughts":
            thought = thought.rstrip().removesuffix(self._tags.end)
        thought = self._space + thought
        if not self._thought:
            thought = thought.lstrip()
        kept = thought.rstrip()
        self._space = thought[len(kept) :]
        self._thought = self._thought or bool(kept)
        return Said(kept, said.text)
