"""Which models are loaded, and how they come and go.

Everything that changes what is loaded happens under the lease. A load belongs
to the daemon: whoever asked for it may leave.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from rkvlmd.actors import memory
from rkvlmd.actors.loading import Loaded, Loader, LoadError
from rkvlmd.actors.table import ModelTable
from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import ModelState, ModelView

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rkvlmd.actors.child import ChildDiedError
    from rkvlmd.actors.lease import Grip, Lease
    from rkvlmd.actors.records import Record
    from rkvlmd.models.catalog import Entry
    from rkvlmd.settings import Settings

log = logging.getLogger(__name__)


class Residency(ModelTable):
    """Owns the table of models and their children; started once by the daemon."""

    def __init__(
        self,
        settings: Settings,
        entries: Mapping[str, Entry],
        lease: Lease,
        loader: Loader,
        *,
        room: Callable[[], memory.Room] = memory.room,
    ) -> None:
        super().__init__(settings, entries)
        self._lease = lease
        self._loader = loader
        self._room = room
        self._nursery: trio.Nursery | None = None
        self.on_unload: Callable[[str], None] = lambda _name: None
        lease.loaded = self.loaded_name
        loader.on_change = self._note
        loader.on_death = self._child_died

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the models until cancelled; children leave with it."""
        async with trio.open_nursery() as self._nursery:
            self._loader.nursery = self._nursery
            for name in self._settings.models.preload:
                if name in self._records:
                    self._begin(self._records[name])
                else:
                    log.error("models.preload: there is no model %r", name)
            task_status.started()
            await trio.sleep_forever()

    @property
    def restarts(self) -> dict[str, int]:
        """How many children of each role were started in the place of one that had gone."""
        return self._loader.restarts

    # --- loads --------------------------------------------------------------------

    async def ensure(self, name: str, grip: Grip) -> Loaded:
        """Return the model with all its children alive; the caller holds the lease.

        A cancelled caller leaves the lease to the load, which goes on.

        Raises:
          RkvlmdError: why it cannot be had.

        """
        record = self._record(name)
        self.admit(name)
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

    def _start(self, record: Record, grip: Grip) -> trio.Event:
        """Begin a load under a lease that is held."""
        assert self._nursery is not None
        record.load = load = trio.Event()
        record.load_scope = trio.CancelScope()
        record.grip = None
        record.owner = grip
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
                    if not exc.died:
                        raise
                    log.error("%s: trying once more: %s", record.name, exc)  # noqa: TRY400 - the traceback says nothing
                    await self._bring_up(record)
                record.pace.load_seconds = trio.current_time() - began
                self._set(record, ModelState.READY)
                log.info("%s: loaded in %.2f s", record.name, record.pace.load_seconds)
            if record.load_scope.cancelled_caught:
                record.error = RkvlmdError("model_unloaded", "The model was unloaded.")
                await self._take_down(record)
        except (LoadError, RkvlmdError) as exc:
            await self._take_down(record)
            self._fail(record, exc)
        finally:
            record.load = None
            load.set()
            if record.grip is not None:
                record.grip.release()
                record.grip = None

    async def _bring_up(self, record: Record) -> None:
        settings = self._settings
        others = [r for r in self._records.values() if r.loaded and r is not record]
        if record.loaded is None:
            freed = sum(r.resident() for r in others)
            memory.admit(
                record.name,
                need=record.need(),
                freed=freed,
                reserve=settings.memory.reserve_bytes,
                now=self._room(),
            )
            await self._loader.verify(record)
            for other in others:
                log.info("%s: leaves for %s", other.name, record.name)
                await self._take_down(other)
        await self._loader.bring_up(record)
        record.peak = max(record.peak, record.resident())

    async def _take_down(self, record: Record) -> None:
        """Stop a model's children and wait until they are gone."""
        with trio.CancelScope(shield=True):
            if record.loaded is not None:
                self._set(record, ModelState.UNLOADING)
                record.peak = max(record.peak, record.resident())
                loaded, record.loaded = record.loaded, None
                await self._loader.take_down(loaded)
            self._set(record, ModelState.ABSENT)

    def _fail(self, record: Record, exc: LoadError | RkvlmdError) -> None:
        """Enter ``failed``, which heals itself: a trial later, each pause twice as long."""
        engine = self._settings.engine
        record.error = exc if isinstance(exc, RkvlmdError) else exc.public
        if record.error.code == "insufficient_memory":
            return
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
            if record.loaded is None or not record.loaded.alive:
                await self._start(record, grip).wait()
        asked.set()
        if record.asked is asked:
            record.asked = trio.Event()

    def _child_died(self, name: str, death: ChildDiedError) -> None:
        """An engine child of a loaded model has gone by itself."""
        record = self._records[name]
        if record.loaded is None:
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

    def _give_up(self, record: Record, death: ChildDiedError) -> None:
        assert self._nursery is not None
        error = LoadError(
            f"{death.name} kept dying: {death.how}: {death.last_words[-300:]}",
            RkvlmdError("model_failed", "Its engine kept dying"),
        )
        record.exhausted = error
        self._fail(record, error)
        self._nursery.start_soon(self._clear_failed, record, name=f"clear:{record.name}")

    async def _clear_failed(self, record: Record) -> None:
        """Stop what is left of a model that has failed."""
        async with self._lease.hold("", ""):
            if record.state is ModelState.FAILED and record.loaded is not None:
                loaded, record.loaded = record.loaded, None
                await self._loader.take_down(loaded)
                self._note()

    def completed(self, name: str) -> None:
        """A job of this model has ended well: the restart budget is whole again."""
        record = self._records[name]
        record.deaths = 0
        record.heal_delay = 0.0

    # --- the owner's orders ---------------------------------------------------------

    async def load(self, name: str) -> ModelView:
        """Load a model, or join its load; returns when it is ready.

        Raises:
          RkvlmdError: why not.

        """
        record = self._record(name)
        record.held = False
        record.heal_at = 0.0
        if record.state is not ModelState.READY or record.loaded is None or not record.loaded.alive:
            if record.load is not None:
                await record.load.wait()
            else:
                self._begin(record)
                await record.asked.wait()
            if record.state is not ModelState.READY:
                raise self._with_last_words(record)
        return self.model(record.name)

    def _with_last_words(self, record: Record) -> RkvlmdError:
        """For the owner: the error with all that is known about it."""
        error = record.error or self._failed(record, 1)
        text = record.detail if record.state is ModelState.FAILED else error.message
        return RkvlmdError(error.code, text, param=error.param)

    async def unload(self, name: str) -> ModelView:
        """Unload a model and hold it until ``load``.

        The running job ends first; queued ones end ``model_unloaded``.
        """
        record = self._record(name)
        record.held = True
        self.on_unload(record.name)
        if record.load is not None:
            record.load_scope.cancel(reason="unload")
        assert self._nursery is not None
        done = trio.Event()
        self._nursery.start_soon(self._unload_later, record, done, name=f"unload:{record.name}")
        await done.wait()
        return self.model(record.name)

    async def _unload_later(self, record: Record, done: trio.Event) -> None:
        """An unload belongs to the daemon, like a load: who asked for it may leave."""
        async with self._lease.hold("", ""):
            if record.held:
                await self._take_down(record)
        done.set()

    def _set(self, record: Record, state: ModelState) -> None:
        record.state = state
        if state is not ModelState.FAILED:
            record.detail = ""
        record.progress = 1.0 if state is ModelState.READY else 0.0
        self._note()
