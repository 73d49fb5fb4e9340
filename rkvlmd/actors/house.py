"""The parts of the daemon, as the fronts see them."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio

import rkvlmd
from rkvlmd.actors import memory
from rkvlmd.actors.blobs import Blob
from rkvlmd.board.root import Root

if TYPE_CHECKING:
    from rkvlmd.actors.metrics import Metrics
    from rkvlmd.actors.pipeline import Tools
    from rkvlmd.actors.residency import Residency
    from rkvlmd.actors.scheduler import Scheduler
    from rkvlmd.settings import Settings

#: How far past its deadline a child may be before the watchdog stops, seconds.
WATCHDOG_SLACK = 10.0


async def _nothing_to_reload() -> dict[str, Any]:
    await trio.lowlevel.checkpoint()
    return {"applied": [], "needs_restart": [], "rejected": []}


@dataclass(eq=False)
class House:
    """``stop`` is set by the first signal; ``stopping`` is true from then on.

    ``reload`` reads settings and models folder again, and tells what came of it.
    ``board`` is where the machine's own files are.
    """

    settings: Settings
    tools: Tools
    scheduler: Scheduler
    http_address: str = ""
    stop: trio.Event = field(default_factory=trio.Event)
    stop_again: trio.Event = field(default_factory=trio.Event)
    started: float = field(default_factory=trio.current_time)
    problems: tuple[str, ...] = ()
    board: Root = field(default_factory=Root)
    reload: Callable[[], Awaitable[dict[str, Any]]] = field(default=_nothing_to_reload)

    @property
    def residency(self) -> Residency:
        """Which models are loaded."""
        return self.tools.residency

    @property
    def metrics(self) -> Metrics:
        """What is counted."""
        return self.tools.metrics

    @property
    def stopping(self) -> bool:
        """Whether the daemon is on its way out."""
        return self.stop.is_set()

    @property
    def draining(self) -> bool:
        """Whether the owner has stopped admission for now."""
        return self.scheduler.paused

    def adopt(self, settings: Settings) -> None:
        """Hand on settings that were read again; only keys of ``live.LIVE`` may differ."""
        self.settings = self.tools.settings = settings
        self.residency.adopt(settings)
        self.scheduler.adopt(settings)
        self.tools.prep.adopt(settings)
        self.tools.fetcher.adopt(settings.media)

    def healthy(self) -> bool:
        """Whether no child is past a deadline that should have ended it."""
        late = trio.current_time() - WATCHDOG_SLACK
        prep = any(child.due < late for child in self.tools.prep.children.values())
        return not prep and not self.residency.overdue(WATCHDOG_SLACK)

    def _state(self) -> str:
        if self.stopping:
            return "stopping"
        return "draining" if self.draining else "serving"

    def status(self) -> dict[str, Any]:
        """Return what ``rkvlmctl status`` prints; JSON values only."""
        prep, cache = self.tools.prep, self.tools.cache
        return {
            "version": rkvlmd.__version__,
            "pid": os.getpid(),
            "uptime": round(trio.current_time() - self.started, 1),
            "http": self.http_address,
            "state": self._state(),
            "memory_bytes": memory.resident(os.getpid()),
            "models": [
                {
                    "name": m.name,
                    "state": m.state.value,
                    "detail": m.detail,
                    "default": m.default,
                    "pinned": m.pinned,
                    "encoders_kept": m.encoders_kept,
                    "seconds_left": m.seconds_left,
                    "idle_seconds": m.idle_seconds,
                }
                for m in self.residency.models()
            ],
            "problems": list(self.problems),
            "children": [
                *self.residency.children(),
                *(
                    {
                        "name": child.name,
                        "pid": child.pid,
                        "state": "ready" if child.alive else "starting",
                        "restarts": 0,
                        "memory_bytes": memory.resident(child.pid),
                        "info": {},
                    }
                    for child in prep.children.values()
                ),
            ],
            "queue": self.scheduler.statistics(),
            "prep": {"waiting": prep.waiting, "done": prep.done, "deaths": prep.deaths},
            "cache": {
                "pictures": len(cache),
                "bytes": cache.bytes,
                "hits": cache.hits,
                "misses": cache.misses,
            },
            "memfds": {"open": Blob.live, "bytes": Blob.live_bytes},
            "lease": {
                "held": self.tools.lease.held,
                "waiting": self.tools.lease.waiting,
                "busy_seconds": round(self.tools.lease.busy_seconds, 3),
            },
            "tokens": {
                "prompt": self.metrics.prompt_tokens.sum(),
                "cached": self.metrics.prefix_hits.sum(),
                "generated": self.metrics.generation_tokens.sum(),
            },
        }
