"""A daemon without engines: everything that the control socket asks for, moved by hand."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import trio

from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import JobView, ModelState, ModelView
from rkvlmd.settings import Settings


def a_model(name: str, **changes: Any) -> ModelView:
    """Return a model that is not loaded."""
    view = ModelView(
        name=name,
        family="smolvlm",
        state=ModelState.ABSENT,
        context=1024,
        image=True,
        created=1_700_000_000,
        digest="0" * 64,
        engines=("onnx",),
    )
    return replace(view, **changes)


def a_job(job_id: str, **changes: Any) -> JobView:
    """Return a job that generates."""
    view = JobView(
        id=job_id,
        client="127.0.0.1",
        model="demo",
        phase="generating",
        age=1.5,
        pictures=1,
        prompt_tokens=90,
        completion_tokens=7,
        stream=True,
    )
    return replace(view, **changes)


class FakeScheduler:
    """Jobs by id."""

    def __init__(self) -> None:
        self.live: dict[str, JobView] = {}
        self.paused = False
        self._empty = trio.Event()

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    async def wait_empty(self) -> None:
        while self.live:
            await self._empty.wait()

    def end_all(self) -> None:
        """End every job."""
        self.live.clear()
        self._empty.set()
        self._empty = trio.Event()

    def jobs(self) -> list[JobView]:
        return list(self.live.values())

    def cancel(self, job_id: str) -> bool:
        return self.live.pop(job_id, None) is not None


class FakeResidency:
    """Models by name; ``finish``, ``fail`` and ``step`` move a load that somebody asked for."""

    def __init__(self, *names: str) -> None:
        self.views = {name: a_model(name) for name in names}
        self.changed = trio.Event()
        self.waiters = 0
        self.asked: list[str] = []
        self._ends: dict[str, trio.Event] = {}
        self._errors: dict[str, RkvlmdError] = {}

    def models(self) -> list[ModelView]:
        return list(self.views.values())

    def model(self, name: str | None) -> ModelView:
        if name not in self.views:
            raise RkvlmdError("model_not_found", "there is no such model", param="model")
        return self.views[name]

    async def load(self, name: str) -> ModelView:
        return await self._act("load", name, ModelState.LOADING)

    async def unload(self, name: str) -> ModelView:
        return await self._act("unload", name, ModelState.UNLOADING)

    async def pin(self, name: str) -> ModelView:
        await self._act("pin", name, ModelState.LOADING)
        self.change(name, pinned=True)
        return self.views[name]

    async def unpin(self, name: str) -> ModelView:
        await trio.lowlevel.checkpoint()
        self.asked.append(f"unpin {name}")
        self.model(name)
        self.change(name, pinned=False)
        return self.views[name]

    async def _act(self, what: str, name: str, state: ModelState) -> ModelView:
        self.asked.append(f"{what} {name}")
        end = self._ends.setdefault(name, trio.Event())
        self.change(name, state=state)
        self.waiters += 1
        try:
            await end.wait()
        finally:
            self.waiters -= 1
        if error := self._errors.pop(name, None):
            raise error
        return self.views[name]

    async def wait_change(self) -> None:
        await self.changed.wait()

    def change(self, name: str, **changes: Any) -> None:
        self.views[name] = replace(self.views[name], **changes)
        self.changed.set()
        self.changed = trio.Event()

    def finish(self, name: str, state: ModelState = ModelState.READY) -> None:
        self.change(name, state=state, progress=1.0)
        self._ends.pop(name).set()

    def fail(self, name: str, error: RkvlmdError) -> None:
        self._errors[name] = error
        self.change(name, state=ModelState.FAILED, detail=error.message)
        self._ends.pop(name).set()


@dataclass
class FakeHouse:
    """Two models, no jobs, nothing loaded."""

    settings: Settings = field(default_factory=Settings)
    scheduler: FakeScheduler = field(default_factory=FakeScheduler)
    residency: FakeResidency = field(default_factory=lambda: FakeResidency("demo", "other"))
    http_address: str = "http://127.0.0.1:1"
    stopping: bool = False
    reloaded: dict[str, Any] = field(default_factory=dict)

    @property
    def draining(self) -> bool:
        return self.scheduler.paused

    async def reload(self) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        return self.reloaded

    def status(self) -> dict[str, Any]:
        return {
            "version": "0.1.0",
            "pid": 1,
            "uptime": 3.25,
            "http": self.http_address,
            "stopping": self.stopping,
            "models": [{"name": v.name, "state": v.state.value} for v in self.residency.models()],
            "children": [
                {"name": "prep-0", "pid": 7, "state": "idle", "restarts": 0, "memory": 40 << 20}
            ],
            "queue": {"jobs": len(self.scheduler.live), "bytes": 0},
            "prep": {"children": 1},
            "cache": {"bytes": 0, "entries": 0},
        }
