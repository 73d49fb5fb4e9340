"""What residency knows about one model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from rkvlmd.actors import memory
from rkvlmd.actors.engine import Pace
from rkvlmd.actors.ledger import Memo
from rkvlmd.messages import ModelState, ModelView
from rkvlmd.models import abilities

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rkvlmd.actors.lease import Grip
    from rkvlmd.actors.loading import Loaded, Part
    from rkvlmd.errors import RkvlmdError
    from rkvlmd.models.catalog import Entry


@dataclass(eq=False, slots=True)
class Record:
    """One model.

    ``held`` means: unloaded by the owner, until ``load``. ``deaths`` counts
    unplanned deaths in a row. ``detail`` is for the owner (last words),
    ``public`` for clients. ``load`` is set when the load in hand has ended;
    ``asked`` when a load that was asked for has. ``used_at`` is the time of the
    last use, ``idle_at`` the time when the model leaves unless it is used:
    never while a job has it. ``memo`` is what is remembered over a restart.
    ``successor`` is what the models folder holds of this name now, where that
    has changed while the model was loaded; ``removed``: nothing.
    """

    entry: Entry
    state: ModelState = ModelState.ABSENT
    progress: float = 0.0
    detail: str = ""
    public: str = ""
    error: RkvlmdError | None = None
    loaded: Loaded | None = None
    held: bool = False
    queued: bool = False
    deaths: int = 0
    heal_at: float = 0.0
    heal_delay: float = 0.0
    used_at: float = 0.0
    idle_at: float = 0.0
    memo: Memo = field(default_factory=Memo)
    began: float = 0.0
    expected: float | None = None
    successor: Entry | None = None
    removed: bool = False
    load: trio.Event | None = None
    load_scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    asked: trio.Event = field(default_factory=trio.Event)
    grip: Grip | None = None
    pace: Pace = field(default_factory=lambda: Pace(50.0))

    @property
    def name(self) -> str:
        """The model's name."""
        return self.entry.name

    @property
    def parts(self) -> list[Part]:
        """Its children that exist."""
        parts = self.loaded.parts if self.loaded is not None else []
        return [part for part in parts if part.child is not None]

    @property
    def decoding(self) -> bool:
        """Whether its decoder exists."""
        return self.loaded is not None and self.loaded.decoding

    @property
    def leaving(self) -> bool:
        """Whether the models folder has something else for this name, or nothing any more."""
        return self.removed or self.successor is not None

    def need(self, parts: Sequence[Part], conversations: int = 0) -> int:
        """Bytes that starting these parts needs: files, cache, overhead, or the most they took.

        ``conversations`` is what the decoder may keep of others than the present one.
        """
        peaks = self.memo.peak_bytes
        return sum(max(self._estimate(p, conversations), peaks.get(p.key, 0)) for p in parts)

    def _estimate(self, part: Part, conversations: int) -> int:
        if part.role != "decoder":
            return part.size
        decoder = self.entry.manifest.decoder
        cache = decoder.kv_bytes_per_token * decoder.context + conversations
        return part.size + cache + memory.OVERHEAD_BYTES

    def measure(self) -> None:
        """Keep the most that each part was seen to hold."""
        peaks = self.memo.peak_bytes
        for part in self.parts:
            peaks[part.key] = max(peaks.get(part.key, 0), part.resident())

    def resident(self, role: str = "") -> int:
        """Resident bytes of the model's children, or of those of one role."""
        return sum(part.resident() for part in self.parts if role in ("", part.role))

    def seconds_left(self, now: float) -> float | None:
        """Estimate the rest of a load; ``None`` while there is no telling.

        The second half of ``progress`` is the start of the children. What that
        took last time is ``expected``; the first half is the check of the
        hashes, whose own pace tells its rest.
        """
        if self.state is not ModelState.LOADING or not self.began:
            return None
        passed, done = now - self.began, self.progress * 2
        if done < 1:  # the hashes are checked
            if done < 0.05 or self.expected is None:
                return None
            return passed * (1 - done) / done + self.expected
        if self.expected is not None:
            # Slower than last time: nobody knows by how much.
            return self.expected - passed if passed < self.expected else None
        return passed * (2 - done) / (done - 1) if done > 1.1 else None

    def view(self, *, default: bool) -> ModelView:
        """Return what fronts show."""
        manifest, now = self.entry.manifest, trio.current_time()
        engines = (*(e.engine for e in manifest.encoders), manifest.decoder.engine)
        return ModelView(
            name=self.name,
            family=manifest.family,
            state=self.state,
            context=manifest.decoder.context,
            image=bool(manifest.encoders),
            created=self.entry.created,
            digest=self.entry.digest,
            progress=self.progress,
            detail=self.detail,
            memory_bytes=self.resident(),
            held=self.held,
            default=default,
            pinned=self.memo.pinned,
            seconds_left=self.seconds_left(now),
            idle_seconds=self._idle_seconds(now),
            encoders_kept=0 if self.decoding or self.loaded is None else len(self.loaded.children),
            engines=engines,
            adapters=tuple(adapter.name for adapter in manifest.decoder.adapters),
            makes=abilities.makes(manifest),
            video=abilities.videos(manifest),
            thinking=manifest.thinking is not None,
        )

    def _idle_seconds(self, now: float) -> float | None:
        if self.loaded is None or self.memo.pinned or math.isinf(self.idle_at):
            return None
        return max(0.0, self.idle_at - now)
