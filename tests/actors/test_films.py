"""A video for a model of patches of several frames: its inputs, their keys, and who owns what."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from rkvlmd.actors import blobs, films
from rkvlmd.actors.blobs import Blob
from rkvlmd.actors.ready import Picture
from rkvlmd.engine import frames_order
from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import VideoSource
from rkvlmd.models import films as rules
from rkvlmd.settings import Settings
from rkvlmd.wire import child as wire
from tests.fakes import videos
from tests.unit.test_films import VIDEO, manifest

SOURCE = VideoSource("base64", "", "messages[0].content[0].video_url.url")


class Prep:
    """Does an order at once, in this process, as the pool of children would."""

    def __init__(self) -> None:
        self.orders: list[wire.Frames] = []

    async def do(self, build: Any, files: Sequence[Blob], *, expect: Any) -> Any:
        order = build(len(self.orders) + 1)
        self.orders.append(order)
        heard: list[Any] = []

        def send(message: Any, fds: Sequence[int] = ()) -> None:
            # The order closes its own.
            heard.append((message, [Blob(os.dup(fd)) for fd in fds]))

        try:
            frames_order.work(order, [file.fd for file in files], send)
        finally:
            for file in files:
                file.close()
        ((message, made),) = heard
        assert isinstance(message, expect)
        return message, made


class House:
    """What preparing a video needs of the daemon, and what it was told."""

    def __init__(self, family: str = "qwen2_vl", **video: Any) -> None:
        self.entry: Any = SimpleNamespace(
            manifest=manifest(family, video=VIDEO | video), digest=f"{family} {video}",
            folder=Path("/nowhere"),
        )  # fmt: skip
        self.prep = Prep()
        self.tools: Any = SimpleNamespace(prep=self.prep, settings=Settings())
        self.pixels = 0
        self.job: Any = SimpleNamespace(count_pixels=self._count, spent=lambda *_: None)

    def _count(self, pixels: int) -> None:
        self.pixels += pixels

    async def film(
        self, stack: ExitStack, greys: Sequence[int], times: Sequence[float] = ()
    ) -> Picture:
        rule = rules.of(self.entry.manifest)
        assert rule is not None
        files = [await blobs.from_bytes(videos.jpeg(grey, (64, 48)), "frame") for grey in greys]
        return await films.prepare_film(
            self.job, SOURCE, rule, files, times, (64, 48), 3, self.entry, self.tools, stack
        )


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Any:
    before = Blob.live
    yield
    assert Blob.live == before


async def test_each_patch_in_time_is_a_view() -> None:
    house = House()
    with ExitStack() as stack:
        film = await house.film(stack, [0, 50, 100, 150, 200])
        assert film.video == 3
        assert film.layout == ("<a>", 0, 1, 2, "<b>")
        assert [view.time for view in film.views] == [0, 1, 2]
        assert {view.patches for view in film.views} == {(1, 4, 4)}
        assert len({view.key for view in film.views}) == 3
        assert len(film.sha256.split()) == 3
        # Two frames of 56 x 56 pixels each.
        assert house.pixels == film.pixels == 3 * 2 * 56 * 56
        assert {order.size for order in house.prep.orders} == {(56, 56)}


async def test_a_key_holds_frames_place_in_time_and_size() -> None:
    house = House()
    with ExitStack() as stack:
        first = await house.film(stack, [9, 9, 9, 9])
        again = await house.film(stack, [9, 9, 9, 9])
        assert [v.key for v in first.views] == [v.key for v in again.views]
        # The same frames at another time: rows in a KV cache would have other positions.
        assert first.views[0].key != first.views[1].key
        other = await house.film(stack, [9, 9, 9, 8])
        assert other.views[0].key == first.views[0].key
        assert other.views[1].key != first.views[1].key
        smaller = await House(max_pixels=784, min_pixels=784).film(stack, [9, 9, 9, 9])
        assert smaller.views[0].key != first.views[0].key


async def test_times_in_words_need_no_axis() -> None:
    with ExitStack() as stack:
        film = await House("qwen3_vl").film(stack, [9, 9, 9, 9], [0.0, 1.0, 2.0, 3.0])
        assert film.layout[1] == "<0.5 seconds>"
        assert len({view.key for view in film.views}) == 1


async def test_a_bad_frame_gives_everything_back() -> None:
    house = House()
    rule = rules.of(house.entry.manifest)
    assert rule is not None
    good, bad = videos.jpeg(9, (64, 48)), b"nothing"
    files = [await blobs.from_bytes(data, "frame") for data in (good, good, good, bad)]
    with ExitStack() as stack, pytest.raises(RkvlmdError, match="A frame of the video is no"):
        await films.prepare_film(
            house.job, SOURCE, rule, files, (), (64, 48), 0, house.entry, house.tools, stack
        )


async def test_a_child_that_answers_something_else_is_not_believed() -> None:
    house = House()
    done = house.prep.do

    async def other(*given: Any, **named: Any) -> Any:
        message, made = await done(*given, **named)
        (view,) = message.views
        large = msgspec.structs.replace(view, tokens=101)
        return msgspec.structs.replace(message, views=[large]), made

    house.prep.do = other  # type: ignore[method-assign]
    with ExitStack() as stack, pytest.raises(RkvlmdError, match="unknown shape"):
        await house.film(stack, [1, 2])
