"""A whole house for the HTTP front: real admission and real jobs, whose work is a script."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import trio

from rkvlmd.actors.job import Job
from rkvlmd.actors.metrics import Metrics
from rkvlmd.actors.slots import Gate, Slot
from rkvlmd.errors import RkvlmdError
from rkvlmd.front.http.serve import serve_http
from rkvlmd.messages import ChatRequest, ModelState, ModelView
from rkvlmd.settings import Settings

Script = Callable[[Job], Awaitable[None]]


async def hello(job: Job) -> None:
    """The shortest whole answer."""
    job.prompt_tokens, job.completion_tokens = 5, 2
    job.checked.set()
    job.outbox.put("Hello")
    job.outbox.put(" there")
    job.finish("stop")


def held(go: trio.Event, text: str = "") -> Script:
    """Return the work of a job that answers, and ends, when the test lets it."""

    async def script(job: Job) -> None:
        job.checked.set()
        await go.wait()
        job.outbox.put(text)
        job.finish("stop")

    return script


def view(name: str, **changes: Any) -> ModelView:
    """Return a model that is ready."""
    base = ModelView(
        name=name,
        family="test",
        state=ModelState.READY,
        context=512,
        image=True,
        created=1_700_000_000,
        digest="0123456789abcdef" * 4,
    )
    return replace(base, **changes)


class FakeResidency:
    """Models that are there, and one of them by default."""

    def __init__(self) -> None:
        self.views = [view("other", image=False), view("demo", default=True)]
        self.can_serve = True

    def models(self) -> list[ModelView]:
        return list(self.views)

    def model(self, name: str | None) -> ModelView:
        for known in self.views:
            if known.name == name or (name is None and known.default):
                return known
        raise RkvlmdError("model_not_found", "There is no such model.", param="model")

    def ready(self) -> bool:
        return self.can_serve


class WatchedSlot:
    """A slot that tells its scheduler when it is given back."""

    def __init__(self, slot: Slot, scheduler: FakeScheduler) -> None:
        self._slot = slot
        self._scheduler = scheduler
        self.client = slot.client

    def resize(self, size: int) -> None:
        self._slot.resize(size)

    def own(self) -> None:
        self._slot.owned = True

    def release(self) -> None:
        self._slot.release()
        self._scheduler.changed()

    def close(self) -> None:
        self._slot.close()
        self._scheduler.changed()


class FakeScheduler:
    """Admits like the real one; a job's work is ``script``, in its own task and scope."""

    def __init__(self, house: FakeHouse, jobs: trio.Nursery, script: Script) -> None:
        self.gate = Gate(house.settings.queue)
        self.script = script
        self.jobs: list[Job] = []
        self.requests: list[ChatRequest] = []
        self._house = house
        self._nursery = jobs
        self._change = trio.Event()

    def changed(self) -> None:
        """Wake those who wait for a change."""
        self._change.set()
        self._change = trio.Event()

    async def until(self, *, admitted: int, submitted: int = 0) -> None:
        """Wait until so many requests are admitted, and at least so many were submitted."""
        while self.gate.jobs != admitted or len(self.jobs) < submitted:
            await self._change.wait()

    def reserve(self, client: str, size: int) -> WatchedSlot:
        if self._house.stopping:
            raise RkvlmdError("shutting_down", "The server is stopping.", retry_after=5)
        slot = WatchedSlot(self.gate.enter(client, size), self)
        self.changed()
        return slot

    def submit(self, slot: WatchedSlot, request: ChatRequest, *, request_id: str) -> Job:
        if self._house.stopping:
            raise RkvlmdError("shutting_down", "The server is stopping.", retry_after=5)
        model = self._house.residency.model(request.model)
        now = trio.current_time()
        job = Job(
            id=request_id,
            client=slot.client,
            request=request,
            deadline=now + 300,
            submitted=now,
            model=model.name,
        )
        slot.own()
        self.jobs.append(job)
        self.requests.append(request)
        self._nursery.start_soon(self._run, job, slot)
        return job

    async def _run(self, job: Job, slot: WatchedSlot) -> None:
        try:
            with job.scope:
                await self.script(job)
        finally:
            job.finish("shutdown")
            job.phase = "done"
            slot.close()


