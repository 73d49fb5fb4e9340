"""The control socket: who may call, what each call does, and its progress.

Administration exists here alone, never on TCP. A load and an unload belong to
the daemon: a caller that goes away stops watching and nothing else.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn, Protocol

import trio

from rkvlmd import __version__
from rkvlmd.errors import RkvlmdError
from rkvlmd.front import control_socket
from rkvlmd.messages import JobView, ModelView
from rkvlmd.settings import ControlSettings, Settings
from rkvlmd.wire import control

log = logging.getLogger(__name__)

#: Calls of one connection that are under way or whose answers it has not taken. A peer that
#: sends more and reads nothing is not read any further.
CALLS = 8
_READ_BYTES = 65536


class Scheduler(Protocol):
    """What the control socket needs of the scheduler."""

    def jobs(self) -> list[JobView]:
        """Return every admitted job."""
        ...

    def cancel(self, job_id: str, /) -> bool:
        """End a job; false where there is none of this id."""
        ...


class Residency(Protocol):
    """What the control socket needs of residency."""

    def models(self) -> list[ModelView]:
        """Return every installed model."""
        ...

    def model(self, name: str | None, /) -> ModelView:
        """Return one model, or raise ``RkvlmdError`` ``model_not_found``."""
        ...

    async def load(self, name: str, /) -> ModelView:
        """Wait until the model is ready; the load goes on without the waiter."""
        ...

    async def unload(self, name: str, /) -> ModelView:
        """Wait until the model is gone."""
        ...

    async def wait_change(self) -> None:
        """Wait for the next change of any model."""
        ...


class House(Protocol):
    """The daemon as the control socket sees it."""

    @property
    def settings(self) -> Settings: ...
    @property
    def scheduler(self) -> Scheduler: ...
    @property
    def residency(self) -> Residency: ...
    @property
    def http_address(self) -> str: ...
    @property
    def stopping(self) -> bool: ...
    def status(self) -> dict[str, Any]:
        """Return everything that ``rkvlmctl status`` shows."""
        ...


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
        async with listener, trio.open_nursery() as unloads:
            server = _Server(house, operators, unloads)
            task_status.started(path)
            await trio.serve_listeners(server.serve, [listener])


class _Server:
    def __init__(self, house: House, operator_gid: int | None, unloads: trio.Nursery) -> None:
        self._house = house
        self._unloads = unloads
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
                stream, limits, _Calls(self._house, peer, tier, self._unloads).answer
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


Say = Callable[[bytes], Awaitable[None]]
Answer = Callable[[control.Call, Say], Awaitable[bytes]]


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


class _Calls:
    """What one peer's calls do."""

    def __init__(
        self, house: House, peer: control.Peer, tier: control.Tier, unloads: trio.Nursery
    ) -> None:
        self._house = house
        self._peer = peer
        self._tier = tier
        self._unloads = unloads

    async def answer(self, call: control.Call, say: Say) -> bytes:
        """Do ``call``; return the line that answers it, which may be an error."""
        number, message, data = control.INTERNAL_ERROR, "", {}
        try:
            return control.encode(control.reply(call.id, await self._do(call, say)))
        except control.RpcError as error:
            number, message, data = error.number, error.message, error.data or {}
        except RkvlmdError as error:
            number, message = control.APPLICATION_ERROR, error.message
            data = {"code": error.code, "param": error.param}
        except Exception:  # a bug in one call is not the end of the daemon
            log.exception("control call %s failed", call.method)
            message = "internal error; see the log of the daemon"
            data = {"code": "server_error", "param": None}
        return control.encode(
            control.failure(control.RpcError(number, message, id=call.id, data=data))
        )

    async def _do(self, call: control.Call, say: Say) -> dict[str, Any]:
        house = self._house
        if control.METHODS[call.method].tier == "change":
            self._may_change(call)
        match call.method:
            case "status":
                return house.status()
            case "models":
                return {"models": [model_json(view) for view in house.residency.models()]}
            case "jobs":
                return {"jobs": [dataclasses.asdict(view) for view in house.scheduler.jobs()]}
            case "http":
                return _http(house)
            case "version":
                return {"version": __version__, "protocol": control.PROTOCOL}
            case "load":
                return await self._watch(call.params["model"], house.residency.load, say)
            case "unload":
                return await self._watch(call.params["model"], self._unload, say)
            case _:
                return self._cancel(call.params["id"])

    def _may_change(self, call: control.Call) -> None:
        what = " ".join([call.method, *call.params.values()])[:200]
        if self._tier != "change":
            log.warning("refused %r of uid %d, pid %d", what, self._peer.uid, self._peer.pid)
            raise control.RpcError(
                control.PERMISSION_DENIED,
                "only root, the user of the daemon and the operator group may do this",
                data={"code": "permission_denied", "param": None},
            )
        log.info("%r of uid %d, pid %d", what, self._peer.uid, self._peer.pid)
        if call.method == "load" and self._house.stopping:
            raise RkvlmdError("shutting_down", "the server is stopping")

    async def _unload(self, name: str) -> ModelView:
        """Unload in the server's nursery: half an unload would leave a model that is held."""
        if len(self._unloads.child_tasks) >= self._house.settings.control.max_connections:
            raise RkvlmdError("server_is_overloaded", "too many unloads are under way")
        done = trio.Event()
        failed: Exception | None = None

        async def unload() -> None:
            nonlocal failed
            try:
                await self._house.residency.unload(name)
            except Exception as error:  # noqa: BLE001 - raised again where the caller waits
                failed = error
            finally:
                done.set()

        self._unloads.start_soon(unload, name=f"unload {name}")
        await done.wait()
        if failed is not None:
            raise failed
        return self._house.residency.model(name)

    def _cancel(self, job: str) -> dict[str, Any]:
        if not self._house.scheduler.cancel(job):
            raise RkvlmdError("not_found", "there is no such job", param="id")
        return {"cancelled": job}

    async def _watch(
        self, name: str, act: Callable[[str], Awaitable[ModelView]], say: Say
    ) -> dict[str, Any]:
        """Do ``act``, telling each change of the model until it is done."""
        name = self._house.residency.model(name).name
        view: ModelView | None = None
        failed: RkvlmdError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_changes, name, say, name="control progress")
            try:
                view = await act(name)
            except RkvlmdError as error:
                failed = error
            nursery.cancel_scope.cancel(reason=f"{name} has got there")
        if failed is not None:
            raise failed
        assert view is not None
        return {"model": model_json(view)}

    async def _tell_changes(self, name: str, say: Say) -> None:
        """Say each change of the model; a slow peer gets the latest alone."""
        residency = self._house.residency
        told: dict[str, Any] | None = None
        while True:
            try:
                view = residency.model(name)
            except RkvlmdError:
                return  # uninstalled meanwhile; the call itself reports it
            now = control.progress(
                model=view.name,
                state=view.state.value,
                progress=round(view.progress, 3),
                detail=view.detail,
            )
            if now == told:
                await residency.wait_change()
            else:
                told = now
                await say(control.encode(now))


def model_json(view: ModelView) -> dict[str, Any]:
    """Return a model as the control socket shows it; the state as its word."""
    return dataclasses.asdict(view) | {"state": view.state.value}


def _http(house: House) -> dict[str, Any]:
    settings = house.settings
    return {
        "address": house.http_address,
        "keys": bool(settings.http.api_keys_file),
        "max_images": settings.media.max_images,
        "max_image_bytes": settings.media.max_image_bytes,
        "job_seconds": settings.queue.job_seconds,
    }
