"""Videos on the CPU engine against transformers: patches of two frames, and their time axis.

Each patch in time is encoded by itself; transformers gets all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rkvlmd.models import films
from rkvlmd.models import manifest as manifests
from rkvlmd.wire import child
from tests.parity_onnx import engines
from tests.parity_onnx.checkpoints import IDS, KINDS, make, quiet
from tools.exporter import folder as exporter

pytestmark = pytest.mark.torch
NEW = 8
#: Float32 sums in another order, over few layers.
MOST = 1e-3
NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
START, PAD, END = (IDS[f"<|{name}|>"] for name in ("vision_start", "video_pad", "vision_end"))
Make = Callable[[str], tuple[Any, Path]]


@dataclass(frozen=True)
class Film:
    """A video as its prep children hand it over: patches in time, and where they lie on the axis."""

    name: str
    patches: list[np.ndarray]
    grid: tuple[int, int, int]
    axis: list[int]
    seconds: float

    @property
    def pieces(self) -> list[engines.Picture]:
        """What the encoder sees, one a patch in time."""
        _, rows, columns = self.grid
        tokens = rows * columns // 4
        return [
            engines.Picture(f"{self.name}.{i}", part, tokens, (1, rows, columns), self.axis[i])
            for i, part in enumerate(self.patches)
        ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    root = tmp_path_factory.mktemp("checkpoints")
    found: dict[str, tuple[Any, Path]] = {}

    def get(name: str) -> tuple[Any, Path]:
        if name not in found:
            model = make(KINDS[name], root / name)
            exporter.export(root / name, root / "models" / name, name="tiny")
            found[name] = model, root / "models" / name
        return found[name]

    return get


def film(rule: films.Film, seed: int, grid: tuple[int, int, int], times: Sequence[float]) -> Film:
    rng = np.random.default_rng(seed)
    count, rows, columns = grid
    assert len(times) == 2 * count
    patches = [
        rng.uniform(-1, 1, (rows * columns, 3 * 2 * 4 * 4)).astype(np.float32) for _ in range(count)
    ]
    gap = (times[-1] - times[0]) / (len(times) - 1)
    return Film(f"v{seed}", patches, grid, films.axis(rule, len(times), times), 2 * gap)


def prompt(
    rule: films.Film, *parts: Sequence[int] | Film | engines.Picture
) -> tuple[list[int], list[child.Span], np.ndarray]:
    """Return tokens, spans, and what each token is for transformers: text, picture, video."""
    tokens: list[int] = []
    spans: list[child.Span] = []
    kinds: list[int] = []

    def seen(piece: engines.Picture, video: int | None) -> None:
        grid = piece.merged
        spans.append(
            child.Span(start=len(tokens), count=piece.tokens, key=piece.key, grid=grid,
                       video=video, time=piece.time)
        )  # fmt: skip
        tokens.extend([IDS["<|image_pad|>"] if video is None else PAD] * piece.tokens)
        kinds.extend([1 if video is None else 2] * piece.tokens)

    def plain(found: Sequence[int]) -> None:
        tokens.extend(found)
        kinds.extend([0] * len(found))

    videos = 0
    for part in parts:
        if isinstance(part, engines.Picture):
            plain([START])
            seen(part, None)
            plain([END])
        elif isinstance(part, Film):
            if rule.kind == "run":
                plain([START])
            for number, piece in enumerate(part.pieces):
                if rule.kind == "timed":
                    # Words for the time stand between the patches; here any.
                    plain([IDS["<eos>"] + number, START])
                seen(piece, videos)
                if rule.kind == "timed":
                    plain([END])
            if rule.kind == "run":
                plain([END])
            videos += 1
        else:
            plain(part)
    return tokens, spans, np.array(kinds)


def reference(
    model: Any, tokens: list[int], kinds: np.ndarray, given: Sequence[Film | engines.Picture]
) -> np.ndarray:
    """Return the logits of every place from transformers, float32 of (places, vocabulary)."""
    import torch

    ids = torch.tensor([tokens])
    videos = [one for one in given if isinstance(one, Film)]
    pictures = [one for one in given if isinstance(one, engines.Picture)]
    more = len(tokens) - len(kinds)
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.tensor([[*kinds.tolist(), *[0] * more]]),
        "pixel_values_videos": torch.from_numpy(np.concatenate([p for v in videos for p in v.patches])),
        "video_grid_thw": torch.tensor([v.grid for v in videos]),
    }  # fmt: skip
    if pictures:
        inputs["pixel_values"] = torch.from_numpy(np.concatenate([p.pixels for p in pictures]))
        inputs["image_grid_thw"] = torch.tensor([p.grid for p in pictures])
    if "Qwen2_5" in type(model).__name__:
        inputs["second_per_grid_ts"] = torch.tensor([v.seconds for v in videos])
    model.model.rope_deltas = None
    with torch.no_grad():
        found = quiet(lambda: model(**inputs, use_cache=False).logits[0].numpy())
    return np.asarray(found, np.float32)


def judge(model: Any, engine: engines.Engine, rule: films.Film, *parts: Any) -> list[int]:
    """Ask the engine, compare with transformers, return the answer's tokens."""
    tokens, spans, kinds = prompt(rule, *parts)
    given = [part for part in parts if isinstance(part, Film | engines.Picture)]
    pieces = [p for one in given for p in (one.pieces if isinstance(one, Film) else [one])]
    answer = engine.ask(tokens, spans, pieces, NEW)
    wanted = reference(model, tokens + answer[:-1], kinds, given)[len(tokens) - 1 :]
    assert np.abs(np.stack(engine.logits) - wanted).max() < MOST
    assert answer == wanted.argmax(axis=1).tolist()
    return answer


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_tokens_of_videos_equal_transformers(made: Make, name: str) -> None:
    model, folder = made(name)
    manifest = manifests.parse((folder / manifests.FILE).read_bytes())
    rule = films.of(manifest)
    assert rule is not None
    engine = engines.Engine(folder)
    # Times at which the axis of Qwen2.5-VL has gaps, and outruns the frame's sides.
    first = film(rule, 1, (3, 4, 6), [0.0, 0.7, 1.4, 2.1, 2.8, 3.5])
    second = film(rule, 2, (2, 8, 2), [0.0, 0.25, 0.5, 0.75])
    words = [engines.text(seed, 5) for seed in range(4)]

    parts: list[Any] = [words[0], first, words[1]]
    answer = judge(model, engine, rule, *parts)
    assert len(set(answer)) > 2, "the random model repeats itself; the test would be weak"
    assert engine.cached == 0
    # The next turn has a picture and a second video; the cache keeps all that it has.
    kept = len(prompt(rule, *parts)[0]) + len(answer) - 1
    seen = engines.picture(KINDS[name], 0)
    parts += [answer, words[2], seen, second, words[3]]
    judge(model, engine, rule, *parts)
    assert engine.cached == kept
    # The same patches in the other order: nothing behind the first of them may be kept.
    turned = Film("v1", first.patches[::-1], first.grid, first.axis, first.seconds)
    turned_pieces = [words[0], Film("v9", turned.patches, turned.grid, turned.axis, turned.seconds)]
    judge(model, engine, rule, *turned_pieces, words[1])
    assert engine.cached <= len(words[0]) + 2


def test_time_alone_changes_the_answer(made: Make) -> None:
    """The same frames further apart: Qwen2.5-VL has other positions for them, nothing else."""
    model, folder = made("qwen2_5_vl")
    rule = films.of(manifests.parse((folder / manifests.FILE).read_bytes()))
    assert rule is not None
    engine = engines.Engine(folder)
    words = engines.text(7, 6)
    fast = film(rule, 5, (3, 4, 4), [0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    slow = Film("slow", fast.patches, fast.grid, films.axis(rule, 6, [0, 2, 4, 6, 8, 10]), 4.0)
    assert fast.axis == [0, 0, 1]
    assert slow.axis == [0, 16, 32]
    judge(model, engine, rule, words, fast, words)
    logits = np.stack(engine.logits)
    judge(model, engine, rule, words, slow, words)
    assert np.abs(np.stack(engine.logits)[0] - logits[0]).max() > MOST
