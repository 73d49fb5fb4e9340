"""Admission, and one task per job.

There is no queue object: each admitted job is a task that waits for the lease,
whose order is the policy's.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from rkvlmd.actors import pipeline, policy, vectors
from rkvlmd.actors.child import ChildDiedError, ChildWedgedError
from rkvlmd.actors.clients import Classes
from rkvlmd.actors.job import Job
from rkvlmd.actors.slots import Gate, Slot
from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import PRIORITIES, EmbeddingsRequest

if TYPE_CHECKING:
    from rkvlmd.actors.pipeline import Tools
    from rkvlmd.messages import ChatRequest, Ended, EndReason, JobView
    from rkvlmd.settings import Settings

log = logging.getLogger(__name__)

#: Phases in which a job has not begun to use the engine.
_PREPARING = frozenset({"admitted", "fetching", "preparing"})
_QUEUED = _PREPARING | {"waiting"}
#: End reasons of errors that are more than "error".
_REASONS: dict[str, EndReason] = {
    "engine_died": "engine_died",
    "engine_crash": "engine_died",
    "model_unloaded": "model_unloaded",
}


class Scheduler:
    """Started once by the daemon. Jobs end only through their own task."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._settings = tools.settings
        self.gate = Gate(tools.settings.queue)
        self._classes = Classes(tools.settings.queue)
        self._live: dict[str, Job] = {}
        self._jobs: trio.Nursery | None = None
        self._draining = False
        #: The owner has stopped admission for now.
        self.paused = False
        self._empty = trio.Event()
        self.ends: dict[str, int] = {}
        tools.residency.on_unload = self._unloaded
        tools.lease.on_pass = self._passed
        tools.lease.warm = tools.warm
        tools.prep.on_picture = tools.metrics.picture_decode.observe

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run jobs until cancelled."""
        async with trio.open_nursery() as self._jobs:
            self._tools.overlap.nursery = self._jobs
            task_status.started()
            await trio.sleep_forever()

    def reserve(self, client: str, size: int) -> Slot:
        """Admit a request of ``size`` bytes before its body is read; never waits.

        Raises:
          RkvlmdError: ``server_is_overloaded``, ``rate_limit_exceeded``,
            ``draining`` or ``shutting_down``.

        """
        self._check_open()
        return self.gate.enter(client, size)

    def submit(self, slot: Slot, request: ChatRequest, *, request_id: str) -> Job:
        """Start the job of an admitted request; the slot is the job's from now on.

        Raises:
          RkvlmdError: ``model_not_found`` and what else is known at once; the
            slot is still the caller's then.

        """
        self._check_open()
        view = self._tools.residency.model(request.model)
        model = view.parent or view.name
        self._tools.residency.admit(model)
        now = trio.current_time()
        seconds = self._settings.queue.job_seconds
        if request.timeout is not None:
            seconds = min(seconds, request.timeout)
        rank = self._classes.rank(slot.client, request.priority)
        self._check_late(slot.client, model, rank, seconds)
        job_id = request_id
        while job_id in self._live:  # a client may send one request id twice
            job_id += "+"
        job = Job(
            id=job_id,
            client=slot.client,
            request=request,
            deadline=now + seconds,
            submitted=now,
            model=model,
            adapter=view.name.removeprefix(f"{model}:") if view.parent else "",
            rank=rank,
            text_bytes=max(0, slot.size - _media_bytes(request)),
            ignored=request.ignored,
        )
        slot.owned = True
        self._live[job.id] = job
        assert self._jobs is not None  # _check_open has looked
        self._jobs.start_soon(self._run, job, slot, name=f"job:{job.id}")
        return job

    def _check_late(self, client: str, model: str, rank: int, seconds: float) -> None:
        """Refuse a request whose deadline the work ahead of it would use up."""
        gate, lease = self.gate, self._tools.lease
        if gate.jobs * gate.service_seconds < seconds:
            return  # not even behind all the others
        new = lease.ticket(client, model, rank)
        others = lease.tickets()
        # Those whose pictures are being prepared will stand before it too.
        others += [
            replace(new, client=job.client, rank=job.rank)
            for job in self._live.values()
            if job.phase in _PREPARING
        ]
        start = policy.ahead(others, lease.view(), new) * gate.service_seconds
        if lease.held:
            start += max(0.0, gate.service_seconds - lease.held_seconds)
        gate.check_late(start, seconds)

    def _passed(self, ticket: policy.Waiting, seconds: float) -> None:
        """Learn from a holder of the lease, unless it was gone before it began."""
        if ticket.model and seconds > 0:
            self.gate.served(seconds)

    async def _run(self, job: Job, slot: Slot) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._deadline, job)
                try:
                    with job.scope:
                        await self._work(job, slot)
                except Exception:
                    # It came together with the cancellation of a job that has its end already.
                    log.exception("job %s failed while it ended", job.id)
                nursery.cancel_scope.cancel(reason="the job has ended")
        finally:
            job.finish("shutdown")
            job.phase = "done"
            self._live.pop(job.id, None)
            slot.close()
            self._account(job)
            if not self._live:
                self._empty.set()

    async def _work(self, job: Job, slot: Slot) -> None:
        try:
            embeds = isinstance(job.request, EmbeddingsRequest)
            run = vectors.run if embeds else pipeline.run
            job.finish(await run(job, slot, self._tools))
        except RkvlmdError as exc:
            job.finish(_REASONS.get(exc.code, "error"), exc)
        except ChildWedgedError as exc:
            log.error("job %s: %s", job.id, exc)  # noqa: TRY400 - the traceback says nothing
            error = RkvlmdError("engine_wedged", "The engine hung on this request and was ended.")
            job.finish("engine_wedged", error)
        except ChildDiedError as exc:
            log.error("job %s: %s: %s", job.id, exc, exc.last_words[-500:])  # noqa: TRY400 - the traceback says nothing
            error = RkvlmdError("engine_died", "The engine died while it worked on this request.")
            job.finish("engine_died", error)
        except Exception as exc:  # one job's bug is not the others' end
            log.exception("job %s failed", job.id, exc_info=exc)
            job.finish("error", RkvlmdError("server_error", "The server failed on this request."))

    @staticmethod
    async def _deadline(job: Job) -> None:
        await trio.sleep_until(job.deadline)
        job.abandon("deadline")

    def _account(self, job: Job) -> None:
        end = job.outbox.end
        assert end is not None
        self.ends[end.reason] = self.ends.get(end.reason, 0) + 1
        self._tools.metrics.end(job, end)
        log.info("%s", _line(job, end))

    # --- looking and ending ----------------------------------------------------------

    def jobs(self) -> list[JobView]:
        """Return the live jobs, oldest first; who waits for a load that is under way is ``loading``."""
        views = [job.view() for job in self._live.values()]
        loading = self._tools.residency.loading
        return [
            replace(view, phase="loading")
            if view.phase == "waiting" and loading(view.model)
            else view
            for view in views
        ]

    def cancel(self, job_id: str) -> bool:
        """End one job; whether there was one."""
        job = self._live.get(job_id)
        if job is None:
            return False
        job.abandon("cancelled")
        return True

    def _unloaded(self, model: str) -> None:
        """The owner unloads a model: its queued jobs end, the one that runs goes on."""
        for job in list(self._live.values()):
            if job.model == model and job.phase in _QUEUED:
                job.abandon("model_unloaded")

    async def drain(self, seconds: float) -> None:
        """Refuse new jobs, give those here some time, then end them; returns when all have.

        An encode and a prefill cannot be interrupted: after ``engine.abort_seconds``
        their children are ended, which they would be next anyway.
        """
        self._draining = True
        with trio.move_on_after(seconds if math.isfinite(seconds) else 0):
            await self.wait_empty()
        for job in list(self._live.values()):
            job.abandon("shutdown")
        with trio.move_on_after(self._settings.engine.abort_seconds):
            await self.wait_empty()
        if self._live:
            self._tools.residency.kill("the daemon stops")
        await self.wait_empty()

    def pause(self) -> None:
        """Refuse new requests until ``resume``; those here go on."""
        self.paused = True

    def resume(self) -> None:
        """Undo ``pause``."""
        self.paused = False

    def _check_open(self) -> None:
        if self._draining or self._jobs is None:
            raise self.gate.stopping()
        if self.paused:
            raise self.gate.draining()

    def adopt(self, settings: Settings) -> None:
        """Take settings that were read again; jobs that are here keep their deadlines."""
        queue = settings.queue
        self._settings = settings
        self.gate.adopt(queue)
        self._classes = Classes(queue)
        self._tools.lease.adopt(policy.Rules(queue.age_seconds, queue.max_jumps))

    async def wait_empty(self) -> None:
        """Return when no job is left, those included whose reader knows their end already."""
        while self._live:
            if self._empty.is_set():  # one event for all who wait
                self._empty = trio.Event()
            await self._empty.wait()

    def statistics(self) -> dict[str, object]:
        """For ``rkvlmctl status``."""
        return {
            "jobs": self.gate.jobs,
            "bytes": self.gate.bytes,
            "pixels": self.gate.pixels,
            "waiting": self._tools.lease.waiting,
            "loading": sum(view.phase == "loading" for view in self.jobs()),
            "refused": self.gate.refused,
            "refusals": dict(self.gate.refusals),
            "ended": dict(self.ends),
            "lease_busy_seconds": round(self._tools.lease.busy_seconds, 3),
            "conversations": self._tools.warm.conversations,
            "overlap": self._tools.overlap.status(),
        }


def _media_bytes(request: ChatRequest) -> int:
    pictures = sum(len(source.data) for source in request.pictures)
    return pictures + sum(len(source.data) for source in request.videos)


def _line(job: Job, end: Ended) -> str:
    """One line per request: no text, no pictures."""
    usage, t = end.usage, end.timings
    return (
        f"job {job.id} client={job.client} model={job.model} priority={PRIORITIES[job.rank]}"
        f" stream={int(job.request.stream)} end={end.reason} phase={job.ended_in}"
        f" code={end.error.code if end.error else '-'} pictures={len(job.request.pictures)}"
        f" prompt={usage.prompt_tokens} cached={usage.cached_tokens}"
        f" completion={usage.completion_tokens} fetch={t.fetch:.3f}"
        f" decode_image={t.decode_image:.3f} prepare={t.prepare:.3f} queue={t.queue:.3f}"
        f" load={t.load:.3f} encode={t.encode:.3f} prefill={t.prefill:.3f}"
        f" first_token={t.first_token:.3f} generate={t.generate:.3f} total={t.total:.3f}"
    )
