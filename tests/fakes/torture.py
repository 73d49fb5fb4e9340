"""Cancel a scenario at each of its scheduling steps in turn."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio
import trio.abc

from rkvlmd.actors.job import Job

Scenario = Callable[[], Awaitable[None]]


class _CutAt(trio.abc.Instrument):
    """Counts the steps of a scenario's tasks, and cancels them before step ``step``."""

    def __init__(self, step: int) -> None:
        self._left = step
        self._watcher: trio.lowlevel.Task | None = None
        self._scope: trio.CancelScope | None = None

    @property
    def cut(self) -> bool:
        """Whether the scenario was long enough to be cancelled."""
        return self._left <= 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self._scope is None or task is self._watcher:
            return
        self._left -= 1
        if self._left == 0:
            self._scope.cancel(reason="cut by the test")

    async def run(self, scenario: Scenario) -> None:
        self._watcher = trio.lowlevel.current_task()
        try:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                nursery.start_soon(scenario)
        finally:
            self._scope = None


def cancel_everywhere(
    scenario: Scenario,
    check: Callable[[], None],
    *,
    clock: Callable[[], trio.abc.Clock] | None = None,
    most: int = 2000,
) -> int:
    """Run ``scenario`` again and again, cancelled one scheduling step later each time.

    The last run is the first that the cancel comes too late for. ``check`` is
    called after every run; it asserts that nothing was left behind. Call it
    from a plain test function: each run is a ``trio.run`` of its own. The
    scenario builds its world anew on every call.

    Returns:
      How many steps were cancelled.

    Raises:
      AssertionError: when the scenario has more than ``most`` steps.

    """
    for step in range(1, most + 1):
        instrument = _CutAt(step)
        trio.run(instrument.run, scenario, instruments=[instrument], clock=clock and clock())
        check()
        if not instrument.cut:
            return step - 1
    raise AssertionError(f"the scenario has more than {most} steps")


class AbandonAtStep(trio.abc.Instrument):
    """Abandons the job at the k-th step after it was submitted."""

    def __init__(self, k: int) -> None:
        self._k = k
        self._steps = 0
        self.job: Job | None = None
        self.too_late = False

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.job is None:
            return
        self._steps += 1
        if self._steps == self._k:
            self.too_late = self.job.outbox.end is not None
            self.job.abandon("client_gone")


def abandon_everywhere(scenario: Callable[[AbandonAtStep], Awaitable[None]]) -> int:
    """Run a scenario with its job abandoned at each step in turn; return how many it had."""
    for k in range(1, 1000):
        instrument = AbandonAtStep(k)
        trio.run(scenario, instrument, instruments=[instrument])
        if instrument.too_late:
            break
    return k
