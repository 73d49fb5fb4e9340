"""What residency knows about one model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from rkvlmd.actors import memory
from rkvlmd.actors.engine import Pace
from rkvlmd.messages import ModelState, ModelView

if TYPE_CHECKING:
    from rkvlmd.actors.lease import Grip
    from rkvlmd.actors.loading import Loaded, LoadError
    from rkvlmd.errors import RkvlmdError
    from rkvlmd.models.catalog import Entry


@dataclass(eq=False, slots=True)
class Record:
    """One model.

    ``held`` means: unloaded by the owner, until ``load``. ``deaths`` counts
    unplanned deaths in a row. ``detail`` is for the owner (last words),
    ``public`` for clients. ``load`` is set when the load in hand has ended;
    ``asked`` when a load that was asked for has.
    """

    entry: Entry
    state: ModelState = ModelState.ABSENT
    progress: float = 0.0
    detail: str = ""
    public: str = ""
    error: RkvlmdError | None = None
    exhausted: LoadError | None = None
    loaded: Loaded | None = None
    held: bool = False
    queued: bool = False
    deaths: int = 0
    heal_at: float = 0.0
    heal_delay: float = 0.0
    peak: int = 0
    load: trio.Event | None = None
    load_scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    asked: trio.Event = field(default_factory=trio.Event)
    grip: Grip | None = None
    owner: Grip | None = None
    pace: Pace = field(default_factory=lambda: Pace(50.0))

    @property
    def name(self) -> str:
        """The model's name."""
        return self.entry.name

    def need(self) -> int:
        """Bytes that a load needs: files, cache and overhead, or what it took last time."""
        decoder = self.entry.manifest.decoder
        asked = (
            self.entry.bytes + decoder.kv_bytes_per_token * decoder.context + memory.OVERHEAD_BYTES
        )
        return max(asked, self.peak)

    def resident(self) -> int:
        """Resident bytes of the model's children."""
        if self.loaded is None:
            return 0
        return sum(memory.resident(child.pid) for child in self.loaded.children)

    def view(self, *, default: bool) -> ModelView:
        """Return what fronts show."""
        manifest = self.entry.manifest
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
            engines=engines,
            adapters=tuple(adapter.name for adapter in manifest.decoder.adapters),
        )
