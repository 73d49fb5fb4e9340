"""Follow-ups over real children: what the daemon knows of their caches, and what it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from rkvlmd.actors.house import House
from rkvlmd.actors.job import Job
from rkvlmd.messages import ChatRequest, Ended, PicturePart, PictureSource, TextPart, Turn
from rkvlmd.models.catalog import DEMO
from tests.fakes import scripted, tiny_model
from tests.fakes.scripted import PNG, collect, in_order, submit, until_phase
from tests.npusim import folders
from tests.npusim import house as npu
from tests.npusim.fixture import Sim

pytestmark = pytest.mark.process

LONG = "Say all that there is to say about the number {}. " + "Say it again. " * 12


def request(*texts: str, model: str, **more: Any) -> ChatRequest:
    """User and assistant in turn."""
    turns = tuple(
        Turn("assistant" if i % 2 else "user", (TextPart(text),)) for i, text in enumerate(texts)
    )
    return ChatRequest(turns=turns, model=model, **more)


async def ask(house: House, *texts: str, model: str, client: str = "c") -> tuple[str, Ended]:
    text, end = await collect(submit(house, request(*texts, model=model, max_tokens=8), client))
    assert end.reason in ("stop", "length"), end
    return text, end


async def queued(house: House, client: str, *texts: str, model: str) -> Job:
    job = submit(house, request(*texts, model=model), client)
    await until_phase(house, job, "waiting")
    return job


async def test_a_follow_up_is_served_before_its_cache_is_overwritten(tmp_path: Path) -> None:
    scripts = scripted.Scripts({}, {"tokens": 4}, {})
    async with scripted.open_house(tmp_path, scripts=scripts) as house:
        with trio.fail_after(60):
            first = LONG.format(1)
            said, _ = await ask(house, first, model="scripted")
            async with house.tools.lease.hold("test", "scripted"):
                jobs = {
                    "x": await queued(house, "x", LONG.format(2), model="scripted"),
                    "y": await queued(house, "y", LONG.format(3), model="scripted"),
                    "follow-up": await queued(house, "c", first, said, "And?", model="scripted"),
                }
            assert await in_order(jobs) == ["follow-up", "x", "y"]
            assert jobs["follow-up"].cached_tokens > len(first)
            assert jobs["x"].cached_tokens < 60  # as far as all of them begin alike


async def test_a_conversation_on_one_picture_computes_its_new_turns_alone(tmp_path: Path) -> None:
    """Six turns with the demo model: from the second on, no token is computed twice."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "demo").symlink_to(DEMO)
    picture = PictureSource("base64", PNG, "messages[0].content[0].image_url")
    async with npu.open_house(Sim(tmp_path)) as house:
        with trio.fail_after(240):
            turns: list[Turn] = []
            before = 0
            for number in range(6):
                parts: list[Any] = [
                    TextPart("What do you see?" if not number else "And what else?")
                ]
                turns.append(Turn("user", (PicturePart(0), *parts) if not number else (*parts,)))
                asked = ChatRequest(
                    turns=tuple(turns), pictures=(picture,), model="demo", max_tokens=24
                )
                text, end = await collect(submit(house, asked))
                assert end.reason in ("stop", "length"), end
                usage = end.usage
                # The last token of an answer that was cut short is still to be computed.
                late = end.reason == "length"
                if number:
                    assert usage.cached_tokens >= before, (number, usage)
                before = usage.prompt_tokens + usage.completion_tokens - late
                turns.append(Turn("assistant", (TextPart(text),)))
            assert house.tools.cache.misses == 1
            assert house.tools.cache.hits == 5
            decoded = house.tools.metrics.picture_decode.series[()]
            assert sum(decoded.counts) == 1


@pytest.mark.parametrize("budget", [0, 64 << 20])
async def test_the_cpu_engine_keeps_several_conversations(tmp_path: Path, budget: int) -> None:
    tiny_model.make_model(tmp_path / "models" / "tiny", context=400)
    cache = {"conversations_bytes": budget}
    async with npu.open_house(Sim(tmp_path), cache=cache) as house:
        with trio.fail_after(120):
            chats: dict[int, list[str]] = {n: [f"Number {n}: " + "abc " * 20] for n in range(3)}
            for turn in range(3):
                for n, texts in chats.items():
                    said, end = await ask(house, *texts, model="tiny", client=f"c{n}")
                    usage = end.usage
                    new = usage.prompt_tokens - usage.cached_tokens
                    if turn and budget:
                        # What the model says is no text that can be read again, so the answer
                        # and the new turn.
                        assert new < 50, (turn, n, usage)
                    elif turn:
                        assert new > 60
                    chats[n] = [*texts, said, "And?"]
            assert house.tools.warm.conversations == (3 if budget else 1)


@pytest.mark.parametrize("budget", [0, 8 << 20])
async def test_conversations_in_turn_on_the_npu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    sim = npu.plug_in(tmp_path, monkeypatch)
    # So slow that a file is faster, also on a busy machine: that is measured.
    monkeypatch.setenv("NPUSIM_PREFILL_MS", "0.5")
    monkeypatch.setenv("NPUSIM_RESTORE_MS", "0.001")
    monkeypatch.setenv("NPUSIM_REPLY", "count")
    folders.write(tmp_path / "models" / "m", vision=False)
    async with npu.open_house(sim, npu={"conversations_bytes": budget}) as house:
        with trio.fail_after(120):
            chats: dict[int, list[str]] = {n: [LONG.format(n)] for n in range(4)}
            for turn in range(3):
                for n, texts in chats.items():
                    said, _ = await ask(house, *texts, model="m", client=f"c{n}")
                    chats[n] = [*texts, said, "And?"]
                    computed = sim.one("prefill")["computed"]
                    if turn and budget:
                        assert computed < 100
                    elif turn:
                        assert computed > 150
            # The one that was served last comes first, if the others must be computed again.
            async with house.tools.lease.hold("test", "m"):
                jobs = {
                    f"chat {n}": await queued(house, f"c{n}", *chats[n], model="m")
                    for n in range(4)
                }
            names = await in_order(jobs)
            assert names[0] == ("chat 0" if budget else "chat 3")
            assert house.tools.warm.conversations >= (4 if budget else 1)
    assert not sim.trace("misuse")
