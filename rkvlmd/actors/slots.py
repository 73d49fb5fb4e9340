"""Admission: how many requests are in the house, how many bytes and how many pixels of them."""

from __future__ import annotations

import math
from typing import Literal

from rkvlmd.errors import RkvlmdError
from rkvlmd.settings import QueueSettings

#: Why a request was refused: the house is full of requests, of bytes, or of pixels; the client
#: holds its share; the work ahead would use up its deadline; the server is drained; the server stops.
Refusal = Literal["jobs", "bytes", "pixels", "client", "late", "draining", "stopping"]


class Slot:
    """One admitted request's share; given back once."""

    __slots__ = ("_gate", "client", "open", "owned", "pixels", "size")

    def __init__(self, gate: Gate, client: str, size: int) -> None:
        self._gate = gate
        self.client = client
        self.size = size
        self.pixels = 0
        self.open = True
        self.owned = False

    def resize(self, size: int) -> None:
        """Say how many bytes are really held.

        Raises:
          RkvlmdError: ``server_is_overloaded``, when there is no room for more.

        """
        if self.open:
            self._gate.resize(self, size)

    def add_bytes(self, more: int) -> None:
        """Count bytes that are held besides, such as of a download; negative: they are no more.

        Raises:
          RkvlmdError: as ``resize``.

        """
        self.resize(self.size + more)

    def add_pixels(self, pixels: int) -> None:
        """Count the pixels of a picture that is ready for its encoder, until the slot is closed.

        Raises:
          RkvlmdError: ``server_is_overloaded``, when there is no room for more;
            ``too_many_images``, when there would not be in an empty house.

        """
        if self.open:
            self._gate.add_pixels(self, pixels)

    def release(self) -> None:
        """Give the slot back, unless a job owns it; harmless when repeated."""
        if not self.owned:
            self.close()

    def close(self) -> None:
        """Give the slot back; for the job that owns it."""
        if self.open:
            self.open = False
            self._gate.leave(self)


class Gate:
    """Counts; refuses at once. The peaks are ``max_bytes`` and ``max_pixels``, whatever comes."""

    def __init__(self, settings: QueueSettings) -> None:
        self._settings = settings
        self.jobs = 0
        self.bytes = 0
        self.pixels = 0
        self.refusals: dict[Refusal, int] = {}
        self.service_seconds = 1.0
        self.measured = False
        self._clients: dict[str, int] = {}

    @property
    def refused(self) -> int:
        """How many requests were refused, for all reasons."""
        return sum(self.refusals.values())

    def enter(self, client: str, size: int) -> Slot:
        """Admit or refuse.

        Raises:
          RkvlmdError: ``rate_limit_exceeded`` or ``server_is_overloaded``, with
            ``retry_after``.

        """
        most = self._settings.max_jobs_per_client
        held = self._clients.get(client, 0)
        if 0 < most <= held:
            self._count("client")
            raise RkvlmdError(
                "rate_limit_exceeded",
                f"{held} requests of this client are waiting or running, and no more may"
                " (queue.max_jobs_per_client).",
                # The clients take turns, so one of its own ends after as many as there are for each.
                retry_after=_seconds(self.service_seconds * self.jobs / held),
            )
        if self.jobs >= self._settings.max_jobs:
            raise self._full("jobs", f"{self.jobs} requests are waiting or running")
        self._room(size)
        self.jobs += 1
        self.bytes += size
        self._clients[client] = held + 1
        return Slot(self, client, size)

    def resize(self, slot: Slot, size: int) -> None:
        """Called by ``Slot.resize``."""
        self._room(size - slot.size)
        self.bytes += size - slot.size
        slot.size = size

    def add_pixels(self, slot: Slot, pixels: int) -> None:
        """Called by ``Slot.add_pixels``."""
        most = self._settings.max_pixels
        if slot.pixels + pixels > most:
            raise RkvlmdError(
                "too_many_images",
                f"The pictures of one request may have {most} pixels at their encoder's size"
                f" (queue.max_pixels), but these have {slot.pixels + pixels} or more.",
                param="messages",
            )
        if self.pixels + pixels > most:
            raise self._full("pixels", "too many pictures are held")
        self.pixels += pixels
        slot.pixels += pixels

    def leave(self, slot: Slot) -> None:
        """Called by ``Slot.close``."""
        self.jobs -= 1
        self.bytes -= slot.size
        self.pixels -= slot.pixels
        left = self._clients.pop(slot.client) - 1
        if left:
            self._clients[slot.client] = left

    def served(self, seconds: float) -> None:
        """Learn how long the lease is held for one job; an average that forgets."""
        self.service_seconds += 0.2 * (seconds - self.service_seconds)
        self.measured = True

    def check_late(self, start: float, seconds: float) -> None:
        """Refuse a request that would start in ``start`` seconds and must be done in ``seconds``.

        Raises:
          RkvlmdError: ``server_is_overloaded`` with ``retry_after``.

        """
        if not self._settings.refuse_late or not self.measured or start < seconds:
            return
        self._count("late")
        raise RkvlmdError(
            "server_is_overloaded",
            f"The work ahead of this request takes about {math.ceil(start)} s, longer than its"
            f" deadline of {seconds:.3g} s.",
            retry_after=_seconds(start - seconds),
        )

    def adopt(self, settings: QueueSettings) -> None:
        """Take settings that were read again; what is admitted stays."""
        self._settings = settings

    def draining(self) -> RkvlmdError:
        """Return the error for a request that comes while the owner drains the server."""
        self._count("draining")
        return RkvlmdError(
            "draining",
            "The server takes no new requests for now: its owner is at work on it.",
            retry_after=min(120, self._settings.drain_retry_seconds),
        )

    def stopping(self) -> RkvlmdError:
        """Return the error for a request that comes too late for this process."""
        self._count("stopping")
        return RkvlmdError("shutting_down", "The server is stopping.", retry_after=5)

    def _room(self, more: int) -> None:
        if more > 0 and self.bytes + more > self._settings.max_bytes:
            raise self._full("bytes", "too many bytes of requests are held")

    def _full(self, reason: Refusal, why: str) -> RkvlmdError:
        self._count(reason)
        return RkvlmdError(
            "server_is_overloaded",
            f"The server is busy: {why}. Please try again later.",
            retry_after=_seconds(self.jobs * self.service_seconds / 2),
        )

    def _count(self, reason: Refusal) -> None:
        self.refusals[reason] = self.refusals.get(reason, 0) + 1


def _seconds(estimate: float) -> int:
    """Return a ``Retry-After``: clients give up above 120."""
    return max(1, min(120, math.ceil(estimate)))
