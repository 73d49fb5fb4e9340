"""A library that dies while it loads, of what we ask it besides: the next load asks no more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from rkvlmd.actors.blobs import Blob
from rkvlmd.engine import rkllm_probe, rkllm_prompts
from rkvlmd.errors import RkvlmdError
from tests.fakes.scripted import chat, collect, submit, waits
from tests.npusim import folders
from tests.npusim.fixture import Sim
from tests.npusim.house import open_house, plug_in

pytestmark = pytest.mark.process

SYSTEM = "<|im_start|>user\nYou are a camera. Be short. "


@pytest.fixture
def sim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sim]:
    yield plug_in(tmp_path, monkeypatch)
    assert Blob.live == 0


async def load(house: Any, name: str = "m") -> dict[str, Any]:
    """Load a model anew; return what its decoder tells."""
    with trio.fail_after(60):
        await house.residency.unload(name)
        await house.residency.load(name)
    return dict(house.residency.decoder_info(name))


async def dies(house: Any, name: str = "m") -> None:
    """A load ends with the death of the decoder, and so does the trial that follows at once."""
    with trio.fail_after(60), pytest.raises(RkvlmdError, match="ended while it loaded") as caught:
        await house.residency.load(name)
    assert caught.value.code == "model_failed"


async def answers(house: Any, pictures: int) -> None:
    with trio.fail_after(60):
        _, end = await collect(submit(house, chat("hello", pictures, model="m", max_tokens=400)))
    assert end.reason == "stop", end


@pytest.mark.parametrize("visit", [0, 1, 3], ids=["picture", "other picture", "special string"])
async def test_a_probe_that_kills_is_not_repeated(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, visit: int
) -> None:
    folders.write(sim.folder / "models" / "m")
    # It would strike in every probe: the counter is of visits, and there are no more.
    monkeypatch.setenv("NPUSIM_FAULT", f"segv@prefill:skip={visit}:times=9")
    async with open_house(sim) as house:
        # The trial that follows a death at once loads without the probe.
        told = await load(house)
        assert (len(sim.trace("fault")), len(sim.trace("prefill"))) == (1, visit)
        assert told["pictures_told_apart"] is False
        assert told["probe"]["unfinished"] is True
        assert (await load(house))["probe"]["unfinished"] is True
        monkeypatch.delenv("NPUSIM_FAULT")
        await load(house)
        await answers(house, 1)
    assert len(sim.trace("fault")) == 1


async def test_a_probe_that_ends_leaves_its_own_result(sim: Sim) -> None:
    folders.write(sim.folder / "models" / "m")
    async with open_house(sim) as house:
        for _ in range(2):
            told = await load(house)
            assert (told["pictures_told_apart"], told["probe"]["unfinished"]) == (True, False)
    (kept,) = sim.folder.rglob(rkllm_probe.FILE)
    assert [found["unfinished"] for found in json.loads(kept.read_text()).values()] == [False]


def caches(sim: Sim) -> dict[str, bytes]:
    """The files of saved prompts, by the ends of their names."""
    return {
        path.suffix: path.read_bytes()
        for folder in sim.folder.rglob(rkllm_prompts.FOLDER)
        for path in folder.iterdir()
    }


async def test_a_saved_prompt_that_kills_is_made_anew(
    sim: Sim, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders.write(sim.folder / "models" / "m", vision=False, decoder={"prompt_cache": SYSTEM})
    async with open_house(sim) as house:
        assert (await load(house))["prompt_cache"] is True
        whole = caches(sim)
        assert set(whole) == {".cache"}
        (file,) = sim.folder.rglob("*.cache")
        file.write_bytes(whole[".cache"][:-20])  # the power failed, say
        with trio.fail_after(60):
            await house.residency.unload("m")
        monkeypatch.setenv("NPUSIM_FAULT", "bus@restore")
        assert (await load(house))["prompt_cache"] is True
        assert len(sim.trace("fault")) == 1
        assert caches(sim) == whole
        assert len(sim.trace("save_cache")) == 2
        await answers(house, 0)


@pytest.mark.parametrize("place", ["restore", "prefill"])
async def test_a_library_that_dies_of_every_saved_prompt_gets_none(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folders.write(sim.folder / "models" / "m", vision=False, decoder={"prompt_cache": SYSTEM})
    monkeypatch.setenv("NPUSIM_FAULT", f"segv@{place}:times=9")
    async with open_house(sim) as house:
        await dies(house)
        assert len(sim.trace("fault")) == 2
        for _ in range(2):
            assert (await load(house))["prompt_cache"] is False
        assert set(caches(sim)) == {".trying"}
        assert len(sim.trace("fault")) == 2


async def test_a_probe_that_hangs_is_not_repeated(
    sim: Sim, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders.write(sim.folder / "models" / "m")
    monkeypatch.setenv("NPUSIM_FAULT", "hang@prefill:times=9")
    async with open_house(sim) as house:
        with trio.fail_after(60), waits(house, engine={"load_seconds": 4.0}):
            with pytest.raises(RkvlmdError) as caught:
                await house.residency.load("m")
            assert caught.value.code == "model_failed"
        assert (await load(house))["probe"]["unfinished"] is True
    assert len(sim.trace("fault")) == 1
