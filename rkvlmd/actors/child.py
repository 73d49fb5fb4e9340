"""One child process and the socket to it, as the daemon sees it."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import trio

from rkvlmd.actors.channel import Channel, ChannelError
from rkvlmd.errors import RkvlmdError
from rkvlmd.wire import child as wire
from rkvlmd.wire import frames

if TYPE_CHECKING:
    from rkvlmd.settings import EngineSettings

log = logging.getLogger(__name__)

#: Buffers of pixels and rows go back to the system when they are freed: once one was freed, glibc
#: would keep the next ones up to 32 MiB for later (mallopt(3), M_MMAP_THRESHOLD). Bytes.
MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(256 << 10)}

#: What is kept of a child's output for the error text, bytes.
TAIL_BYTES = 8192


class ChildDiedError(Exception):
    """The child process ended, or was ended.

    ``planned`` says that the daemon decided on it; such an end does not count
    against the restart budget. ``at_work``: it had read the latest order, so
    that may be at fault. ``last_words`` is the end of what it printed: for logs
    and for the owner, never for a client.
    """

    def __init__(
        self, name: str, how: str, last_words: str, *, planned: bool, at_work: bool = True
    ) -> None:
        super().__init__(f"{name} ended: {how}")
        self.name = name
        self.how = how
        self.last_words = last_words
        self.planned = planned
        self.at_work = at_work

    def before(self) -> ChildDiedError:
        """Return the same for an order that never reached it."""
        return ChildDiedError(
            self.name, self.how, self.last_words, planned=self.planned, at_work=False
        )


class ChildWedgedError(Exception):
    """The child missed a deadline and was killed for it."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"{name}: {what}")
        self.what = what


