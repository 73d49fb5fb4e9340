"""Work that arrives together is spread over turns of the loop, so that none is long."""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any

import pytest
import trio
import trio.abc

from rkvlmd.actors import blobs
from rkvlmd.actors.blobs import Blob
from rkvlmd.front.http import intake
from rkvlmd.wire.openai import parse_chat
from tests.fakes.house import connected, running


class Turns(trio.abc.Instrument):
    """Counts the turns of the loop, and what happens in each."""

    def __init__(self) -> None:
        self.number = 0
        self.work: Counter[int] = Counter()

    def before_io_wait(self, timeout: float) -> None:
        self.number += 1

    def happens(self) -> None:
        self.work[self.number] += 1


@pytest.fixture
async def turns() -> Any:
    counting = Turns()
    trio.lowlevel.add_instrument(counting)
    yield counting
    trio.lowlevel.remove_instrument(counting)


async def test_one_chunk_of_all_files_in_a_turn(
    turns: Turns, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def counted(fd: int, data: Any) -> int:
        turns.happens()
        return write(fd, data)

    made: list[Blob] = []

    async def fill(number: int) -> None:
        made.append(await blobs.from_text(str(number) * 3 * blobs._CHUNK))

    with trio.fail_after(60):
        monkeypatch.setattr(os, "write", counted)
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(fill, number)
        monkeypatch.undo()
    assert turns.work.total() == 24
    assert max(turns.work.values()) == 1
    for blob in made:
        assert len(set(os.pread(blob.fd, blob.size, 0))) == 1
        blob.close()
    assert Blob.live == 0


async def test_one_large_body_is_parsed_in_a_turn(
    turns: Turns, monkeypatch: pytest.MonkeyPatch
) -> None:

    def counted(*args: Any) -> Any:
        turns.happens()
        return parse_chat(*args)

    arrived: list[bytes] = []
    all_there = trio.Event()
    read = intake._body

    async def together(*args: Any) -> bytes:
        arrived.append(await read(*args))
        if len(arrived) == 8:
            all_there.set()
        await all_there.wait()
        return arrived[-1]

    monkeypatch.setattr("rkvlmd.front.http.chat.parse_chat", counted)
    monkeypatch.setattr(intake, "_body", together)
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 400_000}]}).encode()

    with trio.fail_after(60):
        async with running() as house:

            async def ask() -> None:
                async with connected(house) as client:
                    await client.post(body)
                    assert (await client.reply()).status == 200

            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(ask)
    assert turns.work.total() == 8
    assert max(turns.work.values()) == 1
