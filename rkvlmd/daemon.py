"""The supervision tree: started top to bottom, stopped in reverse."""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from rkvlmd import settings as settings_module
from rkvlmd.actors.crashes import CrashMemory
from rkvlmd.actors.embeddings import EmbeddingCache
from rkvlmd.actors.fetcher import Fetcher
from rkvlmd.actors.house import House
from rkvlmd.actors.lease import Lease
from rkvlmd.actors.ledger import FILE as LEDGER
from rkvlmd.actors.ledger import Ledger
from rkvlmd.actors.loading import Loader
from rkvlmd.actors.notify import Notify
from rkvlmd.actors.overlap import Overlap
from rkvlmd.actors.pipeline import Tools
from rkvlmd.actors.policy import Rules
from rkvlmd.actors.prep import Prep
from rkvlmd.actors.residency import Residency
from rkvlmd.actors.scheduler import Scheduler
from rkvlmd.errors import ManifestError, SettingsError
from rkvlmd.front.control import serve_control
from rkvlmd.front.control_socket import operator_gid
from rkvlmd.front.http.serve import serve_http
from rkvlmd.models import catalog, families
from rkvlmd.reload import Reloader
from rkvlmd.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Spares:
    """Parts that tests and benchmarks put in place of the real ones."""

    make_loader: Callable[[Settings, Path], Loader] = Loader
    make_prep: Callable[[Settings], Prep] = Prep


async def main(
    settings: Settings,
    *,
    announce: Callable[[str], None],
    reread: Callable[[], Settings] | None = None,
    spares: Spares | None = None,
) -> None:
    """Run the daemon until a signal ends it.

    ``announce`` gets the HTTP address once both fronts listen; ``reread``
    returns the settings as a start would have them now, for a reload.

    Raises:
      SettingsError, OSError: at the start.

    """
    spares = spares or Spares()
    notify = Notify()
    state = await _state_dir(settings)
    entries, problems = await trio.to_thread.run_sync(_scan, settings)
    for problem in problems:
        log.error("%s", problem)
    lease = Lease(Rules(settings.queue.age_seconds, settings.queue.max_jumps))
    with EmbeddingCache(settings.cache.embeddings_bytes) as cache:
        residency = Residency(
            settings,
            entries,
            lease,
            spares.make_loader(settings, state),
            ledger=Ledger(state / LEDGER),
        )
        prep = spares.make_prep(settings)
        tools = Tools(
            settings,
            Fetcher(settings.media),
            prep,
            lease,
            residency,
            cache,
            CrashMemory(settings.queue.crash_refusal_seconds),
            overlap=Overlap(on=settings.npu.overlap),
        )
        house = House(settings, tools, Scheduler(tools), problems=tuple(map(str, problems)))
        house.reload = Reloader(house, reread or (lambda: settings), _scan).run
        control = settings_module.control_path(settings)
        async with (
            _actor("signals", _signals, house, notify),
            _actor("prep", prep.run),
            _actor("residency", residency.run),
            _actor("scheduler", house.scheduler.run),
            _actor("control", serve_control, house, control),
            _http(house),
            _actor("notify", _tell, house, notify),
        ):
            announce(house.http_address)
            notify.ready()
            # Modules and the house stay for good. The collector would look at all of them now and
            # then, and the loop would stand still for 5 to 15 ms.
            gc.collect()
            gc.freeze()
            # From here it counts how much is old: with the frozen ones it would seldom come.
            gc.collect()
            await house.stop.wait()
            log.info("stopping: jobs get %.0f s to end", settings.queue.stop_seconds)
            notify.stopping()


@asynccontextmanager
async def _actor(name: str, run: Callable[..., Awaitable[Any]], *args: Any) -> AsyncIterator[Any]:
    """Start one actor and wait until it is ready; cancel it at the end."""
    async with trio.open_nursery() as nursery:
        value = await nursery.start(run, *args, name=name)
        yield value
        nursery.cancel_scope.cancel(reason="the daemon stops")


