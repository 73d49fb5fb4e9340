"""The control socket: who may connect, and one connection's lines in and out.

Administration exists here alone, never on TCP. What each call does is in
``control_calls``.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NoReturn

import trio

from rkvlmd.front import control_socket
from rkvlmd.front.control_calls import Calls, House, Say
from rkvlmd.settings import ControlSettings
from rkvlmd.wire import control

log = logging.getLogger(__name__)

#: Calls of one connection that are under way or whose answers it has not taken. A peer that
#: sends more and reads nothing is not read any further.
CALLS = 8
_READ_BYTES = 65536

Answer = Callable[[control.Call, Say], Awaitable[bytes]]


async def serve_control(
    house: House, path: Path, *, task_status: trio.TaskStatus[Path] = trio.TASK_STATUS_IGNORED
) -> NoReturn:
    """Serve ``path`` until cancelled; started when it listens.

    It goes on while the daemon drains, so that its owner can look.

    Raises:
      StartError: the socket cannot be made, or another daemon has it.
      SettingsError: the operator group does not exist.

    """
    operators = control_socket.operator_gid(house.settings.control.operator_group)
    with control_socket.bound(path) as listener:
        async with listener, trio.open_nursery() as orders:
            server = _Server(house, operators, orders)
            task_status.started(path)
            await trio.serve_listeners(server.serve, [listener])


class _Server:
    def __init__(self, house: House, operator_gid: int | None, orders: trio.Nursery) -> None:
        self._house = house
        self._orders = orders
        self._operator_gid = operator_gid
        self._own_uid = control_socket.own_uid()
        self._open = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        """Talk to one peer; its faults end here."""
        limits = self._house.settings.control
        try:
            peer = control_socket.peer_of(stream)
        except OSError:
            await stream.aclose()
            return
        tier = control.tier(peer, own_uid=self._own_uid, operator_gid=self._operator_gid)
        # Those who may only look cannot keep those who may change things out.
        most = limits.max_connections // 2 + 1 if tier == "look" else limits.max_connections
        if self._open >= most:
            await _turn_away(stream)
            return
        self._open += 1
        try:
            connection = _Connection(
                stream, limits, Calls(self._house, peer, tier, self._orders).answer
            )
            await connection.run()
        finally:
            self._open -= 1


async def _turn_away(stream: trio.SocketStream) -> None:
    data = {"code": "server_is_overloaded", "param": None}
    refusal = control.RpcError(control.APPLICATION_ERROR, "too many connections", data=data)
    async with stream:
        # The line fits into the empty buffer of a new socket, so this does not wait.
        with trio.move_on_after(1):
            try:
                await stream.send_all(control.encode(control.failure(refusal)))
            except trio.BrokenResourceError:
                return


class _Connection:
    """One peer: lines in, calls side by side, lines out.

    Text out goes through one buffer and one writing task, so a call that ends
    cannot leave half a line. A call keeps its slot until its answer was taken,
    which bounds the buffer to ``CALLS`` answers.
    """

    def __init__(self, stream: trio.SocketStream, limits: ControlSettings, answer: Answer) -> None:
        self._stream = stream
        self._limits = limits
        self._answer = answer
        self._slots = trio.Semaphore(CALLS)
        self._busy = 0
        self._out = bytearray()
        self._wake = trio.Event()
        self._taken = trio.Event()

    async def run(self) -> None:
        """Return when the peer has gone or has been answered after its last line."""
        try:
            async with self._stream, trio.open_nursery() as nursery:
                nursery.start_soon(self._write, name="control writer")
                async with trio.open_nursery() as calls:
                    await self._read(calls)
                nursery.cancel_scope.cancel(reason="the peer has been answered")
        except* (trio.BrokenResourceError, trio.TooSlowError):
            log.debug("a control peer left, or took no data")

    async def _read(self, calls: trio.Nursery) -> None:
        decoder = control.LineDecoder(self._limits.max_line_bytes)
        while True:
            data = b""
            with trio.move_on_after(self._limits.idle_seconds) as idle:
                data = await self._stream.receive_some(_READ_BYTES)
            if idle.cancelled_caught:
                if self._busy:
                    continue
                return
            if not data:
                return
            try:
                lines = decoder.feed(data)
            except control.LineTooLongError:
                limit = self._limits.max_line_bytes
                error = control.RpcError(control.PARSE_ERROR, f"line of more than {limit} bytes")
                await self._say(control.encode(control.failure(error)))
                return
            for line in lines:
                await self._slots.acquire()
                self._busy += 1
                calls.start_soon(self._call, line, name="control call")

    async def _call(self, line: bytes) -> None:
        try:
            try:
                call = control.parse_call(line)
            except control.RpcError as error:
                await self._say(control.encode(control.failure(error)))
                return
            answer = await self._answer(call, self._say)
            if call.wants_reply:
                await self._say(answer)
        finally:
            self._busy -= 1
            self._slots.release()

    async def _say(self, line: bytes) -> None:
        """Hand over one line; wait until the kernel has it."""
        self._out += line
        self._wake.set()
        await self._taken.wait()

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            batch, self._out = self._out, bytearray()
            taken, self._taken = self._taken, trio.Event()
            self._wake = trio.Event()
            with trio.fail_after(self._limits.peer_seconds):
                await self._stream.send_all(batch)
            taken.set()
