"""Encoder and decoder children: load, encode, generate, abort, each under its deadline.

One order at a time per child; the lease sees to it. Every function here leaves
the child either ready for the next order or killed.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import trio

from rkvlmd.actors.blobs import Blob
from rkvlmd.actors.child import Child, ChildDiedError, ChildWedgedError
from rkvlmd.actors.embeddings import Rows
from rkvlmd.errors import RkvlmdError
from rkvlmd.wire import child as wire

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rkvlmd.settings import EngineSettings

log = logging.getLogger(__name__)


def close_fds(fds: Sequence[int]) -> None:
    """Close descriptors that came with a message nobody wants."""
    for fd in fds:
        os.close(fd)


@contextmanager
def _due(child: Child, seconds: float, what: str) -> Iterator[trio.CancelScope]:
    """Bound what a child does; a miss kills it and raises ``ChildWedgedError``.

    The scope's deadline may be moved; ``child.due`` is what the watchdog sees.
    """
    with trio.CancelScope(deadline=trio.current_time() + seconds) as scope:
        child.due = scope.deadline
        try:
            yield scope
        finally:
            if child.due == scope.deadline:  # else the next order has begun
                child.due = math.inf
    if scope.cancelled_caught:
        child.kill(what)
        raise ChildWedgedError(child.name, what)


async def load(
    child: Child,
    order: wire.Load,
    settings: EngineSettings,
    *,
    size: int,
    progress: Callable[[float, str], None],
) -> wire.Ready:
    """Load a model's part of ``size`` bytes.

    Raises:
      ChildDiedError: the child ended.
      ChildWedgedError: no beat for ``beat_seconds``, or the whole took too long.
      RkvlmdError: the child said what is wrong with the model.

    """
    total = max(settings.load_seconds, size / settings.load_bytes_per_second)
    with _due(child, total, "the load took too long"):
        await child.send(order)
        while True:
            message, fds = await _beating(child, settings.beat_seconds)
            close_fds(fds)
            if isinstance(message, wire.Ready):
                return message
            if isinstance(message, wire.Failed):
                raise RkvlmdError(message.code, message.message)
            if isinstance(message, wire.Progress):
                progress(message.fraction, message.doing)
    raise AssertionError("unreachable: a missed deadline raises")


async def _beating(child: Child, within: float) -> tuple[wire.FromChild, list[int]]:
    """Receive, as long as the child's main thread beats."""
    while True:
        with trio.CancelScope(deadline=child.beat_at + within):
            return await child.receive()
        if trio.current_time() >= child.beat_at + within:  # no beat moved it meanwhile
            child.kill("it stopped beating while it loaded")
            raise ChildWedgedError(child.name, "stopped beating while it loaded")


class Next(Protocol):
    """What follows an encode; see ``relay``."""

    def prepare(self) -> None:
        """Make it ready; the encode has begun."""
        ...

    def send(self, fd: int) -> None:
        """Send it: the rows are in ``fd``, which the caller keeps."""
        ...


async def encode(
    child: Child,
    pixels: Rows,
    settings: EngineSettings,
    grid: tuple[int, int, int] | None = None,
    *,
    number: int = 0,
    then: Next | None = None,
) -> tuple[Rows, float]:
    """Encode one view; return rows that the caller owns, and the seconds it took.

    Cannot be interrupted: a cancelled caller waits (shielded) for the end of
    the encode, within its deadline. ``number`` is that of an order which was
    sent already; ``then`` goes out in the turn in which the rows come.

    Raises:
      ChildDiedError, ChildWedgedError, RkvlmdError: as for ``load``.

    """
    sent, number = bool(number), number or child.next_id()

    def hear(message: wire.FromChild, fds: Sequence[int]) -> bool:
        if then is not None and _is_end(message, fds, number):
            then.send(fds[0])
        return False

    with (
        trio.CancelScope(shield=True),
        _due(child, settings.encode_seconds, "the encode took too long"),
    ):
        child.listener = hear
        try:
            if not sent:
                order = wire.Encode(id=number, pixels=pixels.tensor, grid=grid)
                await child.send(order, [pixels.blob.fd])
            if then is not None:
                then.prepare()
            while True:
                message, fds = await child.receive()
                if _is_end(message, fds, number):
                    return Rows(Blob(fds[0]), message.rows), message.seconds
                close_fds(fds)
                if isinstance(message, wire.Failed) and message.id == number:
                    raise RkvlmdError(message.code, message.message)
        finally:
            if child.listener is hear:
                child.listener = None
    raise AssertionError("unreachable: a missed deadline raises")


def _is_end(message: wire.FromChild, fds: Sequence[int], number: int) -> TypeGuard[wire.EncodeDone]:
    return isinstance(message, wire.EncodeDone) and message.id == number and len(fds) == 1


async def embed(
    child: Child, order: wire.Embed, rows: Sequence[Rows], settings: EngineSettings, pace: Pace
) -> wire.EmbedDone:
    """Make the vector of one input, within the deadline of a first token.

    Cannot be interrupted, like ``encode``.

    Raises:
      ChildDiedError, ChildWedgedError, RkvlmdError: as for ``load``.

    """
    tokens = len(order.tokens) or order.count
    within = settings.first_token_seconds + 4 * tokens / pace.prefill_rate
    with trio.CancelScope(shield=True), _due(child, within, "the embedding took too long"):
        await child.send(order, [r.blob.fd for r in rows])
        while True:
            message, fds = await child.receive()
            close_fds(fds)
            if isinstance(message, wire.EmbedDone) and message.id == order.id:
                # A picture alone is pooled without the decoder, which says nothing of its pace.
                if sum(span.count for span in order.spans) < message.tokens:
                    pace.prefilled(message.tokens, message.seconds)
                return message
            if isinstance(message, wire.Failed) and message.id == order.id:
                raise RkvlmdError(message.code, message.message)
    raise AssertionError("unreachable: a missed deadline raises")


