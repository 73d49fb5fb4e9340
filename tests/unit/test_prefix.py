"""The names of the beginnings of prompts."""

from __future__ import annotations

import random

from rkvlmd.engine import kv
from rkvlmd.wire import prefix
from rkvlmd.wire.child import Generate, Span


def shared(a: prefix.Chain, b: prefix.Chain) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def test_prompts_share_names_as_far_as_they_share_tokens() -> None:
    rng = random.Random(1)
    for _ in range(200):
        first = [rng.randrange(50_000) for _ in range(rng.randrange(0, 600))]
        at = rng.randrange(0, 600)
        second = [*first[:at], 50_001, *first[at + 1 :], 7]
        a, b = prefix.of_tokens(first, []), prefix.of_tokens(second, [])
        assert len(a) == len(first) // 64
        assert shared(a, b) == min(at, len(first)) // 64
        # A name is never seen again at another place.
        assert not set(a) & set(b[shared(a, b) :])


def test_a_picture_counts_by_its_key() -> None:
    tokens = [5] * 640
    one = [Span(start=100, count=200, key="a")]
    two = [Span(start=100, count=200, key="b")]
    assert shared(prefix.of_tokens(tokens, one), prefix.of_tokens(tokens, two)) == 1
    moved = [Span(start=101, count=200, key="a")]
    assert shared(prefix.of_tokens(tokens, one), prefix.of_tokens(tokens, moved)) == 1
    both = [Span(start=100, count=64, key="a"), Span(start=164, count=136, key="b")]
    assert shared(prefix.of_tokens(tokens, both), prefix.of_tokens(tokens, one)) == 1


def test_the_seed_is_a_part_of_every_name() -> None:
    assert shared(prefix.of_tokens([1] * 640, [], "x"), prefix.of_tokens([1] * 640, [])) == 0


def test_text_with_pictures() -> None:
    spans = [Span(start=0, count=100, key="a"), Span(start=0, count=100, key="b")]
    base = "w" * 300 + "<image>" + "v" * 300 + "<image>" + "u" * 600
    one = prefix.of_text(base, spans)
    assert len(one) == (1200 + 800) // 256
    other = [spans[0], Span(start=0, count=100, key="c")]
    assert shared(one, prefix.of_text(base, other)) == 1000 // 256
    longer = prefix.of_text(base + "answer" * 100, spans)
    assert longer[: len(one)] == one
    # A number of places that is not that of the pictures shares nothing by mistake.
    assert shared(one, prefix.of_text("<image>" + base, spans)) == 0


def test_both_sides_speak_of_the_same() -> None:
    """The daemon of the next prompt, the decoder of what it holds after the last one."""
    spans = [Span(start=10, count=300, key="k")]
    tokens = [3] * 400
    order = Generate(id=1, tokens=tokens, spans=spans, max_tokens=9)
    answer = list(range(100, 200))
    record = [*kv.places(tokens, spans), *answer]
    held = kv.names(order, record)
    follow_up = prefix.of_tokens([*tokens, *answer, *range(500, 600)], spans)
    assert follow_up[: len(held)] == held
    assert len(held) == 500 // 64
    # After an abort in the middle of the prompt.
    assert kv.names(order, record[:200]) == held[: 200 // 64]
    assert kv.names(order, []) == ()
