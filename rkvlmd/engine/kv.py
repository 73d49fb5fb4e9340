"""What a key/value cache holds, and how much of it a new prompt may keep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rkvlmd.wire import prefix
from rkvlmd.wire.child import Generate, Span

#: What stands at one place of the cache: a token, or one row of a picture.
Place = int | tuple[str, int]


def places(tokens: Sequence[int], spans: Iterable[Span]) -> list[Place]:
    """Return what each place of a prompt holds: its token, or (picture key, row number).

    All image tokens have one id; so pictures are told apart by their key.
    """
    found: list[Place] = list(tokens)
    for span in spans:
        found[span.start : span.start + span.count] = [(span.key, i) for i in range(span.count)]
    return found


def common_prefix(first: Sequence[Place], second: Sequence[Place]) -> int:
    """Return how many places two prompts share from the start."""
    shared = min(len(first), len(second))
    if first[:shared] == second[:shared]:
        return shared
    return next(i for i in range(shared) if first[i] != second[i])


def reusable(cache: Sequence[Place], prompt: Sequence[Place]) -> int:
    """Return how many places of ``cache`` a run of ``prompt`` keeps.

    At least the last place of the prompt is computed again: its logits choose
    the first token.
    """
    return min(common_prefix(cache, prompt), max(0, len(prompt) - 1))


def names(order: Generate, record: Sequence[Place]) -> prefix.Chain:
    """Return the names of the blocks of a cache that holds ``record`` after a run of ``order``."""
    answer = [place for place in record[len(order.tokens) :] if isinstance(place, int)]
    tokens = [*order.tokens[: len(record)], *answer]
    spans = [span for span in order.spans if span.start < len(record)]
    return prefix.of_tokens(tokens, spans, order.adapter)
