"""Every family's exported files on the CPU engine against transformers.

One picture and text, then a second turn with a second picture: logits within
1e-3 at every generated place, and the same greedy tokens. The answers are
judged in one run of transformers over prompt and answer: where every token is
the best one after those before it, they are the greedy ones.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parity_onnx import engines
from tests.parity_onnx.checkpoints import KINDS, Kind, make
from tools.exporter import folder as exporter

pytestmark = pytest.mark.torch
NEW = 8
#: Float32 sums in another order, over few layers.
MOST = 1e-3
#: Pictures that see ahead, and states instead of keys: made of standard operators alone.
PLAIN_ONLY = {"gemma3", "gemma3n", "gemma4", "qwen3_5"}
CASES = [
    (name, attention)
    for name in KINDS
    for attention in ("plain", "gqa")
    if attention == "plain" or name not in PLAIN_ONLY
]
Make = Callable[[Kind], tuple[Any, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    root = tmp_path_factory.mktemp("checkpoints")
    found: dict[str, tuple[Any, Path]] = {}

    def get(kind: Kind) -> tuple[Any, Path]:
        if kind.name not in found:
            found[kind.name] = make(kind, root / kind.name), root / kind.name
        return found[kind.name]

    return get


def judge(
    kind: Kind,
    model: Any,
    engine: engines.Engine,
    tokens: list[int],
    spans: Any,
    pictures: list[engines.Picture],
) -> list[int]:
    """Ask the engine, compare with transformers, return the answer's tokens."""
    answer = engine.ask(tokens, spans, pictures, NEW)
    wanted = engines.reference(kind, model, tokens + answer[:-1], pictures)[len(tokens) - 1 :]
    assert np.abs(np.stack(engine.logits) - wanted).max() < MOST
    assert answer == wanted.argmax(axis=1).tolist()
    return answer


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_logits_and_greedy_tokens_equal_transformers(
    made: Make, tmp_path: Path, name: str, attention: Any
) -> None:
    kind = KINDS[name]
    model, checkpoint = made(kind)
    exporter.export(checkpoint, tmp_path / "m", name="tiny", attention=attention)
    engine = engines.Engine(tmp_path / "m")
    one, two = ([engines.picture(kind, n)] if kind.image else [] for n in (0, 1))

    parts: list[Any] = [engines.text(1, 7), *one, engines.text(2, 5)]
    tokens, spans = engines.prompt(kind, *parts)
    answer = judge(kind, model, engine, tokens, spans, one)
    assert len(set(answer)) > 2, "the random model repeats itself; the test would be weak"
    assert engine.cached == 0

    # The next turn has a second picture; the cache keeps all that it has.
    kept = len(tokens) + len(answer) - 1
    parts += [answer, "<|im_end|>", engines.text(3, 4), *two, engines.text(4, 6)]
    tokens, spans = engines.prompt(kind, *parts)
    judge(kind, model, engine, tokens, spans, one + two)
    assert engine.cached == kept

    if kind.image:
        # Both pictures changed places: nothing of the first one may be kept.
        parts[1], parts[-2] = two[0], one[0]
        tokens, spans = engines.prompt(kind, *parts)
        judge(kind, model, engine, tokens, spans, two + one)
        assert engine.cached <= 7 + len(engines.prompt(kind, one[0])[0])
