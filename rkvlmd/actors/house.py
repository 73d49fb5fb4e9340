"""The parts of the daemon, as the fronts see them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio

import rkvlmd
from rkvlmd.actors import memory
from rkvlmd.actors.blobs import Blob

if TYPE_CHECKING:
    from rkvlmd.actors.metrics import Metrics
    from rkvlmd.actors.pipeline import Tools
    from rkvlmd.actors.residency import Residency
    from rkvlmd.actors.scheduler import Scheduler
    from rkvlmd.settings import Settings

#: How far past its deadline a child may be before the watchdog stops, seconds.
WATCHDOG_SLACK = 10.0


@dataclass(eq=False)
class House:
    """``stop`` is set by the first signal; ``stopping`` is true from then on."""

    settings: Settings
    tools: Tools
    scheduler: Scheduler
    http_address: str = ""
    stop: trio.Event = field(default_factory=trio.Event)
    stop_again: trio.Event = field(default_factory=trio.Event)
    started: float = field(default_factory=trio.current_time)
    problems: tuple[str, ...] = ()

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

    def healthy(self) -> bool:
        """Whether no child is past a deadline that should have ended it."""
        late = trio.current_time() - WATCHDOG_SLACK
        prep = any(child.due < late for child in self.tools.prep.children.values())
        return not prep and not self.residency.overdue(WATCHDOG_SLACK)

    def status(self) -> dict[str, Any]:
        """Return what ``rkvlmctl status`` prints; JSON values only."""
        prep, cache = self.tools.prep, self.tools.cache
        return {
            "version": rkvlmd.__version__,
            "pid": os.getpid(),
            "uptime": round(trio.current_time() - self.started, 1),
            "http": self.http_address,
            "state": "stopping" if self.stopping else "serving",
            "memory_bytes": memory.resident(os.getpid()),
            "models": [
                {"name": m.name, "state": m.state.value, "detail": m.detail, "default": m.default}
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
        }
