"""What stands around pictures and videos in a prompt, and how large the frames of a video are."""

from __future__ import annotations

from typing import Annotated

import msgspec

Natural = Annotated[int, msgspec.Meta(ge=0)]


class Tags(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What stands around a picture in the prompt; ``content`` is repeated per image token."""

    start: str = ""
    content: str
    end: str = ""


class Video(Tags, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tags of a video. The numbers are for encoders of patches of several frames (ONNX).

    ``min_pixels`` and ``max_pixels`` are those of one frame, or of all frames
    together where the family counts so; 0: those of a picture for each frame.
    ``tokens_per_second`` is how far positions lie apart on the time axis; 0: by
    one from patch to patch.
    """

    min_pixels: Natural = 0
    max_pixels: Natural = 0
    tokens_per_second: Annotated[float, msgspec.Meta(ge=0, le=1000)] = 0.0
