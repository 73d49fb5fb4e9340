"""Admission: how many requests, and how many bytes of them, are in the house."""

from __future__ import annotations

import math

from rkvlmd.errors import RkvlmdError
from rkvlmd.settings import QueueSettings


class Slot:
    """One admitted request's share; given back once."""

    __slots__ = ("_gate", "client", "open", "owned", "size")

    def __init__(self, gate: Gate, client: str, size: int) -> None:
        self._gate = gate
        self.client = client
        self.size = size
        self.open = True
        self.owned = False

    def resize(self, size: int) -> None:
        """Say how many bytes are really held.

        Raises:
          RkvlmdError: ``server_is_overloaded``, when there is no room for more.

        """
        if self.open:
            self._gate.resize(self, size)

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
    """Counts; refuses at once. Peak bytes are ``max_bytes``, whatever comes."""

    def __init__(self, settings: QueueSettings) -> None:
        self._settings = settings
        self.jobs = 0
        self.bytes = 0
        self.refused = 0
        self.service_seconds = 1.0

    def enter(self, client: str, size: int) -> Slot:
        """Admit or refuse.

        Raises:
          RkvlmdError: ``server_is_overloaded`` with ``retry_after``.

        """
        if self.jobs >= self._settings.max_jobs:
            raise self._full(f"{self.jobs} requests are waiting or running")
        self._room(size)
        self.jobs += 1
        self.bytes += size
        return Slot(self, client, size)

    def resize(self, slot: Slot, size: int) -> None:
        """Called by ``Slot.resize``."""
        self._room(size - slot.size)
        self.bytes += size - slot.size
        slot.size = size

    def leave(self, slot: Slot) -> None:
        """Called by ``Slot.close``."""
        self.jobs -= 1
        self.bytes -= slot.size

    def served(self, seconds: float) -> None:
        """Learn how long the lease is held for one job; an average that forgets."""
        self.service_seconds += 0.2 * (seconds - self.service_seconds)

    def _room(self, more: int) -> None:
        if more > 0 and self.bytes + more > self._settings.max_bytes:
            raise self._full("too many bytes of requests are held")

    def _full(self, why: str) -> RkvlmdError:
        self.refused += 1
        estimate = math.ceil(self.jobs * self.service_seconds / 2)
        return RkvlmdError(
            "server_is_overloaded",
            f"The server is busy: {why}. Please try again later.",
            retry_after=max(1, min(120, estimate)),
        )