class Child:
    """Owns one process; restarted by building another.

    Started by ``nursery.start(child.run)``, which returns when the child has
    said hello. ``run`` returns when the process is gone, whatever the reason:
    ``death`` then says it. Cancelling ``run`` asks the child to leave, and
    kills it after the grace period.
    """

    def __init__(
        self,
        name: str,
        role: str,
        settings: EngineSettings,
        *,
        arguments: Sequence[str] = (),
        program: Sequence[str] = (sys.executable, "-m", "rkvlmd.engine"),
    ) -> None:
        self.name = name
        self.role = role
        self.pid = 0
        self.hello: wire.Hello | None = None
        self.death: ChildDiedError | None = None
        self.dead = trio.Event()
        self.due = math.inf
        self.beat_at = math.inf
        #: Gets each message in the turn of the loop in which it was read, and a look at its
        #: descriptors; what it does not take waits for ``receive``.
        self.listener: Callable[[wire.FromChild, Sequence[int]], bool] | None = None
        self._settings = settings
        self._argv = [*program, role, "--name", name, *arguments]
        self._channel: Channel | None = None
        self._tail = bytearray()
        self._output_ended = trio.Event()
        self._pumping = trio.CancelScope()
        self._process: trio.Process | None = None
        self._killed_for: str | None = None
        self._fault: str | None = None
        self._ids = 0
        self._inbox, self._outlet = trio.open_memory_channel[tuple[wire.FromChild, list[int]]](64)

    @property
    def alive(self) -> bool:
        """Whether orders may be sent."""
        return (
            self.hello is not None
            and self._killed_for is None
            and self._fault is None
            and not self.dead.is_set()
        )

    @property
    def last_words(self) -> str:
        """The end of what the child printed."""
        return self._tail.decode(errors="replace").strip()

    def next_id(self) -> int:
        """Return a number for an order, never used before on this child."""
        self._ids += 1
        return self._ids

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the child until it is gone.

        Raises:
          ChildDiedError: it went before it said hello.

        """
        how = "stopped"
        try:
            how = await self._from_start_to_end(task_status)
        finally:
            self._process = None
            if self._channel is not None:
                self._channel.close()
            self.due = self.beat_at = math.inf
            planned = self._killed_for is not None or how == "stopped"
            at_work = self._channel is None or not self._channel.unread
            self.death = ChildDiedError(
                self.name, how, self.last_words, planned=planned, at_work=at_work
            )
            self.dead.set()
            self._inbox.close()
            self._drop_inbox()
        if self.hello is None:
            raise self.death
        level = logging.INFO if planned else logging.ERROR
        log.log(level, "%s (pid %d): %s", self.name, self.pid, how)

    async def _from_start_to_end(self, task_status: trio.TaskStatus[None]) -> str:
        """Start the process, listen to it, reap it; return how it ended."""
        try:
            ours, theirs = socket.socketpair()
        except OSError as exc:
            return f"could not be started: {exc.strerror}"
        self._channel = channel = Channel(ours)
        async with trio.open_nursery() as nursery:
            with theirs:
                try:
                    process: trio.Process = await nursery.start(
                        partial(
                            trio.run_process,
                            [*self._argv, "--fd", str(theirs.fileno())],
                            pass_fds=[theirs.fileno()],
                            stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT,
                            process_group=0,  # a terminal's Ctrl-C is not for the child
                            check=False,
                            env=MEMORY | os.environ,
                            deliver_cancel=self._leave_or_die,
                        )
                    )
                except OSError as exc:  # no memory, no descriptors, no processes left
                    return f"could not be started: {exc.strerror}"
            self.pid = process.pid
            self._process = process
            nursery.start_soon(self._keep_tail, process, name=f"{self.name} output")
            with self._pumping:
                protocol = await self._pump(channel, task_status)
                if protocol is not None:
                    self._fail(protocol)
            with trio.move_on_after(self._settings.grace_seconds):
                await process.wait()
            if process.returncode is None:
                self._fail("closed its socket and stayed")
                await process.wait()
            # Let the last words arrive; a grandchild that holds the pipe must not keep us.
            with trio.move_on_after(1):
                await self._output_ended.wait()
            nursery.cancel_scope.cancel(reason=f"{self.name} is gone")
        return self._killed_for or self._fault or _describe(process.returncode)

    def _drop_inbox(self) -> None:
        while True:
            try:
                _, fds = self._outlet.receive_nowait()
            except (trio.WouldBlock, trio.EndOfChannel):
                return
            for fd in fds:
                os.close(fd)

    async def _pump(self, channel: Channel, task_status: trio.TaskStatus[None]) -> str | None:
        """Read until the end of the file; return what was wrong with the bytes, if anything."""
        with trio.CancelScope(deadline=trio.current_time() + self._settings.hello_seconds) as start:
            while True:
                try:
                    item = await channel.receive()
                except ChannelError as exc:
                    return f"spoke nonsense: {exc}"
                if item is None:
                    return None
                message, fds = item
                self.beat_at = trio.current_time()
                if isinstance(message, wire.Beat):
                    continue
                if isinstance(message, wire.Hello):
                    if message.protocol != wire.PROTOCOL:
                        return f"speaks protocol {message.protocol}"
                    start.deadline = math.inf
                    self.hello = message
                    task_status.started()
                elif self.hello is None:
                    return "did not say hello first"
                elif self.listener is not None and self.listener(message, fds):
                    for fd in fds:
                        os.close(fd)
                else:
                    try:
                        await self._inbox.send(item)
                    except BaseException:  # killed in the same moment: nobody has them
                        for fd in fds:
                            os.close(fd)
                        raise
        return "did not say hello in time"

    async def send(self, message: wire.ToChild, fds: Sequence[int] = ()) -> None:
        """Send one order; a child that does not read for ``engine.beat_seconds`` is killed.

        Raises:
          ChildDiedError: the child is gone or about to go.
          RkvlmdError: the order is too large; nothing was sent, and the child is well.

        """
        if not self.alive or self._channel is None:
            raise (await self.wait_death()).before()
        try:
            await self._channel.send(message, fds, within=self._settings.beat_seconds)
        except frames.FrameError:
            raise _too_large(len(fds)) from None
        except TimeoutError:
            self.kill("it does not read its orders")
            raise (await self.wait_death()).before() from None
        except (OSError, trio.ClosedResourceError):
            raise (await self.wait_death()).before() from None

    @property
    def awaited(self) -> bool:
        """Whether a task waits in ``receive``: it gets the next message, whoever comes later."""
        return self._outlet.statistics().tasks_waiting_receive > 0

    def send_now(self, order: bytes, fds: Sequence[int] = ()) -> bool:
        """Send an order that ``channel.frame`` made, without waiting; return whether it went."""
        if not self.alive or self._channel is None:
            return False
        try:
            return self._channel.send_now(order, fds)
        except TimeoutError:
            self.kill("it does not read its orders")
            return False
        except OSError:
            return False  # gone, as its reader will see

    async def receive(self) -> tuple[wire.FromChild, list[int]]:
        """Return the next message that is no beat, and its descriptors.

        Raises:
          ChildDiedError: the child is gone.

        """
        try:
            return await self._outlet.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise await self.wait_death() from None

    async def wait_death(self) -> ChildDiedError:
        """Wait until the process is reaped; return how it ended."""
        await self.dead.wait()
        assert self.death is not None
        return self.death

    def kill(self, why: str) -> None:
        """End the process now; ``why`` is for the log. Sync; harmless when it is gone."""
        if self.dead.is_set():
            return
        if self._killed_for is None:
            self._killed_for = why
            log.warning("%s (pid %d): killing it: %s", self.name, self.pid, why)
        self._pumping.cancel(reason=why)
        self._sigkill()

    def _fail(self, fault: str) -> None:
        """End a process that broke the protocol: its own fault, so no planned end."""
        self._fault = fault
        self._sigkill()

    def _sigkill(self) -> None:
        # One that was reaped has no number any more; another process may have it.
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def _keep_tail(self, process: trio.Process) -> None:
        assert process.stdout is not None
        async with process.stdout:
            async for chunk in process.stdout:
                self._tail += chunk
                del self._tail[:-TAIL_BYTES]
        self._output_ended.set()

    async def _leave_or_die(self, process: trio.Process) -> None:
        """``run_process`` runs this shielded, and cancels it once the child has gone."""
        if self._channel is not None:
            self._channel.close_sending()
        await trio.sleep(self._settings.grace_seconds)
        log.warning("%s (pid %d) did not leave in time; killing it", self.name, process.pid)
        process.kill()


def _too_large(descriptors: int) -> RkvlmdError:
    if descriptors > frames.MAX_FDS:
        return RkvlmdError(
            "too_many_images",
            f"The pictures of this request have {descriptors} views, but an engine takes"
            f" {frames.MAX_FDS} at most: send fewer pictures, or ask for detail 'low'.",
            should_retry=False,
        )
    return RkvlmdError(
        "request_too_large", "The text of this request is too long.", should_retry=False
    )


def _describe(returncode: int | None) -> str:
    assert returncode is not None
    if returncode < 0:
        try:
            return f"killed by {signal.Signals(-returncode).name}"
        except ValueError:  # real-time signals have no names
            return f"killed by signal {-returncode}"
    return f"exit status {returncode}"
