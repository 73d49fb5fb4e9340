"""A picture becomes one or more inputs of encoders, and a line of tags and places: no pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

from rkvlmd.models import assembly, families, geometry
from rkvlmd.models.manifest import Encoder, Manifest, Tags

Detail = Literal["auto", "low", "high"]
Grid = tuple[int, int, int]


class View(NamedTuple):
    """One encoder input of a picture.

    ``encoder`` is an index of the manifest, ``cut`` says which pixels,
    ``tokens`` how many image tokens its rows fill. ``patches`` is the grid
    (time, rows, columns) that the encoder is told, ``grid`` the same in tokens.
    """

    encoder: int
    cut: geometry.Cut
    tokens: int
    patches: Grid | None = None
    grid: Grid | None = None


class Plan(NamedTuple):
    """``layout`` is what stands at the picture's place: strings, and indices of ``views``.

    ``tiles``: all views are one place, number 0, whose ``block`` rows are
    assembled of theirs (``models.assembly``), which are so many rows and columns of tiles first.
    """

    views: tuple[View, ...]
    layout: tuple[str | int, ...]
    tiles: tuple[int, int] | None = None
    block: int = 0

    @property
    def places(self) -> tuple[int, ...]:
        """Image tokens of each place that ``layout`` numbers."""
        return places((view.tokens for view in self.views), self.tiles, self.block)

    @property
    def tokens(self) -> int:
        """Image tokens of the whole picture."""
        return sum(self.places)


def places(tokens: Iterable[int], tiles: tuple[int, int] | None, block: int) -> tuple[int, ...]:
    """Return the image tokens of each place: one a view, or one ``block`` of all that are tiled."""
    return tuple(tokens) if tiles is None else (block,)


def plan(manifest: Manifest, width: int, height: int, detail: Detail = "auto") -> Plan:
    """Say what becomes of a picture of ``width`` x ``height`` pixels, upright.

    ``low`` makes one input of the encoder with the fewest tokens. Where the
    rule says ``cut_at`` ``high``, so does ``auto``. The manifest must have an
    encoder and the tags of a picture.
    """
    index = choose(manifest, detail)
    encoder = manifest.encoders[index]
    tile = _tile(manifest)
    if detail == "low" or (detail == "auto" and encoder.resize.cut_at == "high"):
        cuts = geometry.Cuts((geometry.single(width, height, encoder),))
    else:
        cuts = geometry.cut(width, height, encoder, None if tile is None else tile[1])
    views = []
    for cut in cuts.cuts:
        if cut.tile and tile is not None:
            views.append(_view(*tile, cut))
        else:
            views.append(_view(index, encoder, cut))
    if manifest.decoder.cross_attention is not None:
        # The decoder reads such rows beside the prompt, where the picture is one token.
        views = [view._replace(tokens=1) for view in views]
    if manifest.decoder.rope == "mrope":
        views = [_with_grid(manifest.encoders[view.encoder], view) for view in views]
    # A text tower has no tags: nobody reads its pictures in a prompt.
    tags = manifest.image or Tags(content="")
    layout = families.get(manifest.family).layout
    if manifest.assembly is not None:
        tiles = (cuts.rows, cuts.columns)
        line = layout(tags, geometry.Cuts(cuts.cuts[-1:]))
        return Plan(tuple(views), tuple(line), tiles, assembly.count(manifest, tiles))
    return Plan(tuple(views), tuple(layout(tags, cuts)))


def least(manifest: Manifest, detail: Detail = "auto") -> int:
    """Return how many image tokens a picture of any size has at least.

    Where the encoder has one size and nothing is cut, each has exactly as many.
    """
    encoder = manifest.encoders[choose(manifest, detail)]
    if manifest.decoder.cross_attention is not None:
        return 1
    if encoder.patches is None or not encoder.patches.size:
        return encoder.tokens
    side = encoder.patches.size * encoder.patches.merge
    if encoder.resize.rule != "aspect":
        # Slices become as small as the picture is.
        return 1
    return max(1, encoder.resize.min_pixels // side**2)


def choose(manifest: Manifest, detail: Detail) -> int:
    """Return the index of the encoder that sees a whole picture at this detail."""
    whole = [i for i, encoder in enumerate(manifest.encoders) if not encoder.tile]
    if detail == "low":
        return min(whole, key=lambda i: manifest.encoders[i].tokens)
    if detail == "high":
        return max(whole, key=lambda i: manifest.encoders[i].tokens)
    return whole[0]


def _tile(manifest: Manifest) -> tuple[int, Encoder] | None:
    return next(((i, e) for i, e in enumerate(manifest.encoders) if e.tile), None)


def _view(index: int, encoder: Encoder, cut: geometry.Cut) -> View:
    patches, unit = encoder.patches, 0
    if patches is not None:
        unit = patches.size
    if not unit:
        return View(index, cut, encoder.tokens)
    assert patches is not None
    rows, columns = cut.place.height // unit, cut.place.width // unit
    grid = (1, rows // patches.merge, columns // patches.merge)
    return View(index, cut, grid[1] * grid[2], (1, rows, columns), grid)


def _with_grid(encoder: Encoder, view: View) -> View:
    """Return the view with the grid of its tokens, where the encoder has one size.

    Its tokens are squares of pixels: rows and columns are as height and width.
    """
    if view.grid is not None:
        return view
    rows = math.isqrt(view.tokens * encoder.height // encoder.width)
    columns = view.tokens // max(1, rows)
    if rows * columns != view.tokens or rows * encoder.width != columns * encoder.height:
        return view
    return view._replace(grid=(1, rows, columns))