@dataclass(eq=False)
class FakeHouse:
    """The attributes of the real house that the HTTP front uses."""

    settings: Settings
    residency: FakeResidency = field(default_factory=FakeResidency)
    http_address: str = ""
    stopping: bool = False
    draining: bool = False
    stop: trio.Event = field(default_factory=trio.Event)
    stopped: trio.Event = field(default_factory=trio.Event)
    metrics: Metrics = field(default_factory=Metrics)
    scheduler: FakeScheduler = None  # type: ignore[assignment]

    @property
    def port(self) -> int:
        return int(self.http_address.rpartition(":")[2])


def settings(**http: Any) -> Settings:
    """Return defaults on a free port, with changes to the section ``http``."""
    plain = Settings()
    return replace(plain, http=replace(plain.http, bind="127.0.0.1:0", **http))


@asynccontextmanager
async def running(
    chosen: Settings | None = None, script: Script = hello
) -> AsyncIterator[FakeHouse]:
    """Serve on a free port; at the end stop in an orderly way."""
    house = FakeHouse(chosen or settings())

    async def serve(*, task_status: trio.TaskStatus[str]) -> None:
        await serve_http(house, None, stop=house.stop, task_status=task_status)  # type: ignore[arg-type]
        house.stopped.set()

    async with trio.open_nursery() as nursery:
        house.scheduler = FakeScheduler(house, nursery, script)
        await nursery.start(serve)
        yield house
        house.stop.set()
        with trio.fail_after(60):
            await house.stopped.wait()
        nursery.cancel_scope.cancel()


@dataclass
class Reply:
    """One response, as a client saw it."""

    status: int
    headers: dict[str, str]
    body: bytes

    def code(self) -> str:
        """Return the code of an error, of which all must be there that clients read."""
        assert self.headers["content-type"] == "application/json"
        assert self.headers["x-request-id"]
        assert self.headers["content-length"] == str(len(self.body))
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        return str(error["code"])


class Client:
    """A connection that shows what really crossed it. No library, so no library's mercy."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.held = b""

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def post(
        self, body: bytes, path: str = "/v1/chat/completions", *head: str, length: int | None = None
    ) -> None:
        """Send a request with a body, or with the head of one of ``length`` bytes."""
        lines = [
            f"POST {path} HTTP/1.1",
            "host: localhost",
            "content-type: application/json",
            f"content-length: {len(body) if length is None else length}",
            *head,
        ]
        await self.send("\r\n".join([*lines, "", ""]).encode() + body)

    async def get(self, path: str, *head: str, version: str = "1.1", method: str = "GET") -> None:
        lines = [f"{method} {path} HTTP/{version}", *(head or ("host: localhost",))]
        await self.send("\r\n".join([*lines, "", ""]).encode())

    async def more(self) -> bool:
        """Read what is there; whether there may be more."""
        data = await self.stream.receive_some(65536)
        self.held += data
        return bool(data)

    async def until(self, mark: bytes) -> bytes:
        """Take everything up to and with ``mark``."""
        while mark not in self.held:
            assert await self.more(), f"the end came before {mark!r}: {self.held!r}"
        taken, _, self.held = self.held.partition(mark)
        return taken + mark

    async def rest(self) -> bytes:
        """Take everything until the server closes."""
        while await self.more():
            pass
        taken, self.held = self.held, b""
        return taken

    async def head(self) -> Reply:
        """Take the status line and the headers."""
        raw = await self.until(b"\r\n\r\n")
        first, *lines = raw.decode().rstrip().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        return Reply(int(first.split()[1]), headers, b"")

    async def chunk(self) -> bytes:
        """Take one chunk; empty is the last."""
        size = int(await self.until(b"\r\n"), 16)
        while len(self.held) < size + 2:
            assert await self.more(), "the end came inside a chunk"
        data, self.held = self.held[:size], self.held[size + 2 :]
        return data

    async def reply(self) -> Reply:
        """Take a whole response."""
        reply = await self.head()
        if reply.headers.get("transfer-encoding") == "chunked":
            while data := await self.chunk():
                reply.body += data
        elif "content-length" in reply.headers:
            size = int(reply.headers["content-length"])
            while len(self.held) < size:
                assert await self.more(), "the end came inside the body"
            reply.body, self.held = self.held[:size], self.held[size:]
        else:
            reply.body = await self.rest()
        return reply


@asynccontextmanager
async def connected(house: FakeHouse) -> AsyncIterator[Client]:
    """Connect to the server of ``house``."""
    async with await trio.open_tcp_stream("127.0.0.1", house.port) as stream:
        yield Client(stream)
