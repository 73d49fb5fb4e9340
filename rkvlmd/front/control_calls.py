"""What each call of the control socket does, and its progress.

Loads, unloads and pins belong to the daemon: a caller that goes away stops
watching and nothing else.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol

import trio

from rkvlmd import __version__
from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import JobView, ModelView
from rkvlmd.settings import Settings
from rkvlmd.wire import control

log = logging.getLogger(__name__)

#: Longest time between two looks at what a caller waits for, seconds: estimates grow old.
LOOK_SECONDS = 1.0

Say = Callable[[bytes], Awaitable[None]]
Act = Callable[[str], Awaitable[ModelView]]


class Scheduler(Protocol):
    """What the control socket needs of the scheduler."""

    def jobs(self) -> list[JobView]:
        """Return every admitted job."""
        ...

    def cancel(self, job_id: str, /) -> bool:
        """End a job; false where there is none of this id."""
        ...

    def pause(self) -> None:
        """Refuse new requests."""
        ...

    def resume(self) -> None:
        """Admit new requests again."""
        ...

    async def wait_empty(self) -> None:
        """Return when there is no job."""
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

    async def pin(self, name: str, /) -> ModelView:
        """Load a model if need be, and keep it."""
        ...

    async def unpin(self, name: str, /) -> ModelView:
        """Let a model go like any other again."""
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
    @property
    def draining(self) -> bool: ...
    @property
    def reload(self) -> Callable[[], Awaitable[dict[str, Any]]]: ...
    def status(self) -> dict[str, Any]:
        """Return everything that ``rkvlmctl status`` shows."""
        ...


class Calls:
    """What one peer's calls do."""

    def __init__(
        self, house: House, peer: control.Peer, tier: control.Tier, orders: trio.Nursery
    ) -> None:
        self._house = house
        self._peer = peer
        self._tier = tier
        self._orders = orders

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

        def to_the_end(act: Act) -> Act:
            return partial(self._to_the_end, act)

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
                return await self._watch(
                    call.params["model"], to_the_end(house.residency.unload), say
                )
            case "pin":
                return await self._watch(call.params["model"], to_the_end(house.residency.pin), say)
            case "unpin":
                return {"model": model_json(await house.residency.unpin(call.params["model"]))}
            case "drain":
                return await self._drain(call.params.get("wait", "yes") == "yes", say)
            case "resume":
                house.scheduler.resume()
                return self._admission()
            case "reload":
                return await house.reload()
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
        if call.method in {"load", "pin", "reload"} and self._house.stopping:
            raise RkvlmdError("shutting_down", "the server is stopping")

    async def _to_the_end(self, act: Act, name: str) -> ModelView:
        """Act in the server's nursery: half an unload would leave a model that is held."""
        if len(self._orders.child_tasks) >= self._house.settings.control.max_connections:
            raise RkvlmdError("server_is_overloaded", "too many orders are under way")
        done = trio.Event()
        view: ModelView | None = None
        failed: Exception | None = None

        async def finish() -> None:
            nonlocal failed, view
            try:
                view = await act(name)
            except Exception as error:  # noqa: BLE001 - raised again where the caller waits
                failed = error
            finally:
                done.set()

        self._orders.start_soon(finish, name=f"order for {name}")
        await done.wait()
        if failed is not None:
            raise failed
        assert view is not None
        return view

    async def _drain(self, wait: bool, say: Say) -> dict[str, Any]:
        """Refuse new requests; wait for those that are here, telling how many are left."""
        scheduler = self._house.scheduler
        scheduler.pause()
        left = most = len(scheduler.jobs())
        while left and wait and self._house.draining:
            share = 1 - left / most
            told = control.progress(
                model="", state="draining", progress=round(share, 3), detail=_requests(left)
            )
            await say(control.encode(told))
            with trio.move_on_after(LOOK_SECONDS):
                await scheduler.wait_empty()
            left = len(scheduler.jobs())
        return self._admission()

    def _admission(self) -> dict[str, Any]:
        return {"draining": self._house.draining, "jobs": len(self._house.scheduler.jobs())}

    def _cancel(self, job: str) -> dict[str, Any]:
        if not self._house.scheduler.cancel(job):
            raise RkvlmdError("not_found", "there is no such job", param="id")
        return {"cancelled": job}

    async def _watch(self, name: str, act: Act, say: Say) -> dict[str, Any]:
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
        """Say each change of the model, its estimate too; a slow peer gets the latest alone."""
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
                seconds_left=None if view.seconds_left is None else round(view.seconds_left, 1),
            )
            if now == told:
                with trio.move_on_after(LOOK_SECONDS):
                    await residency.wait_change()
            else:
                told = now
                await say(control.encode(now))


def model_json(view: ModelView) -> dict[str, Any]:
    """Return a model as the control socket shows it; the state as its word."""
    return dataclasses.asdict(view) | {"state": view.state.value}


def _requests(count: int) -> str:
    return "1 request is left" if count == 1 else f"{count} requests are left"


def _http(house: House) -> dict[str, Any]:
    settings = house.settings
    return {
        "address": house.http_address,
        "keys": bool(settings.http.api_keys_file),
        "max_images": settings.media.max_images,
        "max_image_bytes": settings.media.max_image_bytes,
        "job_seconds": settings.queue.job_seconds,
    }
