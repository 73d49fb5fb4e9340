"""Whose encoders leave for a load: memory, the owner's budget, and the NPU's address space."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rkvlmd.actors import memory
from rkvlmd.actors.loading import conversations_bytes

if TYPE_CHECKING:
    from rkvlmd.actors.loading import Part
    from rkvlmd.actors.records import Record
    from rkvlmd.settings import Settings


def who_leaves(
    record: Record,
    missing: Sequence[Part],
    others: Sequence[Record],
    settings: Settings,
    now: memory.Room,
) -> list[str]:
    """Return the models whose encoders do not stay; the decoder of one leaves in any case.

    ``missing`` are the parts of ``record`` that are to be started, ``others``
    the models that hold memory, the least recently used first.

    Raises:
      RkvlmdError: ``insufficient_memory``; then nothing need leave.

    """
    engine = record.entry.manifest.decoder.engine
    need = record.need(missing, conversations_bytes(settings, engine))
    own = record.loaded.parts if record.loaded is not None else missing
    crowd = memory.crowd(_on_npu(own), [(r.name, _on_npu(r.parts)) for r in others])
    freed = sum(r.resident("encoder") for r in others if r.name in crowd)
    return crowd + memory.admit(
        record.name,
        need=need,
        freed=freed + sum(r.resident("decoder") for r in others),
        reserve=settings.memory.reserve_bytes,
        now=now,
        kept=[(r.name, r.resident("encoder")) for r in others if r.name not in crowd],
        budget=settings.memory.models_bytes,
        used=sum(r.resident() for r in (*others, record)),
    )


def _on_npu(parts: Iterable[Part]) -> int:
    """Return the bytes of encoders in the NPU's memory."""
    return sum(part.size for part in parts if part.npu and part.role == "encoder")
