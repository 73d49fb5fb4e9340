"""Pictures that come again: they are hashed and not decoded, while their rows are kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from rkvlmd.actors import seen
from rkvlmd.actors.blobs import Blob, from_bytes
from rkvlmd.actors.embeddings import EmbeddingCache, Rows
from rkvlmd.actors.house import House
from rkvlmd.actors.ready import Picture, View
from rkvlmd.actors.seen import Seen, Source
from rkvlmd.messages import Usage
from rkvlmd.wire import child as wire
from tests.fakes.children import FakeChild
from tests.fakes.quick_house import quick_house
from tests.fakes.scripted import chat, collect, submit
from tests.fakes.stage import Stage

TENSOR = wire.Tensor(shape=(100,), dtype="uint8")


async def put(cache: EmbeddingCache, *keys: str, size: int = 100) -> None:
    for key in keys:
        with await from_bytes(b"x" * size) as blob:
            cache.put(key, Rows(blob, TENSOR))


def picture(sha256: str, *keys: str) -> Picture:
    return Picture(tuple(View(None, key, 0, 4) for key in keys), (0,), sha256)


def source(size: int = 5) -> Source:
    return Source(("digest", "auto"), "raw", size)


# --- the house -------------------------------------------------------------------------------


async def usage(house: House, pictures: int = 1, text: str = "x") -> Usage:
    _, end = await collect(submit(house, chat(text, pictures=pictures, model="a")))
    assert end.reason == "stop", end
    return end.usage


def decoded(house: House) -> int:
    return sum(house.tools.metrics.picture_decode.series[()].counts)


async def test_a_second_turn_decodes_nothing(tmp_path: Path) -> None:
    stage = Stage(same=True)
    async with quick_house(tmp_path, "a", child=stage.child) as house:
        with trio.fail_after(60):
            first = await usage(house)
            for _ in range(5):
                assert await usage(house) == first
            assert decoded(house) == stage.encodes == 1
            # Two at one time hold one claim each, and give both back.
            assert (await usage(house, pictures=2)).image_tokens == 2 * first.image_tokens
            assert decoded(house) == 1
        assert house.scheduler.gate.pixels == 0
        assert not house.tools.cache._claims
        assert house.tools.cache._claimed_bytes == 0
    assert Blob.live == 0


async def test_another_picture_of_the_same_size_is_decoded_once(tmp_path: Path) -> None:
    stage = Stage()  # each one is another
    async with quick_house(tmp_path, "a", child=stage.child) as house:
        with trio.fail_after(60):
            for _ in range(3):
                await usage(house)
            assert decoded(house) == stage.encodes == 3


async def test_other_limits_or_another_detail_decode_again(tmp_path: Path) -> None:
    stage = Stage(same=True)
    async with quick_house(tmp_path, "a", child=stage.child) as house:
        with trio.fail_after(60):
            await usage(house)
            asked = chat(pictures=1, model="a")
            (one,) = asked.pictures
            high = replace(asked, pictures=(replace(one, detail="high"),))
            assert (await collect(submit(house, high)))[1].reason == "stop"
            assert decoded(house) == 2
            media = replace(house.tools.settings.media, max_pixels=100)
            house.tools.settings = replace(house.tools.settings, media=media)
            await usage(house)
            assert decoded(house) == 3


@pytest.mark.parametrize("when", ["before the answer", "while it waits"])
async def test_rows_that_leave_meanwhile(tmp_path: Path, when: str) -> None:
    """Before the claim the picture is decoded after all; after it the rows stay."""
    stage = Stage(same=True)
    houses: list[House] = []

    class Late(FakeChild):
        async def _picture(self, order: wire.Picture) -> None:
            if order.known and when == "before the answer":
                houses[0].tools.cache.close()
            await super()._picture(order)

    def make(name: str, role: str, *, words: int) -> FakeChild:
        return (
            Late(name, role, words=words)
            if role == "prep"
            else stage.child(name, role, words=words)
        )

    async with quick_house(tmp_path, "a", child=make, cache={"embeddings_bytes": 1000}) as house:
        houses.append(house)
        with trio.fail_after(60):
            first = await usage(house)
            async with house.tools.lease.hold("test", "a"):
                job = submit(house, chat(pictures=1, model="a"))
                await job.checked.wait()
                if when == "while it waits":
                    await put(house.tools.cache, *map(str, range(20)))
                    assert house.tools.cache.bytes <= 1000
            _, end = await collect(job)
            assert (end.reason, end.usage) == ("stop", first)
        again = 2 if when == "before the answer" else 1
        assert (decoded(house), stage.encodes) == (again, again)
        assert house.tools.cache._claimed_bytes == 0
    assert Blob.live == 0


async def test_a_child_that_knows_nothing_of_it_is_not_believed(tmp_path: Path) -> None:
    """An answer without views is none where nothing was known, or something else."""

    class Liar(FakeChild):
        async def _picture(self, order: wire.Picture) -> None:
            await self._answer(
                wire.PictureDone(
                    id=order.id, sha256="1" * 64, width=0, height=0, format="", views=[], layout=[]
                )
            )

    def make(name: str, role: str, *, words: int) -> FakeChild:
        return (Liar if role == "prep" else FakeChild)(name, role, words=words)

    async with quick_house(tmp_path, "a", child=make) as house:
        with trio.fail_after(60):
            _, end = await collect(submit(house, chat(pictures=1, model="a")))
            assert end.error is not None
            assert end.error.code == "server_error"
    assert Blob.live == 0


# --- the parts -------------------------------------------------------------------------------


async def test_claimed_rows_stay() -> None:
    with EmbeddingCache(400) as cache, cache.wanted("z"):
        await put(cache, "a", "b")
        assert not cache.claim(["a", "missing"])
        assert cache.claim(["a"])
        assert cache.claim(["a", "b"])
        await put(cache, *"cdefghz")
        assert cache.has("a")
        assert cache.has("b")
        assert cache.has("z")
        assert cache.bytes <= 400
        cache.release(["a"])
        cache.release(["a", "b"])
        await put(cache, *"ijkl")
        assert not cache.has("a")
        assert cache.has("z")
    assert Blob.live == 0


async def test_claims_leave_half_of_the_budget() -> None:
    with EmbeddingCache(400) as cache:
        await put(cache, *"abcd")
        assert not cache.claim("abc")
        assert cache.claim("ab")
        assert not cache.claim("c")
        assert cache.claim("ab")  # no byte more
        cache.release("ab")
        assert not cache.claim("c")
        cache.release("ab")
        assert cache.claim("cd")
        cache.release("cd")
    assert Blob.live == 0


async def test_what_the_first_one_waits_for_stays_longest() -> None:
    """Served in turn, with room for three of four: the rows that are needed last are not kept."""
    with EmbeddingCache(300) as cache:
        misses = 0
        with cache.wanted("a"), cache.wanted("b"), cache.wanted("c"), cache.wanted("d"):
            for _ in range(2):
                for key in "abcd":
                    if not cache.has(key):
                        misses += 1
                        await put(cache, key)
        assert misses == 5


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "MOST_VIEWS", 6)
    monkeypatch.setattr(seen, "MOST_ALIKE", 2)
    cache: Any = type("Cache", (), {"has": staticmethod(lambda _key: True)})
    known = Seen(cache)
    for name in "abc":
        known.learn(source(), picture(name, name))
    assert known.hashes(source()) == ["b", "c"]
    known.learn(source(6), picture("d", "1", "2", "3"))
    known.learn(source(6), picture("d", "1", "2", "3"))
    assert (len(known), known.hashes(source(6))) == (3, ["d"])
    known.learn(source(7), picture("e", "1", "2"))
    assert known.hashes(source()) == ["c"]
    for number in range(100):
        known.learn(source(number), picture("f", "1"))
    assert len(known) == 6
    assert len(known._alike) == 6
    assert known.hashes(source(8)) == []
    assert known.claim(source(8), "f") is None
