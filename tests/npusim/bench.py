"""The decoder backend in the test's own process, over a simulated library."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from rkvlmd.engine import rkllm_cross
from rkvlmd.engine.render import render_text
from rkvlmd.engine.rkllm_decoder import RkllmDecoder
from rkvlmd.models import manifest as manifests
from rkvlmd.wire import child
from tests.fakes.laid import one_view
from tests.npusim import compiler, folders, models
from tests.npusim.fixture import Sim


class Bench:
    """A decoder, loaded, and the part of the daemon that renders and orders."""

    #: What the end of a test closes: 1.2.1 holds one model in a process.
    OPEN: ClassVar[list[Bench]] = []

    @classmethod
    def close_all(cls) -> None:
        """Give all models back."""
        while cls.OPEN:
            cls.OPEN.pop().decoder.close()

    def __init__(
        self, sim: Sim, version: str, *, name: str = "m", options: Any = None, **folder: Any
    ) -> None:
        self.sim = sim
        path = sim.folder / name
        self.folder = path if path.exists() else folders.write(path, **folder)
        tree = json.loads((self.folder / "rkvlm.json").read_text())
        self.manifest = manifests.from_builtins(tree)
        self.version = version
        self.decoder = RkllmDecoder()
        self.ready = self.decoder.load(
            child.Load(
                folder=str(self.folder),
                manifest=manifests.to_builtins(self.manifest),
                options={
                    "library": str(compiler.library(version)), "soc": "rk3588",
                    "state": str(sim.folder), **(options or {}),
                },
            ),
            lambda *_: None,
        )  # fmt: skip
        self.OPEN.append(self)
        self.said: list[Any] = []
        self.pictures: list[int] = []

    def order(self, turns: Sequence[Any], **more: Any) -> child.Generate:
        """Render turns: text, pictures as numbers; a list alternates user and assistant."""
        self.pictures = []
        built = []
        for i, turn in enumerate(turns):
            found = []
            for part in turn if isinstance(turn, tuple) else (turn,):
                if isinstance(part, int):
                    found.append({"picture": len(self.pictures)})
                    self.pictures.append(part)
                else:
                    found.append({"text": part})
            built.append({"role": ("user", "assistant")[i % 2], "parts": found})
        beside = self.manifest.decoder.cross_attention is not None
        tokens = 1 if beside else folders.TOKENS
        pictures = one_view(self.manifest, [tokens] * len(self.pictures))
        rendered = render_text(str(self.folder), self.manifest, built, pictures)
        spans = [
            child.Span(start=s, count=c, key=f"picture {self.pictures[i]}")
            for s, c, i, _ in rendered.spans
        ]
        return child.Generate(
            **{
                "id": 1, "tokens": rendered.tokens, "prompt": rendered.text, "spans": spans,
                "count": rendered.most, "max_tokens": 500, **more,
            }
        )  # fmt: skip

    def rows(self) -> list[Any]:
        shape = self.manifest.decoder.cross_attention
        if shape is not None:
            sizes = (folders.TOKENS, shape.layers, shape.kv_heads, shape.head_dim)
            return [
                rkllm_cross.rows_of(models.caches_of(p, *sizes), shape, folders.TOKENS)
                for p in self.pictures
            ]
        outputs = self.manifest.encoders[0].outputs if self.manifest.encoders else 1
        return [models.rows_of(p, folders.TOKENS, folders.EMBED, outputs) for p in self.pictures]

    def ask(
        self, *turns: Any, on: Callable[[Any], None] = lambda _m: None, **more: Any
    ) -> tuple[str, child.GenerateDone]:
        """Return text and end."""
        order = self.order(turns, **more)
        self.said = []

        def say(message: Any) -> None:
            self.said.append(message)
            on(message)

        done = self.decoder.generate(order, self.rows(), say)
        assert sum(isinstance(m, child.Prefilled) for m in self.said) <= 1
        texts = [m for m in self.said if isinstance(m, child.Text)]
        assert sum(m.tokens for m in texts) == done.completion
        return "".join(m.text for m in texts), done

    def talk(self, *questions: Any) -> Iterator[tuple[child.Generate, str, child.GenerateDone]]:
        """Ask one after the other, each behind all that was said; yield order, text and end."""
        turns: list[Any] = []
        for question in questions:
            turns.append(question)
            order = self.order(turns)
            text, done = self.ask(*turns)
            yield order, text, done
            turns.append(text)

    def sums(self) -> str:
        return ",".join(models.sum_of(rows) for rows in self.rows()) or "-"
