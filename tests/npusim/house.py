"""A house of real actors over a simulated board: real children, simulated libraries."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from rkvlmd.actors.house import House
from rkvlmd.actors.loading import Loader
from rkvlmd.actors.prep import Prep
from tests.fakes.parts import house_of
from tests.fakes.scripted import settings_for
from tests.npusim import compiler
from tests.npusim.fixture import PYTHON, Sim


def plug_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Sim:
    """Return a quick board without faults; children started from now on see it."""
    made = Sim(folder)
    for name in list(os.environ):
        if name.startswith("NPUSIM_"):
            monkeypatch.delenv(name)
    for name, value in made.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", f"{PYTHON}:{os.environ.get('PYTHONPATH', '')}")
    return made


async def traced(sim: Sim, event: str, count: int = 1) -> None:
    """Wait until the trace has so many events of a kind."""
    with trio.fail_after(60):
        while len(sim.trace(event)) < count:  # noqa: ASYNC110 - another process writes it
            await trio.sleep(0.01)


@asynccontextmanager
async def open_house(
    sim: Sim, *, version: str = "1.3.0", **sections: dict[str, Any]
) -> AsyncIterator[House]:
    """Start prep, residency and scheduler over the models in ``sim.folder / "models"``."""
    npu = {"library": str(compiler.library(version)), "soc": "rk3588", **sections.pop("npu", {})}
    settings = settings_for(sim.folder, npu=npu, **sections)
    state = Path(settings.state.dir)
    await trio.Path(state).mkdir(parents=True, exist_ok=True)
    async with house_of(settings, Loader(settings, state), Prep(settings)) as house:
        yield house