@dataclass(slots=True)
class Pace:
    """What was measured on one model: the prefill rate (tokens/s) and the load time (s)."""

    prefill_rate: float
    load_seconds: float = math.inf

    def prefilled(self, tokens: int, seconds: float) -> None:
        """Learn from one prefill; an average that forgets."""
        if tokens >= 8 and seconds > 0:
            self.prefill_rate += 0.3 * (tokens / seconds - self.prefill_rate)


@dataclass(slots=True)
class Generation:
    """One generation as it goes on; the job reads it at the end.

    ``done`` is the end that the child told, also after an abort. ``on_done``
    hears of one without an abort in the turn in which it is read, if the
    caller of ``generate`` is sure to hear of it too.
    """

    on_prefilled: Callable[[wire.Prefilled], None]
    on_text: Callable[[str, int], None]
    on_done: Callable[[wire.GenerateDone], None] = lambda _done: None
    somebody_waits: Callable[[], bool] = lambda: False
    prefilled: bool = False
    done: wire.GenerateDone | None = None
    extra: dict[str, Any] = field(default_factory=dict)


async def generate(
    child: Child,
    order: wire.Generate,
    rows: Sequence[Rows],
    settings: EngineSettings,
    pace: Pace,
    run: Generation,
    *,
    sent: bool = False,
) -> wire.GenerateDone:
    """Generate; a cancelled caller aborts, and waits for the child to be free again.

    ``sent``: the order is on its way already.

    Raises:
      ChildDiedError, ChildWedgedError, RkvlmdError: as for ``load``.

    """
    tokens = len(order.tokens) or order.count
    first = settings.first_token_seconds + 4 * tokens / pace.prefill_rate
    started = trio.current_time()
    try:
        with _due(child, first, "no first token in time") as scope:
            # Handled where they are read: a turn of the loop less on a token's way to the client.
            child.listener = hear = _hearer(child, order, run, scope, settings, pace)
            try:
                if not sent:
                    await child.send(order, [r.blob.fd for r in rows])
                return await _end(child, order, run, hear)
            finally:
                if child.listener is hear:
                    child.listener = None
    except trio.Cancelled:
        with trio.CancelScope(shield=True):
            await _abort(child, order, run, settings, pace, started + first)
        raise


def _hearer(
    child: Child,
    order: wire.Generate,
    run: Generation,
    scope: trio.CancelScope | None,
    settings: EngineSettings,
    pace: Pace,
) -> Callable[[wire.FromChild, Sequence[int]], bool]:
    """Return what takes the messages between an order and its end; true: it took this one.

    Without a scope the text goes nowhere.
    """

    def hear(message: wire.FromChild, _fds: Sequence[int] = ()) -> bool:
        if isinstance(message, wire.Text) and message.id == order.id:
            if scope is not None:
                run.on_text(message.text, message.tokens)
        elif isinstance(message, wire.Prefilled) and message.id == order.id:
            run.prefilled = True
            pace.prefilled(message.prompt - message.cached, message.seconds)
            if scope is not None:
                run.on_prefilled(message)
        else:
            ended = isinstance(message, wire.GenerateDone) and message.id == order.id
            if ended and scope is not None and child.awaited:
                assert isinstance(message, wire.GenerateDone)
                run.on_done(message)
            return False
        if scope is not None:
            scope.deadline = child.due = trio.current_time() + settings.token_seconds
        return True

    return hear


async def _end(
    child: Child, order: wire.Generate, run: Generation, hear: Callable[..., bool]
) -> wire.GenerateDone:
    """Wait until the order has ended."""
    while True:
        message, fds = await child.receive()
        close_fds(fds)
        if hear(message) or getattr(message, "id", None) != order.id:
            continue
        if isinstance(message, wire.GenerateDone):
            run.done = message
            return message
        if isinstance(message, wire.Failed):
            raise RkvlmdError(message.code, message.message)


async def _abort(
    child: Child,
    order: wire.Generate,
    run: Generation,
    settings: EngineSettings,
    pace: Pace,
    first_due: float,
) -> None:
    """Ask the child to stop and wait until it has; kill it when it does not.

    Between tokens an abort is acknowledged within ``abort_seconds``. A prefill
    cannot be interrupted on every engine: there the first token's deadline
    runs on, and the child is killed earlier only if what is left is longer
    than twice a load and somebody waits.
    """
    try:
        if not child.alive:
            return
        await child.send(wire.Abort(id=order.id))
        hear = _hearer(child, order, run, None, settings, pace)
        with trio.move_on_after(settings.abort_seconds):
            await _end(child, order, run, hear)
            return
        if not run.prefilled:
            left = first_due - trio.current_time()
            worth = left <= 2 * pace.load_seconds or not run.somebody_waits()
            if worth and left > 0:
                with trio.move_on_after(left):
                    await _end(child, order, run, hear)
                    return
        child.kill("it did not acknowledge an abort")
    except RkvlmdError:
        return
    except ChildDiedError as exc:
        log.info("%s ended during an abort: %s", child.name, exc.how)
