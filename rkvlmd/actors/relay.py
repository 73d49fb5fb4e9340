"""Orders that go out in the turn of the loop in which what they wait for is read.

A task that is woken up has its turn after others, and the NPU waits for it. So
what comes next is made ready before, and sent by whoever reads the end of what
is in front of it: the first encode of a job that is given the lease, and the
generation of one whose last rows have come. Where the NPU is idle, the first
encode does not even wait for the prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import trio

from rkvlmd.actors import channel, engine
from rkvlmd.actors.child import ChildDiedError, ChildWedgedError
from rkvlmd.errors import RkvlmdError
from rkvlmd.wire import child as wire
from rkvlmd.wire import frames

if TYPE_CHECKING:
    from rkvlmd.actors.child import Child
    from rkvlmd.actors.embeddings import Rows
    from rkvlmd.actors.job import Job
    from rkvlmd.actors.lease import Grip
    from rkvlmd.actors.pipeline import Tools
    from rkvlmd.actors.ready import Picture, View
    from rkvlmd.models.catalog import Entry
    from rkvlmd.settings import EngineSettings


class Begun:
    """An encode that was ordered when its job was given the lease.

    Until it is taken or settled, the NPU is at work for nobody else.
    """

    def __init__(self, child: Child, view: View, number: int, settings: EngineSettings) -> None:
        self.since = trio.current_time()
        self._child = child
        self._view = view
        self._number = number
        self._settings = settings

    def take(self, child: Child, view: View) -> int:
        """Return the number of the order if it is this one, to be awaited by the caller; else 0."""
        if child is not self._child or view.key != self._view.key:
            return 0
        number, self._number = self._number, 0
        return number

    async def settle(self) -> None:
        """Wait, shielded, for the end of one that nobody has taken."""
        number, self._number = self._number, 0
        if not number:
            return
        assert self._view.pixels is not None
        with contextlib.suppress(RkvlmdError, ChildDiedError, ChildWedgedError):
            rows, _ = await engine.encode(
                self._child, self._view.pixels, self._settings, number=number
            )
            rows.blob.close()


def nothing() -> None:
    """Begin nothing: what text alone needs at first."""


def first(job: Job, views: Sequence[View], tools: Tools) -> Callable[[], Begun | None]:
    """Return what orders the first encode of a job that is given the lease, if there is one.

    ``views`` are those that it needs, in order.
    """
    if not views:
        return nothing

    def begin() -> Begun | None:
        loaded = tools.residency.at_hand(job.model)
        view = next((v for v in views if v.key not in tools.cache), None)
        if loaded is None or view is None or view.pixels is None:
            return None
        if tools.overlap.on or job.request.videos or job.scope.cancel_called:
            return None
        child, settings = loaded.child("encoder", view.encoder), tools.settings.engine
        number = child.next_id()
        pixels = view.pixels
        order = wire.Encode(id=number, pixels=pixels.tensor, grid=view.patches)
        if not child.send_now(channel.frame(order, 1), [pixels.blob.fd]):
            return None
        return Begun(child, view, number, settings)

    return begin


def early(job: Job, entry: Entry, pictures: Sequence[Picture], tools: Tools) -> Grip | None:
    """Take the lease and begin the first encode before there is a prompt, if nobody else wants it.

    Only where the prompt is sure to fit, as no token is shorter than a byte,
    and a prep child is free to render it: the lease must not wait for that.
    """
    tokens = job.text_bytes + sum(picture.tokens for picture in pictures)
    if not pictures or tokens >= entry.manifest.decoder.context or not tools.prep.idle:
        return None
    views = [view for picture in pictures for view in picture.views]
    return tools.lease.take(job.client, job.model, job.rank, first(job, views, tools))


class Following:
    """The generation of a job; ``rows`` are those of all its views but the last one."""

    def __init__(self, job: Job, child: Child, order: wire.Generate, rows: Sequence[Rows]) -> None:
        self.order = order
        #: Whether it is on its way, and nobody waits for its end yet.
        self.sent = False
        self._job = job
        self._child = child
        self._rows = rows
        self._frame: bytes | None = None

    def prepare(self) -> None:
        """Make the frame, while the NPU is at work."""
        # One that is too large is an error of ``Child.send``.
        with contextlib.suppress(frames.FrameError):
            self._frame = channel.frame(self.order, len(self._rows) + 1)

    def send(self, fd: int) -> None:
        """Send it, unless the job is to end."""
        if self._frame is not None and not (self.sent or self._job.scope.cancel_called):
            self.sent = self._child.send_now(self._frame, [*(r.blob.fd for r in self._rows), fd])

    def taken(self) -> bool:
        """Return whether it was sent, to one who now waits for its end."""
        sent, self.sent = self.sent, False
        return sent

    def abandon(self) -> None:
        """End the child if it is at work for nobody."""
        if self.sent:
            self._child.kill("nobody waits for its answer")
