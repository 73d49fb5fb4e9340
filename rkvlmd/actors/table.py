"""The table of models: what exists, in which state, and what a request may expect."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import trio

from rkvlmd.actors.engine import Pace
from rkvlmd.actors.records import Record
from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import ModelState, ModelView

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rkvlmd.models.catalog import Entry
    from rkvlmd.settings import Settings


class ModelTable:
    """Everything here looks, and never waits; ``Residency`` adds what changes models."""

    def __init__(self, settings: Settings, entries: Mapping[str, Entry]) -> None:
        self._settings = settings
        self._records = {name: self._new(entry) for name, entry in entries.items()}
        self._changed = trio.Event()

    def _new(self, entry: Entry) -> Record:
        return Record(entry, pace=Pace(self._settings.engine.prefill_rate))

    def models(self) -> list[ModelView]:
        """Return every model, by name."""
        default = self._default()
        return [r.view(default=r is default) for r in self._records.values()]

    def model(self, name: str | None) -> ModelView:
        """Return one model, or one with an adapter; ``None`` and ``default`` mean the default one.

        Raises:
          RkvlmdError: ``model_not_found``.

        """
        record = self._record(name)
        view = record.view(default=record is self._default())
        if name in (None, "", "default", view.name):
            return view
        return replace(view, name=name, parent=view.name, default=False, adapters=())

    def entry(self, name: str) -> Entry:
        """Return what the catalogue says about a model that exists."""
        return self._record(name).entry

    def pace(self, name: str) -> Pace:
        """Return what was measured on a model that exists."""
        return self._records[name].pace

    def decoder_info(self, name: str) -> dict[str, Any]:
        """Return what the decoder of a model said when it was loaded; empty while it is not."""
        record = self._records.get(name)
        parts = record.loaded.parts if record is not None and record.loaded is not None else []
        return next((part.info for part in parts if part.role == "decoder"), {})

    def ready(self) -> bool:
        """Whether a request without a model name can be served."""
        record = self._default()
        if record is None:
            return False
        try:
            self.admit(record.name)
        except RkvlmdError:
            return False
        return record.state is ModelState.READY or self._settings.models.on_demand

    def loaded_name(self) -> str:
        """Return the model whose decoder is loaded, or an empty string."""
        return next((n for n, r in self._records.items() if r.decoding), "")

    def loading(self, name: str) -> bool:
        """Whether this model is being loaded."""
        record = self._records.get(name)
        return record is not None and record.state is ModelState.LOADING

    def _pinned(self) -> Record | None:
        return next((r for r in self._records.values() if r.memo.pinned), None)

    def _check_pin(self, record: Record) -> None:
        """Refuse a load that would need the place of a pinned model."""
        pinned = self._pinned()
        if pinned is not None and pinned is not record:
            raise RkvlmdError(
                "model_pinned",
                f"The model '{pinned.name}' is pinned by the owner of this server, so no other"
                " can be loaded.",
                param="model",
                should_retry=False,
            )

    def children(self) -> list[dict[str, object]]:
        """Return a line for each engine child."""
        return [line for r in self._records.values() if r.loaded for line in r.loaded.lines()]

    def overdue(self, slack: float) -> bool:
        """Whether a child is past a deadline that should have ended it."""
        now = trio.current_time()
        return any(
            child.due + slack < now
            for record in self._records.values()
            if record.loaded
            for child in record.loaded.children
        )

    async def wait_change(self) -> None:
        """Return at the next change of any model's view; the latest value wins."""
        await self._changed.wait()

    def _note(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _default(self) -> Record | None:
        wanted = self._settings.models.default
        if wanted:
            return self._records.get(wanted)
        if pinned := self._pinned():
            return pinned
        if loaded := self.loaded_name():
            return self._records[loaded]
        own = [r for n, r in self._records.items() if n != "demo"]
        return next(iter(own or self._records.values()), None)

    def _record(self, name: str | None) -> Record:
        record = self._default() if name in (None, "", "default") else self._named(name or "")
        if record is None:
            raise RkvlmdError(
                "model_not_found",
                "There is no such model. The models of this server are listed at /v1/models.",
                param="model",
            )
        return record

    def _named(self, name: str) -> Record | None:
        """Return the record of ``MODEL`` or ``MODEL:ADAPTER``."""
        base, _, adapter = name.partition(":")
        record = self._records.get(base)
        if record is None or not adapter:
            return record if base == name else None
        known = {a.name for a in record.entry.manifest.decoder.adapters}
        return record if adapter in known else None

    def admit(self, name: str) -> None:
        """Say at once what makes a request for this model pointless.

        Raises:
          RkvlmdError: ``model_unloaded``, ``model_pinned``, ``model_failed`` or
            ``model_not_loaded``.

        """
        record = self._record(name)
        if record.held:
            raise RkvlmdError(
                "model_unloaded", "The model was unloaded by the owner of this server.",
                param="model", should_retry=False,
            )  # fmt: skip
        self._check_pin(record)
        if record.state is ModelState.FAILED and (wait := self._heal_wait(record)) > 0:
            raise self._failed(record, wait)
        if (
            record.state in (ModelState.ABSENT, ModelState.UNLOADING)
            and not self._settings.models.on_demand
        ):
            raise RkvlmdError(
                "model_not_loaded",
                "The model is not loaded, and models.on_demand is off.",
                param="model",
                should_retry=False,
            )

    def _heal_wait(self, record: Record) -> float:
        return record.heal_at - trio.current_time()

    def _failed(self, record: Record, wait: float) -> RkvlmdError:
        return RkvlmdError(
            "model_failed",
            f"The model failed to load or kept crashing ({record.public}).",
            param="model",
            retry_after=max(1, min(120, math.ceil(wait))),
        )