@asynccontextmanager
async def _http(house: House) -> AsyncIterator[None]:
    """The HTTP front: at the end no new connections, then the jobs, then those that listen."""
    quit_http, finished = trio.Event(), trio.Event()
    async with trio.open_nursery() as nursery:
        house.http_address = await nursery.start(
            _serve_http, house, quit_http, finished, name="http"
        )
        yield
        quit_http.set()
        async with trio.open_nursery() as draining:
            draining.start_soon(_hurry, house, draining.cancel_scope)
            await house.scheduler.drain(house.settings.queue.stop_seconds)
            draining.cancel_scope.cancel(reason="all jobs have ended")
        if house.stop_again.is_set():
            await house.scheduler.drain(0)
        # The answers of the jobs are on their way; a peer that takes nothing is dropped.
        with trio.move_on_after(house.settings.http.peer_seconds):
            await finished.wait()
        nursery.cancel_scope.cancel(reason="the daemon stops")


async def _serve_http(
    house: House,
    quit_http: trio.Event,
    finished: trio.Event,
    *,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    await serve_http(house, None, stop=quit_http, task_status=task_status)
    finished.set()


async def _hurry(house: House, draining: trio.CancelScope) -> None:
    """A second signal ends the patience."""
    await house.stop_again.wait()
    draining.cancel(reason="a second signal")


async def _signals(
    house: House,
    notify: Notify,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """SIGTERM and SIGINT: the first one drains, the second one aborts. SIGHUP: reload."""
    taken = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    with trio.open_signal_receiver(*taken) as signals:
        async with trio.open_nursery() as reloads:
            task_status.started()
            async for number in signals:
                log.info("%s", signal.Signals(number).name)
                if number == signal.SIGHUP:
                    if house.stopping:
                        continue
                    # Beside the signals: a slow disk must not keep a stop waiting.
                    reloads.start_soon(_reload, house, notify, name="reload")
                    continue
                if house.stop.is_set():
                    house.stop_again.set()
                house.stop.set()


async def _reload(house: House, notify: Notify) -> None:
    notify.reloading()
    try:
        await house.reload()
    except Exception:  # what serves goes on serving
        log.exception("the reload failed")
    # Before both fronts listen there is nothing to be ready with.
    if house.http_address and not house.stopping:
        notify.ready()


async def _tell(
    house: House, notify: Notify, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Tell systemd how we are: STATUS at each change, WATCHDOG while we are well."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(notify.run_watchdog, house.healthy)
        task_status.started()
        while True:
            states = ", ".join(f"{m.name} {m.state.value}" for m in house.residency.models())
            notify.status(f"{house.http_address}; models: {states or 'none'}")
            await house.residency.wait_change()


async def _state_dir(settings: Settings) -> Path:
    """Make the state folder; without one the daemon still serves."""
    state = settings_module.state_dir(settings)
    try:
        await trio.Path(state).mkdir(parents=True, exist_ok=True, mode=0o750)
    except OSError as exc:
        log.warning("the state folder cannot be made: %s", exc.strerror)
    return state


def _scan(settings: Settings) -> tuple[dict[str, catalog.Entry], list[ManifestError]]:
    return catalog.scan(
        settings_module.models_dir(settings),
        demo=settings.models.demo,
        known_families=families.known(),
    )


def check(settings: Settings) -> list[str]:
    """Return every problem of the settings and of the manifests, each with its key."""
    problems = settings_module.check(settings)
    try:
        operator_gid(settings.control.operator_group)
    except SettingsError as exc:
        problems += exc.problems
    entries, broken = _scan(settings)
    problems += [f"{error.name}: {text}" for error in broken for text in error.problems]
    for key, names in (
        ("models.default", [settings.models.default] if settings.models.default else []),
        ("models.preload", settings.models.preload),
    ):
        problems += [f"{key}: there is no model {n!r}" for n in names if n not in entries]
    return problems
