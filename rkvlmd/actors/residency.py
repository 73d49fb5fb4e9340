"""Which models are loaded: the owner's orders, and what leaves by itself.

The table of models is in ``table``, loads and failures are in ``loads``.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import trio

from rkvlmd.actors.ledger import Memo
from rkvlmd.actors.loads import Loads
from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import ModelState, ModelView, Rescan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rkvlmd.actors.records import Record
    from rkvlmd.models.catalog import Entry
    from rkvlmd.settings import Settings

log = logging.getLogger(__name__)

#: Shortest pause before a model that should leave, but for which somebody waits, is looked at
#: again, seconds.
_RETRY = 1.0


class Residency(Loads):
    """Owns the table of models and their children; started once by the daemon."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the models until cancelled; children leave with it."""
        memos = await self._ledger.read()
        async with trio.open_nursery() as self._nursery:
            self._loader.nursery = self._nursery
            self._recall(memos)
            for name in self._settings.models.preload:
                if name in self._records:
                    self._begin(self._records[name])
                else:
                    log.error("models.preload: there is no model %r", name)
            self._nursery.start_soon(self._leave_when_idle, name="idle models")
            self._nursery.start_soon(self._leave_under_pressure, name="memory pressure")
            task_status.started()
            await trio.sleep_forever()

    def _recall(self, memos: Mapping[str, Memo]) -> None:
        """Take over what was remembered; a pinned model is loaded again."""
        for name, memo in memos.items():
            record = self._records.get(name)
            if record is None:
                if memo.pinned:
                    log.error("the pinned model %r is not installed any more", name)
                continue
            pinned = memo.pinned and self._pinned() is None
            current = memo.digest == record.entry.digest
            record.memo = memo if current else Memo()
            record.memo.pinned = pinned
            if pinned:
                self._begin(record)

    def adopt(self, settings: Settings) -> None:
        """Take settings that were read again; another ``keep_alive`` counts from the last use."""
        before = {record.name: self._keep(record) for record in self._by_use()}
        self._settings = settings
        for record in self._by_use():
            # Who holds the lease may be at work with a model that has no end: it says when it is.
            busy = self._lease.held and math.isinf(record.idle_at)
            if self._keep(record) != before[record.name] and not busy:
                record.idle_at = record.used_at + self._keep(record)
        self._loader.adopt(settings)
        self._moved.set()

    # --- the owner's orders ---------------------------------------------------------

    async def load(self, name: str) -> ModelView:
        """Load a model, or join its load; returns when it is ready.

        Raises:
          RkvlmdError: why not.

        """
        record = self._record(name)
        self._may_load(record)
        record.held = False
        record.heal_at = 0.0
        if record.state is not ModelState.READY or record.loaded is None or not record.loaded.alive:
            if record.load is not None:
                await record.load.wait()
            else:
                self._begin(record)
                await record.asked.wait()
            if record.held:
                raise RkvlmdError("model_unloaded", "The model was unloaded meanwhile.")
            if record.state is not ModelState.READY:
                raise self._with_last_words(record)
        return self.model(record.name)

    def _may_load(self, record: Record) -> None:
        """Tell the owner at once that a pin is in the way, and what to do about it."""
        pinned = self._pinned()
        if pinned is not None and pinned is not record:
            raise RkvlmdError(
                "model_pinned", f"The model '{pinned.name}' is pinned; unpin it first."
            )

    def _with_last_words(self, record: Record) -> RkvlmdError:
        """For the owner: the error with all that is known about it."""
        error = record.error or self._failed(record, 1)
        text = record.detail if record.state is ModelState.FAILED else error.message
        return RkvlmdError(error.code, text, param=error.param)

    async def unload(self, name: str) -> ModelView:
        """Unload a model and hold it until ``load``.

        The running job ends first; queued ones end ``model_unloaded``.

        Raises:
          RkvlmdError: ``model_pinned``.

        """
        record = self._record(name)
        if record.memo.pinned:
            raise RkvlmdError(
                "model_pinned", f"The model '{record.name}' is pinned; unpin it first."
            )
        record.held = True
        self.on_unload(record.name)
        if record.load is not None:
            record.load_scope.cancel(reason="unload")
        assert self._nursery is not None
        done = trio.Event()
        self._nursery.start_soon(self._unload_later, record, done, name=f"unload:{record.name}")
        await done.wait()
        return record.view(default=record is self._default())

    async def _unload_later(self, record: Record, done: trio.Event) -> None:
        """An unload belongs to the daemon, like a load: who asked for it may leave."""
        async with self._lease.hold("", ""):
            if record.held:
                await self._take_down(record)
        done.set()

    def kill(self, why: str) -> None:
        """End every engine child now, and bring none back."""
        for record in self._records.values():
            record.held = True
            for child in record.loaded.children if record.loaded is not None else ():
                child.kill(why)

    async def pin(self, name: str) -> ModelView:
        """Load a model if need be, and keep it: no swap, no idle unload, over restarts too.

        Raises:
          RkvlmdError: why it cannot be loaded; then it is not pinned.

        """
        record = self._record(name)
        self._may_load(record)
        record.memo.pinned = True  # before the load: nothing may take its place meanwhile
        self._note()
        try:
            await self.load(record.name)
        except RkvlmdError:
            record.memo.pinned = False
            self._note()
            raise
        await self._keep_pins(record)
        return self.model(record.name)

    async def unpin(self, name: str) -> ModelView:
        """Let a model go like any other again; it stays loaded for now."""
        record = self._record(name)
        record.memo.pinned = False
        record.idle_at = max(record.idle_at, trio.current_time() + self._keep(record))
        self._moved.set()
        self._note()
        await self._keep_pins(record)
        return self.model(record.name)

    async def _keep_pins(self, record: Record) -> None:
        record.memo.digest = record.memo.digest or record.entry.digest
        if not await self._save():
            log.warning("%s: the pin will be forgotten at a restart", record.name)

    def rescan(self, entries: Mapping[str, Entry]) -> Rescan:
        """Take over what the models folder holds now.

        What is loaded stays until it is unloaded: ``waiting`` names those.
        """
        added, changed, removed = [], [], []
        for name, entry in entries.items():
            record = self._records.get(name)
            if record is None:
                self._records[name] = self._new(entry)
                added.append(name)
                continue
            record.removed, record.successor = False, None
            if entry != record.entry:
                record.successor = entry
                changed.append(name)
        for name, record in self._records.items():
            if name not in entries:
                record.removed, record.successor = True, None
                removed.append(name)
        self._records = dict(sorted(self._records.items()))
        for record in [r for r in self._records.values() if r.leaving]:
            if record.loaded is None and record.load is None:
                self._settle(record)
            elif not record.decoding and record.load is None:
                assert self._nursery is not None
                self._nursery.start_soon(self._drop_kept, record, name=f"drop:{record.name}")
        self._note()
        waiting = [name for name, record in self._records.items() if record.leaving]
        return Rescan(tuple(added), tuple(changed), tuple(removed), tuple(waiting))

    # --- what leaves by itself ------------------------------------------------------

    async def _leave_when_idle(self) -> None:
        """Unload each model whose time is over."""
        while True:
            self._moved = trio.Event()
            due = min((r.idle_at for r in self._may_leave()), default=math.inf)
            with trio.move_on_at(due):
                await self._moved.wait()
                continue
            async with self._lease.hold("", ""):
                now = trio.current_time()
                wanted = {ticket.model for ticket in self._lease.tickets()}
                for record in self._may_leave():
                    if record.idle_at > now:
                        continue
                    if record.name in wanted:
                        record.idle_at = now + max(_RETRY, self._keep(record))
                        continue
                    log.info("%s: leaves, nobody has used it for a while", record.name)
                    await self._take_down(record)

    def _may_leave(self) -> list[Record]:
        return [r for r in self._by_use() if r.load is None and not r.memo.pinned]

    async def _leave_under_pressure(self) -> None:
        """While memory is short, encoders that were kept leave, the least recently used first."""
        while True:
            while not self._kept():
                await self.wait_change()
            await trio.sleep(self._settings.memory.check_seconds)
            while (kept := self._kept()) and self._short():
                log.warning("memory is short: the encoders of %s leave", kept[0].name)
                await self._drop_kept(kept[0])

    def _short(self) -> bool:
        """Whether less than half of what every load leaves free is free."""
        try:
            return self._room().bytes < self._settings.memory.reserve_bytes // 2
        except RkvlmdError:  # nobody can tell now
            return False

    async def _drop_kept(self, record: Record) -> None:
        """Stop the encoders of a model that is not loaded, unless that has changed meanwhile."""
        async with self._lease.hold("", ""):
            if record.loaded is not None and not record.decoding and record.load is None:
                await self._take_down(record)
