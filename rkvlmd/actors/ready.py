"""What a job has prepared before it waits for the lease: pictures for their encoders, its prompt."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from rkvlmd.actors.embeddings import Rows
from rkvlmd.models.views import places
from rkvlmd.wire import child as wire


@dataclass(frozen=True, slots=True)
class View:
    """What one encoder is to see of a picture; ``key`` is that of its rows.

    ``encoder`` is its index, ``patches`` and ``grid`` as in ``wire.child.View``.
    ``time`` as in ``wire.child.Span``. Without ``pixels`` its rows are in the cache, and claimed there.
    """

    pixels: Rows | None
    key: str
    encoder: int
    tokens: int
    patches: tuple[int, int, int] | None = None
    grid: tuple[int, int, int] | None = None
    time: int = 0


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that is ready for its encoders; ``layout`` stands at its place in the prompt.

    ``video`` is the number of the video whose frames are the views, for engines
    that take videos. ``tiles`` and ``block`` as in ``models.views.Plan``: all
    views are one place. ``release`` gives back what else it holds.
    """

    views: tuple[View, ...]
    layout: tuple[str | int, ...]
    sha256: str
    video: int | None = None
    tiles: tuple[int, int] | None = None
    block: int = 0
    release: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)

    @property
    def places(self) -> tuple[int, ...]:
        """Image tokens of each place that ``layout`` numbers."""
        return places((view.tokens for view in self.views), self.tiles, self.block)

    @property
    def tokens(self) -> int:
        """Image tokens of all places."""
        return sum(self.places)

    @property
    def pixels(self) -> int:
        """Pixels that are held of all views, three values each."""
        held = [view.pixels for view in self.views if view.pixels is not None]
        return sum(-(-math.prod(pixels.tensor.shape) // 3) for pixels in held)

    def at(self, place: int) -> tuple[View, ...]:
        """Return the views whose rows go to a place, in the order of their memfds."""
        return self.views if self.tiles is not None else (self.views[place],)

    def close(self) -> None:
        """Give the pixels back."""
        for view in self.views:
            if view.pixels is not None:
                view.pixels.blob.close()
        self.release()


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens of the whole conversation and where the pictures' rows go; RKLLM: as text."""

    tokens: list[int]
    spans: list[tuple[int, int, int, int]]
    text: str = ""
    count: int = 0
    thinks: bool = False
    switched: bool = True


def needed(prompt: Prompt, pictures: Sequence[Picture]) -> list[View]:
    """Return the views whose rows an order takes, one a memfd, in the order of the prompt."""
    return [view for _, _, index, place in prompt.spans for view in pictures[index].at(place)]


def spans(prompt: Prompt, pictures: Sequence[Picture]) -> list[wire.Span]:
    """Return the places of all views in a prompt."""
    return [
        wire.Span(
            start=start,
            count=count,
            key=_key(view.key for view in views),
            grid=views[0].grid,
            video=pictures[index].video,
            time=views[0].time,
            tiles=pictures[index].tiles,
        )
        for start, count, index, place in prompt.spans
        for views in [pictures[index].at(place)]
    ]


def _key(keys: Iterable[str]) -> str:
    """Return the key of what stands at one place: that of its view, or one for all of them."""
    first, *others = keys
    return hashlib.sha256(" ".join((first, *others)).encode()).hexdigest() if others else first
