"""The CPU engine and transformers, side by side over one tiny checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rkvlmd.engine.onnx_decoder import OnnxDecoder
from rkvlmd.engine.onnx_encoder import OnnxEncoder
from rkvlmd.models import manifest as manifests
from rkvlmd.wire import child
from tests.parity_onnx.checkpoints import IDS, VOCABULARY, Kind, quiet


@dataclass(frozen=True)
class Picture:
    """What a prep child hands over: pixels or patches, and for these the grid in patches."""

    key: str
    pixels: np.ndarray
    tokens: int
    grid: tuple[int, int, int] | None = None
    time: int = 0

    @property
    def merged(self) -> tuple[int, int, int] | None:
        """The grid in tokens."""
        return self.grid and (self.grid[0], self.grid[1] // 2, self.grid[2] // 2)


def picture(kind: Kind, number: int) -> Picture:
    """Return random pixels, different for every number."""
    rng = np.random.default_rng(100 + number)
    if not kind.grids:
        pixels = rng.uniform(-1, 1, (1, 3, kind.side, kind.side)).astype(np.float32)
        return Picture(f"p{number}", pixels, kind.tokens)
    grid = kind.grids[number % len(kind.grids)]
    count = int(np.prod(grid))
    pixels = rng.uniform(-1, 1, (count, 3 * 2 * 4 * 4)).astype(np.float32)
    return Picture(f"p{number}", pixels, count // 4, grid)


def prompt(kind: Kind, *parts: Sequence[int] | Picture | str) -> tuple[list[int], list[child.Span]]:
    """Return tokens and spans of tokens, special tokens by name, and pictures."""
    tokens: list[int] = []
    spans = []
    for part in parts:
        if isinstance(part, str):
            tokens.append(IDS[part])
        elif isinstance(part, Picture):
            before, after = (_named(text) for text in kind.around)
            tokens += before
            spans.append(
                child.Span(start=len(tokens), count=part.tokens, key=part.key, grid=part.merged)
            )
            tokens += [IDS[kind.image]] * part.tokens + after
        else:
            tokens += part
    return tokens, spans


def text(seed: int, count: int) -> list[int]:
    """Return tokens that are no special ones."""
    rng = np.random.default_rng(seed)
    return [int(t) for t in rng.integers(len(IDS), VOCABULARY, count)]


def _named(line: str) -> list[int]:
    return [IDS[f"{name}>"] for name in line.split(">") if name]


class Engine:
    """Encoder and decoder backends of a model folder; no token ends a text."""

    def __init__(self, folder: Path, **options: int) -> None:
        tree = manifests.to_builtins(manifests.parse((folder / manifests.FILE).read_bytes()))
        order = child.Load(
            folder=str(folder), manifest=tree | {"stop_ids": []}, options={"threads": 1} | options
        )
        self.decoder = OnnxDecoder()
        self.decoder.load(order, lambda *_: None)
        self.encoder = OnnxEncoder()
        if tree["encoders"]:
            self.encoder.load(order, lambda *_: None)
        self.logits: list[np.ndarray] = []
        self.cached = -1
        inner = self.decoder._step

        def spy(*args: Any, **rest: Any) -> Any:
            found = inner(*args, **rest)
            if found is not None and found.size:
                self.logits.append(found.copy())
            return found

        self.decoder._step = spy  # type: ignore[method-assign]

    def ask(
        self, tokens: list[int], spans: list[child.Span], pictures: Sequence[Picture], count: int
    ) -> list[int]:
        """Return the next ``count`` greedy tokens; their logits are kept."""
        rows = [self.encoder.encode(p.pixels, p.grid) for p in pictures]
        order = child.Generate(id=1, tokens=tokens, spans=spans, max_tokens=count)
        said: list[Any] = []
        self.logits.clear()
        done = self.decoder.generate(order, rows, said.append)
        assert done.completion == count
        self.cached = said[0].cached
        return [int(row.argmax()) for row in self.logits]


def reference(kind: Kind, model: Any, tokens: list[int], pictures: Sequence[Picture]) -> np.ndarray:
    """Return the logits of every place from transformers, float32 of (places, vocabulary)."""
    import torch

    ids = torch.tensor([tokens])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if pictures:
        pixels = torch.from_numpy(np.concatenate([p.pixels for p in pictures]))
        inputs["pixel_values"] = pixels[None] if kind.name in {"smolvlm", "idefics3"} else pixels
        seen = (ids == IDS[kind.image]).int()
        if kind.grids:
            inputs["image_grid_thw"] = torch.tensor([p.grid for p in pictures])
            inputs["mm_token_type_ids"] = seen
        elif kind.name == "gemma3":
            inputs["token_type_ids"] = seen
    if kind.grids:
        model.model.rope_deltas = None
    with torch.no_grad():
        found = quiet(lambda: model(**inputs, use_cache=False).logits[0].numpy())
    return np.asarray(found, np.float32)
