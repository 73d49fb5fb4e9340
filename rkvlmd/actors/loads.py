"""How models come and go: load, swap, failure, healing.

Everything that changes what is loaded happens under the lease. A load belongs
to the daemon: whoever asked for it may leave. At most one decoder exists; in a
swap the encoders of the model that makes room stay, while there is memory.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import trio

from rkvlmd.actors import memory
from rkvlmd.actors.ledger import Ledger, Memo
from rkvlmd.actors.loading import Loaded, Loader, LoadError, parts_of
from rkvlmd.actors.room import who_leaves
from rkvlmd.actors.table import ModelTable
from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import ModelState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from rkvlmd.actors.child import ChildDiedError
    from rkvlmd.actors.lease import Grip, Lease
    from rkvlmd.actors.records import Record
    from rkvlmd.models.catalog import Entry
    from rkvlmd.settings import Settings

log = logging.getLogger(__name__)

#: Found before a load: everything stays as it was, and the model does not fail by them. Where a
#: library finds no memory, it does: else each request would cost the loaded model its place.
_REFUSALS = frozenset({"insufficient_memory", "model_pinned"})


class Loads(ModelTable):
    """The loads in hand and those to come; ``Residency`` adds the owner's orders."""

    def __init__(
        self,
        settings: Settings,
        entries: Mapping[str, Entry],
        lease: Lease,
        loader: Loader,
        *,
        room: Callable[[], memory.Room] = memory.room,
        ledger: Ledger | None = None,
    ) -> None:
        super().__init__(settings, entries)
        self._lease = lease
        self._loader = loader
        self._room = room
        self._ledger = ledger or Ledger()
        self._nursery: trio.Nursery | None = None
        #: Set when some ``idle_at`` may have come nearer.
        self._moved = trio.Event()
        #: Hears of a model that the owner unloads.
        self.on_unload: Callable[[str], None] = lambda _name: None
        lease.loaded = self.loaded_name
        loader.on_change = self._note
        loader.on_death = self._child_died

    @property
    def restarts(self) -> dict[str, int]:
        """How many children of each role were started in the place of one that had gone."""
        return self._loader.restarts

    async def ensure(self, name: str, grip: Grip) -> Loaded:
        """Return the model with all its children alive; the caller holds the lease.

        A cancelled caller leaves the lease to the load, which goes on. The
        model counts as used until ``used``.

        Raises:
          RkvlmdError: why it cannot be had.

        """
        record = self._record(name)
        self.admit(name)
        record.used_at, record.idle_at = trio.current_time(), math.inf
        if record.loaded is not None and record.loaded.alive:
            return record.loaded
        load = self._start(record, grip)
        try:
            await load.wait()
        except trio.Cancelled:
            if not load.is_set():
                record.grip = grip
                grip.handed_over = True
            raise
        if record.loaded is not None and record.loaded.alive:
            return record.loaded
        if record.held:
            self.admit(name)
        raise record.error or self._failed(record, self._heal_wait(record))

    def at_hand(self, name: str) -> Loaded | None:
        """Return a model that ``ensure`` would return at once."""
        record = self._records.get(name)
        if record is None or record.held or record.load is not None or record.loaded is None:
            return None
        return record.loaded if record.loaded.alive else None

    def used(self, name: str, keep_alive: float | None = None) -> None:
        """Say that a job is done with a model; call it while the lease is still held.

        ``keep_alive`` is what the request says: seconds from now until the
        model leaves unless it is used, clamped to the owner's bounds.
        """
        record = self._records.get(name)
        if record is not None:
            record.used_at = trio.current_time()
            record.idle_at = record.used_at + self._keep(record, keep_alive)
            self._moved.set()

    def _keep(self, record: Record, asked: float | None = None) -> float:
        """Return for how many seconds a model stays after its use, ``inf`` for ever."""
        models = self._settings.models
        if asked is not None:
            most = models.keep_alive_max_seconds
            asked = max(asked, models.keep_alive_min_seconds)
            return asked if most < 0 else min(asked, most)
        own = record.entry.manifest.defaults.keep_alive_seconds
        seconds = models.keep_alive_seconds if own is None else own
        return seconds if seconds >= 0 else math.inf

    def completed(self, name: str) -> None:
        """A job of this model has ended well: the restart budget is whole again."""
        record = self._records[name]
        record.deaths = 0
        record.heal_delay = 0.0

    # --- one load -------------------------------------------------------------------

    def _start(self, record: Record, grip: Grip) -> trio.Event:
        """Begin a load under a lease that is held."""
        assert self._nursery is not None
        record.load = load = trio.Event()
        record.load_scope = trio.CancelScope()
        record.grip = None
        self._nursery.start_soon(self._load, record, load, name=f"load:{record.name}")
        return load

    async def _load(self, record: Record, load: trio.Event) -> None:
        """Swap, check memory, start children; always ends with ``load`` set."""
        self._set(record, ModelState.LOADING)
        record.error = None
        began = trio.current_time()
        try:
            with record.load_scope:
                try:
                    await self._bring_up(record)
                except LoadError as exc:
                    # What lies in the NPU's memory is an estimate: kept encoders may be too many.
                    full = exc.public.code == "insufficient_memory"
                    kept = [r for r in self._kept() if r is not record] if full else []
                    if not exc.died and not kept:
                        raise
                    log.error("%s: trying once more: %s", record.name, exc)  # noqa: TRY400 - the traceback says nothing
                    for other in kept:
                        await self._take_down(other)
                    await self._bring_up(record)
                record.pace.load_seconds = trio.current_time() - began
                self._arrived(record)
                log.info("%s: loaded in %.2f s", record.name, record.pace.load_seconds)
            if record.load_scope.cancelled_caught:
                record.error = RkvlmdError("model_unloaded", "The model was unloaded.")
                await self._take_down(record)
        except (LoadError, RkvlmdError) as exc:
            if isinstance(exc, RkvlmdError) and exc.code in _REFUSALS:
                record.error = exc
                self._set(record, ModelState.ABSENT)
            else:
                await self._take_down(record)
                self._fail(record, exc)
        except Exception as exc:  # one model's bug is not the end of the others
            log.exception("%s: the load failed", record.name)
            await self._take_down(record)
            error = RkvlmdError("model_failed", "Its load met an error of the server")
            self._fail(record, LoadError(f"{type(exc).__name__}: {exc}", error))
        finally:
            record.load = None
            record.began = 0.0
            load.set()
            if record.grip is not None:
                record.grip.release()
                record.grip = None

    async def _bring_up(self, record: Record) -> None:
        """Make room and start what does not run; a model that is only repaired needs no room."""
        record.began, record.expected = trio.current_time(), None
        loaded = record.loaded
        if not record.decoding:
            missing = loaded.missing if loaded else list(parts_of(record.entry))
            record.expected = record.memo.load_seconds.get(_key(p.key for p in missing))
            others = [r for r in self._by_use() if r is not record]
            self._check_pin(record)
            leaving = who_leaves(record, missing, others, self._settings, self._room())
            await self._loader.verify(record)
            record.began, record.progress = trio.current_time(), 0.5
            for other in others:
                if other.name in leaving:
                    log.info("%s: leaves for %s", other.name, record.name)
                    await self._take_down(other)
                elif other.decoding:
                    log.info("%s: its decoder leaves for %s", other.name, record.name)
                    await self._park(other)
        else:
            missing = [part for part in loaded.parts if not part.alive] if loaded else []
        await self._loader.bring_up(record)
        key = _key(part.key for part in missing)
        if len(record.memo.load_seconds) > 8:  # sets of parts that were started together
            record.memo.load_seconds.clear()
        record.memo.load_seconds[key] = trio.current_time() - record.began

    def _by_use(self) -> list[Record]:
        """Return the models that hold memory, the least recently used first."""
        return sorted((r for r in self._records.values() if r.loaded), key=lambda r: r.used_at)

    def _kept(self) -> list[Record]:
        """Return the models of which only encoders are there, the least recently used first."""
        return [r for r in self._by_use() if not r.decoding and r.load is None]

    def _arrived(self, record: Record) -> None:
        """All children of a model are there."""
        record.measure()
        record.memo.digest = record.entry.digest
        record.used_at = trio.current_time()
        if not math.isinf(record.idle_at):  # no job has it
            record.idle_at = max(record.idle_at, record.used_at + self._keep(record))
        self._set(record, ModelState.READY)
        self._moved.set()
        assert self._nursery is not None
        self._nursery.start_soon(self._save, name="save residency")

    async def _save(self) -> bool:
        """Keep what is remembered over a restart; models that nobody asked for have nothing."""
        memos = {n: r.memo for n, r in self._records.items() if r.memo != Memo()}
        return await self._ledger.write(memos)

    async def _take_down(self, record: Record) -> None:
        """Stop a model's children and wait until they are gone."""
        with trio.CancelScope(shield=True):
            if record.loaded is not None:
                self._set(record, ModelState.UNLOADING)
                record.measure()
                loaded, record.loaded = record.loaded, None
                await self._loader.take_down(loaded)
            self._set(record, ModelState.ABSENT)
            self._settle(record)

    async def _park(self, record: Record) -> None:
        """Stop a model's decoder; its encoders stay."""
        if record.leaving or record.loaded is None:
            await self._take_down(record)
            return
        with trio.CancelScope(shield=True):
            self._set(record, ModelState.UNLOADING)
            record.measure()
            await self._loader.take_down(record.loaded, "decoder")
            if not record.loaded.children:
                record.loaded = None
            self._set(record, ModelState.ABSENT)

    def _settle(self, record: Record) -> None:
        """Let what the models folder holds now take the place of a model that has gone."""
        if not record.leaving or record.loaded is not None:
            return
        if record.removed:
            if self._records.get(record.name) is record:
                del self._records[record.name]
        elif record.successor is not None:
            record.entry, record.successor = record.successor, None
            record.memo = Memo(pinned=record.memo.pinned)
        self._note()

    # --- failure and healing ----------------------------------------------------------

    def _fail(self, record: Record, exc: LoadError | RkvlmdError) -> None:
        """Enter ``failed``, which heals itself: a trial later, each pause twice as long."""
        engine = self._settings.engine
        record.error = exc if isinstance(exc, RkvlmdError) else exc.public
        record.heal_delay = min(
            engine.heal_max_seconds, record.heal_delay * 2 or engine.heal_seconds
        )
        record.heal_at = trio.current_time() + record.heal_delay
        record.public = record.error.message.rstrip(".")
        record.detail = str(exc) if isinstance(exc, LoadError) else exc.message
        self._set(record, ModelState.FAILED)
        log.error(
            "%s: failed; next trial in %.0f s: %s", record.name, record.heal_delay, record.detail
        )
        assert self._nursery is not None
        self._nursery.start_soon(self._heal, record, record.heal_at, name=f"heal:{record.name}")

    async def _heal(self, record: Record, at: float) -> None:
        """One trial start, unless something else is loaded by then."""
        await trio.sleep_until(at)
        still = record.state is ModelState.FAILED and record.heal_at == at and not record.held
        if still and not self.loaded_name():
            self._begin(record)

    def _begin(self, record: Record) -> None:
        """Load in the background, as soon as the lease is free."""
        assert self._nursery is not None
        if record.load is None and not record.queued:
            record.queued = True
            self._nursery.start_soon(self._load_later, record, name=f"load:{record.name}")

    async def _load_later(self, record: Record) -> None:
        asked = record.asked
        async with self._lease.hold("", "") as grip:
            record.queued = False
            # The owner may have unloaded it while this waited for the lease.
            gone = record.held or self._records.get(record.name) is not record
            if not gone and (record.loaded is None or not record.loaded.alive):
                await self._start(record, grip).wait()
        asked.set()
        if record.asked is asked:
            record.asked = trio.Event()

    def _child_died(self, name: str, death: ChildDiedError) -> None:
        """An engine child of a loaded model has gone by itself."""
        record = self._records.get(name)
        if record is None or record.loaded is None:
            return
        if not record.decoding and record.load is None:
            self._forget_dead(record)
            return
        if not death.planned:
            record.deaths += 1
        if record.deaths > self._settings.engine.restarts:
            record.deaths = 0
            self._give_up(record, death)
            return
        self._note()
        # Whoever holds the lease brings it back; when nobody does, we do.
        self._begin(record)

    def _forget_dead(self, record: Record) -> None:
        """An encoder that was kept for later has gone: the next load starts it again."""
        assert record.loaded is not None
        for part in record.loaded.parts:
            if part.child is not None and part.child.dead.is_set():
                part.child, part.info = None, {}
        if not record.loaded.children:
            record.loaded = None
            self._settle(record)
        self._note()

    def _give_up(self, record: Record, death: ChildDiedError) -> None:
        assert self._nursery is not None
        error = LoadError(
            f"{death.name} kept dying: {death.how}: {death.last_words[-300:]}",
            RkvlmdError("model_failed", "Its engine kept dying"),
        )
        self._fail(record, error)
        self._nursery.start_soon(self._clear_failed, record, name=f"clear:{record.name}")

    async def _clear_failed(self, record: Record) -> None:
        """Stop what is left of a model that has failed."""
        async with self._lease.hold("", ""):
            if record.state is ModelState.FAILED and record.loaded is not None:
                loaded, record.loaded = record.loaded, None
                await self._loader.take_down(loaded)
                self._settle(record)
                self._note()

    def _set(self, record: Record, state: ModelState) -> None:
        record.state = state
        if state is not ModelState.FAILED:
            record.detail = ""
        record.progress = 1.0 if state is ModelState.READY else 0.0
        self._note()


def _key(parts: Iterable[str]) -> str:
    """Return the name of a set of parts that start together."""
    return "+".join(sorted(parts))
