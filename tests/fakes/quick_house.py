"""A house of real actors whose children live inside the test's loop: no process, no clock."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rkvlmd.actors.house import House
from rkvlmd.actors.prep import Prep
from tests.fakes.children import FakeChild, FakeLoader
from tests.fakes.parts import house_of
from tests.fakes.scripted import make_model, settings_for


@asynccontextmanager
async def quick_house(
    tmp: Path,
    *names: str,
    words: int = 3,
    child: Callable[..., FakeChild] = FakeChild,
    **sections: dict[str, Any],
) -> AsyncIterator[House]:
    """Start prep, residency and scheduler; answers have ``words`` words."""
    settings = settings_for(tmp, **sections)
    for name in names:
        if not (tmp / "models" / name).exists():
            make_model(tmp / "models", name)

    def make(name: str, role: str) -> Any:
        return child(name, role, words=words)

    loader = FakeLoader(settings, tmp, make_child=make)
    prep = Prep(settings, lambda name: make(name, "prep"))
    async with house_of(settings, loader, prep) as house:
        yield house
