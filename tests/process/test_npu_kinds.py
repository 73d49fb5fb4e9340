"""Kinds of models that the NPU's libraries serve in more than one way, in real children."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from rkvlmd.actors.blobs import Blob
from tests.fakes.scripted import chat, collect, submit
from tests.npusim import folders, models
from tests.npusim.fixture import Sim
from tests.npusim.house import open_house, plug_in

pytestmark = pytest.mark.process

SIZES = (2, 3, 4)


@pytest.fixture
def sim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sim]:
    yield plug_in(tmp_path, monkeypatch)
    assert Blob.live == 0


async def ask(house: Any, text: str, pictures: int) -> dict[str, str]:
    with trio.fail_after(60):
        said, end = await collect(submit(house, chat(text, pictures, model="m", max_tokens=400)))
    assert end.reason == "stop", end
    return models.answer(said)


@pytest.mark.parametrize("version", ["1.2.3", "1.3.1"])
async def test_pictures_beside_the_prompt(sim: Sim, version: str) -> None:
    folders.write(sim.folder / "models" / "m", cross=SIZES)
    async with open_house(sim, version=version) as house:
        said = await ask(house, "what is it?", 1)
        picture = sim.one("encode")["picture"]
        caches = models.caches_of(picture, folders.TOKENS, *SIZES)
        assert said["cross"] == models.cross_sum([caches])
        encodes = len(sim.trace("encode"))
        # The same picture twice: its caches one after the other, encoded once and kept.
        said = await ask(house, "and these?", 2)
        assert said["cross"] == models.cross_sum([caches, caches])
        assert len(sim.trace("encode")) == encodes
        said = await ask(house, "hello", 0)
        assert sim.one("cross")["tokens"] == 1
    assert not sim.trace("misuse")


@pytest.mark.parametrize("kind", ["none", "nan", "outputs"])
async def test_caches_that_are_none(sim: Sim, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    folders.write(sim.folder / "models" / "m", cross=SIZES)
    monkeypatch.setenv("NPUSIM_FAULT", f"{kind}@encode:skip=1")
    async with open_house(sim) as house:
        with trio.fail_after(60):
            _, end = await collect(submit(house, chat("x", 1, model="m")))
        assert end.error is not None
        assert end.error.code == "engine_error"
        assert (await ask(house, "x", 1))["cross"]
    assert sim.one("fault")["kind"] == kind


async def test_an_encoder_of_other_caches_is_not_loaded(sim: Sim) -> None:
    folders.write(sim.folder / "models" / "m", cross=SIZES, vision_file={"cross": (2, 4, 3)})
    async with open_house(sim) as house:
        with trio.fail_after(60), pytest.raises(Exception, match="keys are 2 x 4 x 4 x 3"):
            await house.residency.load("m")
        assert "encoders[0].file" in house.residency.model("m").detail
