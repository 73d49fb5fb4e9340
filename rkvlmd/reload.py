"""Reads the settings and the models folder again, for a daemon that goes on serving."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import trio

from rkvlmd import live
from rkvlmd import settings as settings_module
from rkvlmd.errors import ManifestError, SettingsError

if TYPE_CHECKING:
    from rkvlmd.actors.house import House
    from rkvlmd.models.catalog import Entry
    from rkvlmd.settings import Settings

log = logging.getLogger(__name__)

Scan = Callable[["Settings"], "tuple[dict[str, Entry], list[ManifestError]]"]


class Reloader:
    """``run`` is one reload; a second one waits for the first.

    ``read`` returns the settings as a start would have them now, or raises
    ``SettingsError``. Both functions block: they run in threads.
    """

    def __init__(self, house: House, read: Callable[[], Settings], scan: Scan) -> None:
        self._house = house
        self._read = read
        self._scan = scan
        self._turn = trio.Lock()

    async def run(self) -> dict[str, Any]:
        """Apply what can be; return what was, what needs a restart, and what is wrong.

        With anything wrong in the settings none of them is taken over. The
        models folder is looked at in any case.
        """
        async with self._turn:
            applied, waiting, rejected = await self._settings()
            entries, problems = await trio.to_thread.run_sync(self._scan, self._house.settings)
            found = self._house.residency.rescan(entries)
            self._house.problems = tuple(map(str, problems))
        for problem in (*rejected, *self._house.problems):
            log.error("reload: %s", problem)
        log.info(
            "reload: applied %s; need a restart %s; models added %s, changed %s, removed %s",
            *(", ".join(names) or "nothing" for names in
              (applied, waiting, found.added, found.changed, found.removed)),
        )  # fmt: skip
        return {
            "applied": applied,
            "needs_restart": waiting,
            "rejected": rejected,
            "models": {
                "added": list(found.added),
                "changed": list(found.changed),
                "removed": list(found.removed),
                "waiting": list(found.waiting),
                "problems": list(self._house.problems),
            },
        }

    async def _settings(self) -> tuple[list[str], list[str], list[str]]:
        running = self._house.settings
        try:
            wanted = await trio.to_thread.run_sync(self._read)
        except SettingsError as exc:
            return [], [], exc.problems
        merged, applied, waiting = live.changes(running, wanted)
        # What is taken over must fit what is not.
        if problems := settings_module.check(merged):
            return [], waiting, problems
        self._house.adopt(merged)
        if "log.level" in applied:
            logging.getLogger().setLevel(merged.log.level.upper())
        return applied, waiting, []
