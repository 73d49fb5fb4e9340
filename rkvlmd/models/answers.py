"""How a model answers: what it does where a request says nothing, and how it thinks aloud."""

from __future__ import annotations

from typing import Annotated

import msgspec

Positive = Annotated[int, msgspec.Meta(ge=1)]
Natural = Annotated[int, msgspec.Meta(ge=0)]
Tag = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class Thinking(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tags around a model's thoughts, which may stand at the beginning of its answer.

    ``system``: the text that the system message begins with to have the model
    think aloud, for models that are told so in words. Others have a template
    that knows ``enable_thinking``.
    """

    start: Tag = "<think>"
    end: Tag = "</think>"
    system: str = ""


class Defaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Used where a request says nothing.

    ``keep_alive_seconds``: how long the model stays loaded after its last use,
    -1 for ever; without it ``models.keep_alive_seconds`` of the settings.
    ``enable_thinking``: whether the model thinks aloud; without it the
    template decides.
    """

    max_tokens: Positive | None = None
    keep_alive_seconds: Annotated[float, msgspec.Meta(ge=-1)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] = 0.0
    top_k: Natural = 0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=2)] = 1.0
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] = 0.0
    enable_thinking: bool | None = None
