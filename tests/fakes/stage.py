"""A quick house whose encodes and answers wait until the test lets them go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import trio

from rkvlmd.wire import child as wire
from rkvlmd.wire import prefix
from tests.fakes.children import FakeChild


@dataclass
class Stage:
    """What happens in the children, and what they wait for; ``None``: for nothing.

    ``same``: all pictures are the same one. ``fail`` names a role whose next
    order fails, with what ``how`` says: ``error``, ``die`` or ``hang``.
    """

    same: bool = False
    encode_gate: trio.Event | None = None
    answer_gate: trio.Event | None = None
    fail: str = ""
    how: str = "error"
    encodes: int = 0
    events: list[str] = field(default_factory=list)
    encoding: trio.Event = field(default_factory=trio.Event)
    answering: trio.Event = field(default_factory=trio.Event)
    _numbers: Any = field(default_factory=count)

    def child(self, name: str, role: str, *, words: int) -> FakeChild:
        """Return a child on this stage."""
        return StagedChild(self, name, role, words)

    def next_picture(self) -> str:
        return "0" * 64 if self.same else f"{next(self._numbers):064x}"


class StagedChild(FakeChild):
    """Every text is a prompt of its own: a token a byte."""

    def __init__(self, stage: Stage, name: str, role: str, words: int) -> None:
        super().__init__(name, role, words=words)
        self.stage = stage

    def sha256(self) -> str:
        return self.stage.next_picture()

    def tokens(self, order: wire.Render, pictures: int) -> list[int]:
        text = "".join(
            f"{turn['role']}: {part['text']}\n"
            for turn in order.turns
            for part in turn["parts"]
            if "text" in part
        )
        return [1] * (pictures + 1) + list(text.encode())

    def held(self, order: wire.Generate) -> list[str]:
        return list(prefix.of_tokens(order.tokens, order.spans, order.adapter))

    async def send(self, message: wire.ToChild, fds: Sequence[int] = ()) -> None:
        await super().send(message, fds)
        if isinstance(message, wire.Abort) and self.stage.answer_gate is not None:
            self.stage.answer_gate.set()  # as a real one hears it between two tokens

    async def _encode(self, order: wire.Encode) -> None:
        stage = self.stage
        stage.encodes += 1
        stage.events.append("encode begins")
        stage.encoding.set()
        if stage.encode_gate is not None:
            await stage.encode_gate.wait()
        stage.events.append("encode ends")
        if not await self._failed(order.id):
            await super()._encode(order)

    async def _generate(self, order: wire.Generate) -> None:
        stage = self.stage
        stage.events.append("answer begins")
        await self._answer(
            wire.Prefilled(id=order.id, prompt=len(order.tokens), cached=0, seconds=0.0)
        )
        stage.answering.set()
        if stage.answer_gate is not None:
            await stage.answer_gate.wait()
        if await self._failed(order.id):
            stage.events.append("answer ends")
        else:
            await super()._generate(order)

    async def _answer(self, message: wire.FromChild, fd: int | None = None) -> None:
        # Before it is told: the next order may begin in the same turn.
        if isinstance(message, wire.GenerateDone):
            self.stage.events.append("answer ends")
        await super()._answer(message, fd)

    async def _failed(self, number: int) -> bool:
        if self.stage.fail != self.role:
            return False
        self.stage.fail = ""
        if self.stage.how == "hang":
            await trio.sleep_forever()
        if self.stage.how == "die":
            self.kill("the test said so")
            await trio.sleep_forever()
        await self._answer(wire.Failed(id=number, code="engine_error", message="It failed."))
        return True
