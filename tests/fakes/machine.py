"""A machine whose memory is counted by hand: children of known size, in the test's loop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rkvlmd.actors import memory
from rkvlmd.actors.house import House
from rkvlmd.actors.ledger import FILE, Ledger
from rkvlmd.actors.prep import Prep
from rkvlmd.wire import child as wire
from tests.fakes.children import FakeChild, FakeLoader
from tests.fakes.parts import house_of
from tests.fakes.scripted import make_model, settings_for

MB = 1_000_000


@dataclass
class Machine:
    """``total`` bytes of memory; each child takes what ``sizes`` says of its role.

    ``started`` has the name of each engine child in the order of their starts.
    """

    total: int = 8000 * MB
    sizes: dict[str, int] = field(
        default_factory=lambda: {"decoder": 300 * MB, "encoder": 100 * MB}
    )
    started: list[str] = field(default_factory=list)
    children: dict[int, FakeChild] = field(default_factory=dict)
    words: int = 3
    #: What the children's own allocator has, which nobody else can see; bytes.
    hidden: int = 1 << 50

    def child(self, name: str, role: str) -> FakeChild:
        made = FakeChild(name, role, words=self.words)
        if role != "prep":
            made.pid = 1 + len(self.children)
            self.children[made.pid] = made
            self.started.append(name)
            made.load = self.load
        return made

    def resident(self, pid: int, *_: Any) -> int:
        made = self.children.get(pid)
        return self.sizes[made.role] if made is not None and not made.dead.is_set() else 0

    def load(self) -> wire.Ready | wire.Failed:
        """Answer a child that loads: there must be memory for all that live."""
        if sum(self.resident(pid) for pid in self.children) <= self.hidden:
            return wire.Ready()
        return wire.Failed(
            id=0, code="insufficient_memory", message="There is not enough memory on the NPU."
        )

    def free(self) -> int:
        return self.total - sum(self.resident(pid) for pid in self.children)

    def alive(self) -> list[str]:
        return sorted(c.name for c in self.children.values() if not c.dead.is_set())

    def named(self, name: str) -> FakeChild:
        """Return the living child of this name."""
        (found,) = [c for c in self.children.values() if c.name == name and not c.dead.is_set()]
        return found

    @asynccontextmanager
    async def house(
        self, tmp: Path, *names: str, ledger: bool = False, **sections: dict[str, Any]
    ) -> AsyncIterator[House]:
        """Start a house on this machine; with ``ledger`` it remembers in ``tmp``."""
        settings = settings_for(tmp, **sections)
        for name in names:
            if not (tmp / "models" / name).exists():
                make_model(tmp / "models", name)
        make: Any = self.child
        loader = FakeLoader(settings, tmp, make_child=make)
        prep = Prep(settings, lambda name: make(name, "prep"))
        kept = Ledger(tmp / FILE) if ledger else None
        async with house_of(settings, loader, prep, room=self.free, ledger=kept) as house:
            yield house


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Return a machine with 8 GB, which ``memory.resident`` asks."""
    made = Machine()
    monkeypatch.setattr(memory, "resident", made.resident)
    return made
