"""Which prep child does which order: prompts stay where the tokenizer is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from rkvlmd.actors.blobs import Blob
from rkvlmd.actors.prep import Prep
from rkvlmd.wire import child as wire
from tests.fakes.children import FakeChild, memfd
from tests.fakes.scripted import settings_for

Clock = trio.testing.MockClock
WAIT = 1.0


class Hand(FakeChild):
    """A prep child whose pictures wait for its gate; it notes its prompts."""

    def __init__(self, name: str, prompts: list[str]) -> None:
        super().__init__(name, "prep")
        self.gate = trio.Event()
        self.busy = False
        self._prompts = prompts

    async def _picture(self, order: wire.Picture) -> None:
        self.busy = True
        await self.gate.wait()
        self.busy = False
        await super()._picture(order)

    def tokens(self, order: wire.Render, pictures: int) -> list[int]:
        self._prompts.append(self.name)
        return super().tokens(order, pictures)


def _picture(number: int) -> wire.ToChild:
    return wire.Picture(
        id=number, encoding="raw", manifest={"encoders": [{"tokens": 4}]}, max_bytes=1,
        max_pixels=1, min_side=1, max_aspect=1,
    )  # fmt: skip


class Pool:
    """A pool over such children, and what each of them rendered."""

    def __init__(self, tmp: Path, **prep: Any) -> None:
        self.prompts: list[str] = []
        self.hands: dict[str, Hand] = {}
        settings = settings_for(
            tmp, prep={"prompt_wait_seconds": WAIT, "idle_seconds": 60.0, **prep}
        )
        self.prep = Prep(settings, self._make)
        self.nursery: trio.Nursery

    def _make(self, name: str) -> Any:
        self.hands[name] = Hand(name, self.prompts)
        return self.hands[name]

    @property
    def up(self) -> list[str]:
        return sorted(self.prep.children)

    async def prompt(self) -> float:
        """Have one rendered; return how long that took, seconds."""
        began = trio.current_time()
        await self.prep.do(
            lambda number: wire.Render(id=number, folder="", manifest={}, turns=[], pictures=[]),
            (), expect=wire.RenderDone,
        )  # fmt: skip
        return trio.current_time() - began

    async def picture(self) -> None:
        _, blobs = await self.prep.do(_picture, [Blob(memfd(1))], expect=wire.PictureDone)
        for blob in blobs:
            blob.close()

    async def both_busy(self) -> None:
        """Start both children, each with a picture that waits for its gate."""
        for _ in range(2):
            self.nursery.start_soon(self.picture)
        await trio.testing.wait_all_tasks_blocked()
        assert [hand.busy for hand in self.hands.values()] == [True, True]

    async def both_idle(self) -> None:
        await self.both_busy()
        for name in list(self.hands):
            await self.free(name)

    async def free(self, name: str) -> None:
        """Let the picture of a child go on; return when all is done that can be."""
        self.hands[name].gate.set()
        await trio.testing.wait_all_tasks_blocked()


@asynccontextmanager
async def pool_of(tmp: Path, **prep: Any) -> AsyncIterator[Pool]:
    with trio.fail_after(3600):
        async with trio.open_nursery() as nursery:
            pool = Pool(tmp, **prep)
            pool.nursery = nursery
            await nursery.start(pool.prep.run)
            yield pool
            nursery.cancel_scope.cancel()


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[Pool]:
    async with pool_of(tmp_path) as made:
        yield made


async def test_prompts_stay_with_one_child(pool: Pool, autojump_clock: Clock) -> None:
    await pool.both_idle()
    for _ in range(10):
        assert await pool.prompt() == 0
        await pool.picture()
    assert pool.prompts == ["prep:1"] * 10
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(pool.prompt)
    assert set(pool.prompts) == {"prep:1"}


async def test_a_prompt_waits_for_its_child(pool: Pool, autojump_clock: Clock) -> None:
    await pool.both_busy()
    pool.nursery.start_soon(pool.prompt)
    await pool.free("prep:2")
    assert pool.prompts == []
    await pool.picture()  # the other one works on, past the prompt
    await trio.sleep(WAIT / 2)
    assert pool.prompts == []
    await pool.free("prep:1")
    assert pool.prompts == ["prep:1"]


async def test_a_prompt_does_not_wait_for_long(pool: Pool, autojump_clock: Clock) -> None:
    await pool.both_busy()
    pool.hands["prep:2"].gate.set()
    assert await pool.prompt() == pytest.approx(WAIT)
    assert await pool.prompt() == 0  # now that one has the tokenizer as well
    assert pool.prompts == ["prep:2"] * 2


async def test_a_prompt_may_wait_not_at_all(tmp_path: Path, autojump_clock: Clock) -> None:
    async with pool_of(tmp_path, prompt_wait_seconds=0.0) as pool:
        await pool.both_busy()
        pool.hands["prep:2"].gate.set()
        assert await pool.prompt() == 0
        assert pool.prompts == ["prep:2"]


async def test_both_busy_the_first_that_is_free_after_the_wait(
    pool: Pool, autojump_clock: Clock
) -> None:
    await pool.both_busy()
    pool.nursery.start_soon(pool.prompt)
    await trio.sleep(2 * WAIT)
    assert pool.prompts == []
    await pool.free("prep:2")
    assert pool.prompts == ["prep:2"]


async def test_the_child_with_the_tokenizer_has_died(pool: Pool, autojump_clock: Clock) -> None:
    await pool.both_idle()
    await pool.prompt()
    pool.hands["prep:1"].die()
    assert await pool.prompt() == 0
    assert await pool.prompt() == 0
    assert pool.prompts == ["prep:1", "prep:2", "prep:2"]


async def test_it_dies_while_a_prompt_waits_for_it(pool: Pool, autojump_clock: Clock) -> None:
    await pool.both_busy()
    pool.hands["prep:2"].gate.set()
    pool.nursery.start_soon(pool.prompt)
    await trio.testing.wait_all_tasks_blocked()
    began = trio.current_time()
    pool.hands["prep:1"].die()
    await trio.testing.wait_all_tasks_blocked()
    # Its picture goes to the other child, the prompt to the one that starts in its place.
    assert (pool.prompts, trio.current_time()) == (["prep:3"], began)


async def test_prompts_alone_start_one_child(pool: Pool, autojump_clock: Clock) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(pool.prompt)
    assert pool.up == ["prep:1"]


async def test_a_second_child_starts_for_a_prompt_that_waits_too_long(
    pool: Pool, autojump_clock: Clock
) -> None:
    pool.nursery.start_soon(pool.picture)
    await trio.testing.wait_all_tasks_blocked()
    assert await pool.prompt() == pytest.approx(WAIT)
    assert pool.prompts == ["prep:2"]


async def test_a_prompt_that_nobody_waits_for_holds_up_nothing(
    pool: Pool, autojump_clock: Clock
) -> None:
    await pool.both_busy()
    pool.hands["prep:2"].gate.set()
    with trio.move_on_after(WAIT / 2) as gone:
        await pool.prompt()
    assert gone.cancelled_caught
    assert (pool.prompts, pool.prep.waiting) == ([], 0)
    pool.hands["prep:1"].gate.set()
    await pool.prep.wait_idle()
    assert pool.prompts == []


@pytest.mark.parametrize(("children", "first"), [(2, True), (1, False)])
async def test_a_child_with_the_tokenizer_does_prompts_first_where_another_does_pictures(
    tmp_path: Path, autojump_clock: Clock, children: int, first: bool
) -> None:
    async with pool_of(tmp_path, children=children) as pool:
        for _ in range(children):
            pool.nursery.start_soon(pool.picture)
        await trio.testing.wait_all_tasks_blocked()
        pool.nursery.start_soon(pool.picture)  # waits for either
        await trio.testing.wait_all_tasks_blocked()
        pool.nursery.start_soon(pool.prompt)
        await trio.testing.wait_all_tasks_blocked()
        hand = pool.hands["prep:1"]
        hand.gate.set()
        hand.gate = trio.Event()  # the next picture would wait
        await trio.testing.wait_all_tasks_blocked()
        assert pool.prompts == (["prep:1"] if first else [])
        assert hand.busy


@pytest.mark.parametrize("idle", [0.0, 5.0])
async def test_children_that_left_take_their_places_with_them(
    tmp_path: Path, autojump_clock: Clock, idle: float
) -> None:
    async with pool_of(tmp_path, idle_seconds=idle) as pool:
        for name in ("prep:1", "prep:2"):
            assert await pool.prompt() == 0
            await trio.sleep(idle + 1)
            assert (pool.up, pool.prompts[-1]) == ([], name)


def test_what_a_child_imports_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is to render imports all; one that comes beside it what pictures need."""
    settings = settings_for(tmp_path)
    made: dict[str, list[str]] = {}

    def child(name: str, *_: Any, arguments: list[str]) -> Any:
        made[name] = arguments
        return Hand(name, [])

    monkeypatch.setattr("rkvlmd.actors.prep.Child", child)

    async def main() -> None:
        prep = Prep(settings)
        async with trio.open_nursery() as nursery:
            await nursery.start(prep.run)
            for _ in range(2):
                nursery.start_soon(
                    partial(prep.do, expect=wire.PictureDone), _picture, [Blob(memfd(1))]
                )
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert "--warm" not in made["prep:1"]
    assert made["prep:2"][-2:] == ["--warm", "pictures"]
