"""Memory files that are made on a thread of their own, while something else takes its time."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from rkvlmd.engine import memfd
from rkvlmd.engine.backend import Rows
from rkvlmd.wire.child import Tensor

#: Seconds until something is freed: by then the next one has its order.
PAUSE = 0.02
#: How far behind the others the thread stands that frees (nice(2)).
NICE = 5
#: Objects that wait to be freed, at most.
MOST_OLD = 2
#: Bytes of a page, which is what the kernel gives and clears at a time.
_PAGE = mmap.PAGESIZE


class Room:
    """A memory file for float32 rows: made ahead, filled in place, sealed.

    Resource handling: everything ends with the object; the descriptor that
    ``sealed`` returns stays the room's.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.tensor = Tensor(shape=shape, dtype="float32")
        self._size = 4 * math.prod(shape)
        self._fd = -1
        self._map: mmap.mmap | None = None
        self._ready = threading.Event()
        self._error: OSError | None = None

    def make(self) -> None:
        """Get all of the memory; on any thread, once. What goes wrong is kept for ``rows``."""
        try:
            self._fd, self._map = memfd.writable(self._size)
            # Pages that are there and mapped: the one who fills them waits for none. NumPy lets
            # other threads run meanwhile, which a mapping that populates itself would not.
            np.frombuffer(self._map, np.uint8)[::_PAGE] = 0
        except OSError as exc:
            self._error = exc
        finally:
            self._ready.set()

    def rows(self) -> Rows:
        """Return the array to fill; nothing may refer to it when ``sealed`` is called.

        Raises:
          OSError: there is no memory.

        """
        self._ready.wait()
        if self._error is not None:
            raise self._error
        assert self._map is not None
        rows: Rows = np.frombuffer(self._map, np.float32).reshape(self.tensor.shape)
        return rows

    def sealed(self) -> int:
        """Return the descriptor of the file, which nobody can change any more."""
        assert self._map is not None
        memfd.seal(self._fd, self._map)
        return self._fd

    def __del__(self) -> None:
        # The mapping ends with the last array of it.
        if self._fd >= 0:
            os.close(self._fd)


class Sweeper:
    """Frees what is of no use any more, a moment later.

    Megabytes take a millisecond to go, and there are few processors: while a
    picture or its rows are on their way to the next process, that one has them.
    """

    def __init__(self) -> None:
        self._old: queue.SimpleQueue[Any] | None = None

    def take(self, old: Any) -> None:
        """Free an object soon; the caller keeps no reference to it."""
        if self._old is None:
            self._old = queue.SimpleQueue()
            threading.Thread(target=self._sweep, args=(self._old,), daemon=True).start()
        # What comes faster than it can be freed is freed here.
        if self._old.qsize() < MOST_OLD:
            self._old.put(old)

    @staticmethod
    def _sweep(old: queue.SimpleQueue[Any]) -> None:
        # Not lower: it frees with the interpreter's lock held.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while True:
            last = old.get()
            time.sleep(PAUSE)
            del last


class Ahead:
    """Makes rooms, one at a time; the thread begins with the first one."""

    def __init__(self, sweeper: Sweeper) -> None:
        self._sweeper = sweeper
        self._wanted: queue.SimpleQueue[Room] | None = None

    @contextlib.contextmanager
    def room(self, shape: tuple[int, int]) -> Iterator[Room]:
        """Have a room made; it is freed soon after the end of the block."""
        if self._wanted is None:
            self._wanted = queue.SimpleQueue()
            threading.Thread(target=self._make, args=(self._wanted,), daemon=True).start()
        room = Room(shape)
        self._wanted.put(room)
        try:
            yield room
        finally:
            self._sweeper.take(room)

    @staticmethod
    def _make(wanted: queue.SimpleQueue[Any]) -> None:
        # The library's own thread goes first.
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        while True:
            wanted.get().make()
