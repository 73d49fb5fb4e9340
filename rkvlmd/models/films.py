"""Videos whose frames become patches together (Qwen-VL): sizes, times, places; numbers alone.

A patch in time is made of ``patches.temporal`` frames. In the published towers
such patches never see each other, so each is one input of the encoder, with a
grid of (1, rows, columns): the same rows as all of them together would give.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

from rkvlmd.models import families, geometry, views
from rkvlmd.models.manifest import Encoder, Manifest, Patches, Video

#: Frames a second of a list of frames without times: what Qwen's own tools assume of one
#: (qwen-vl-utils, ``FPS``).
FRAMES_A_SECOND = 2.0
#: The least that a budget shared among frames leaves to one, in ``min_pixels`` (qwen-vl-utils).
_FLOOR = 1.05


class Film(NamedTuple):
    """What a model that takes videos makes of one, for the chosen encoder (``encoder``)."""

    encoder: int
    entry: Encoder
    patches: Patches
    video: Video
    kind: families.Film


def of(manifest: Manifest, detail: views.Detail = "auto") -> Film | None:
    """Return how this model takes videos; ``None``: their frames are pictures to it."""
    kind = families.get(manifest.family).film
    if manifest.decoder.engine != "onnx" or not manifest.encoders:
        return None
    whole = [entry for entry in manifest.encoders if not entry.tile]
    several = all(e.patches is not None and e.patches.temporal > 1 for e in whole)
    if kind is None or manifest.video is None or not several:
        return None
    index = views.choose(manifest, detail)
    entry = manifest.encoders[index]
    assert entry.patches is not None
    return Film(index, entry, entry.patches, manifest.video, kind)


def size(film: Film, frames: int, width: int, height: int, most_tokens: int) -> geometry.Size:
    """Return the size to which all frames of a video are resized, pixels.

    ``width`` and ``height`` are those of its frames. The arithmetic is that of
    the published video processors (``Qwen2VLVideoProcessor.resize`` with a cap
    on all frames together, ``Qwen3VLVideoProcessor``), floats included;
    ``most_tokens`` is the budget of the whole video, and no frame is larger
    than a picture may be. An encoder of one size has that.
    """
    entry, rule = film.entry, film.entry.resize
    if rule.rule != "aspect":
        return entry.width, entry.height
    unit = film.patches.size * film.patches.merge
    ceiling = entry.tokens * unit**2
    total = max(1, most_tokens) * unit**2 * film.patches.temporal
    if film.kind == "timed":
        most = min(film.video.max_pixels or ceiling * frames, ceiling * frames, total)
        least = film.video.min_pixels or rule.min_pixels * frames
        found = _together(frames, width, height, film.patches, least, most)
    else:
        most = min(film.video.max_pixels or rule.max_pixels, ceiling)
        least = min(film.video.min_pixels or rule.min_pixels, most)
        most = min(most, max(total // frames, int(least * _FLOOR)))
        found = _near(width, height, unit, (1, 1), least, most)
    if math.prod(found) > ceiling:
        return geometry.snapped(*found, unit, unit**2, ceiling)
    return found


def _together(
    frames: int, width: int, height: int, patches: Patches, least: int, most: int
) -> geometry.Size:
    """Return the size near this one with which all frames are within the budget together."""
    unit, several = patches.size * patches.merge, patches.temporal
    frames = max(frames, several)
    if min(width, height) < unit:
        scale = max(unit / height, unit / width)
        width, height = int(width * scale), int(height * scale)
    counted = round(frames / several) * several
    return _near(width, height, unit, (counted, frames), least, most)


def _near(
    width: int, height: int, unit: int, frames: tuple[int, int], least: int, most: int
) -> geometry.Size:
    """Return the size of multiples near this one, as ``smart_resize`` of both processors.

    ``frames`` are those that are compared with the budget, and those that share it.
    """
    w, h = round(width / unit) * unit, round(height / unit) * unit
    if frames[0] * w * h > most:
        shrink = math.sqrt(frames[1] * height * width / most)
        h = max(unit, math.floor(height / shrink / unit) * unit)
        w = max(unit, math.floor(width / shrink / unit) * unit)
    elif frames[0] * w * h < least:
        grow = math.sqrt(least / (frames[1] * height * width))
        h = math.ceil(height * grow / unit) * unit
        w = math.ceil(width * grow / unit) * unit
    return w, h


def count(film: Film, most: int, width: int, height: int, most_tokens: int) -> int:
    """Return how many frames to take: whole patches in time, within both limits; one at least.

    Frames become smaller before they become fewer.
    """
    several = film.patches.temporal
    for frames in range(most - most % several, several, -several):
        if tokens(film, frames, size(film, frames, width, height, most_tokens)) <= most_tokens:
            return frames
    return max(1, min(most, several))


def tokens(film: Film, frames: int, found: geometry.Size) -> int:
    """Return the image tokens of so many frames of this size."""
    unit = film.patches.size * film.patches.merge
    rows, columns = found[1] // unit, found[0] // unit
    return -(-frames // film.patches.temporal) * rows * columns


def view(film: Film, width: int, height: int, found: geometry.Size) -> views.View:
    """Return what the encoder sees of a frame of ``width`` x ``height`` pixels."""
    if film.entry.resize.rule == "aspect":
        cut = geometry.Cut((found,), geometry.Place(0, 0, *found))
    else:
        cut = geometry.single(width, height, film.entry)
    size, merge = film.patches.size, film.patches.merge
    rows, columns = cut.place.height // size, cut.place.width // size
    grid = (1, rows // merge, columns // merge)
    return views.View(film.encoder, cut, grid[1] * grid[2], (1, rows, columns), grid)


def axis(film: Film, frames: int, times: Sequence[float]) -> list[int]:
    """Return the positions on the time axis of all patches in time, from the first one.

    ``times`` (seconds) are those of the frames, empty where nobody knows them.
    Patches lie ``tokens_per_second`` x their distance in seconds apart, in the
    float32 of ``Qwen2_5_VLModel.get_rope_index``.
    """
    made = -(-frames // film.patches.temporal)
    if film.kind == "timed":
        return [0] * made
    rate = film.video.tokens_per_second
    if not rate:
        return list(range(made))
    gap = (times[-1] - times[0]) / (frames - 1) if times and frames > 1 else 1 / FRAMES_A_SECOND
    step = _single(rate * _single(film.patches.temporal * gap))
    return [int(_single(number * step)) for number in range(made)]


def layout(film: Film, frames: int, times: Sequence[float]) -> list[str | int]:
    """Return what stands at a video's place: strings, and indices of its patches in time."""
    several, tags = film.patches.temporal, film.video
    made = -(-frames // several)
    if film.kind == "run":
        return [tags.start, *range(made), tags.end]
    known = list(times) or [number / FRAMES_A_SECOND for number in range(frames)]
    # The processor leaves the tags of the template around all of it (transformers 5).
    line: list[str | int] = [tags.start]
    for number in range(made):
        own = known[number * several : (number + 1) * several]
        # The last frame stands for those that are missing.
        middle = (own[0] + own[-1]) / 2
        line += [f"<{middle:.1f} seconds>", tags.start, number, tags.end]
    return [*line, tags.end]


def _single(value: float) -> float:
    """Return the float32 nearest to a number."""
    found: float = struct.unpack("f", struct.pack("f", value))[0]
    return found
