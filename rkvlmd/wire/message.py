"""What all messages between the daemon and its children are made of."""

from __future__ import annotations

from typing import Annotated

import msgspec

Natural = Annotated[int, msgspec.Meta(ge=0)]


class Message(msgspec.Struct, frozen=True, tag_field="type", kw_only=True):
    """Base of all messages; ``fds`` descriptors travel beside the frame."""

    fds: Natural = 0


class Tensor(msgspec.Struct, frozen=True, kw_only=True):
    """What a memfd holds: C order, little endian.

    ``dtype`` is a numpy name (``uint8``, ``float32``).
    """

    shape: tuple[int, ...]
    dtype: str
