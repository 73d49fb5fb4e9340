"""The rows of a picture's views as one block, in the order in which its model reads them: no arrays.

The tiles of a page lie side by side, and the page is read line by line across them; then comes the
whole picture. After each line stands the row *end of line*, after the last line the row *end of
picture*: two weights of the model. DeepSeek-OCR calls them ``image_newline`` and
``view_seperator`` (``modeling_deepseekocr.py``, ``forward``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rkvlmd.models.manifest import Assembly, Encoder, Manifest

#: In place of the number of a view: the rows of the file ``assembly.rows``, and which is which.
FILE, END_OF_LINE, END_OF_PICTURE = -1, 0, 1


class Shape(NamedTuple):
    """What an encoder's rows are: ``lines`` of ``columns``, and what else it gives itself.

    ``ends``: each line has the row *end of line*; ``closed``: *end of picture* follows the last.
    """

    lines: int
    columns: int
    ends: bool
    closed: bool


class Run(NamedTuple):
    """``rows`` rows of a view, from its row ``start`` on."""

    view: int
    start: int
    rows: int


def shape(encoder: Encoder, square: int) -> Shape | None:
    """Return what an encoder's rows are; ``None`` where their number cannot be explained."""
    lines, columns = encoder.height // square, encoder.width // square
    for ends, closed in ((False, False), (True, False), (True, True)):
        if lines and columns and encoder.tokens == lines * (columns + ends) + closed:
            return Shape(lines, columns, ends, closed)
    return None


def views(tiles: tuple[int, int]) -> int:
    """Return how many views a picture of (rows, columns) of tiles has; (0, 0) is one of no tiles."""
    return tiles[0] * tiles[1] + 1


def encoders(manifest: Manifest, tiles: tuple[int, int]) -> list[Encoder]:
    """Return the encoder of each view: the tiles row by row, then the whole picture."""
    whole = next(encoder for encoder in manifest.encoders if not encoder.tile)
    small = [encoder for encoder in manifest.encoders if encoder.tile]
    return [*small[:1] * (views(tiles) - 1), whole]


def count(manifest: Manifest, tiles: tuple[int, int]) -> int:
    """Return how many rows the block of a picture has."""
    return sum(run.rows for run in order(manifest, tiles))


def order(manifest: Manifest, tiles: tuple[int, int]) -> list[Run]:
    """Return where the rows of a block come from, in its order.

    ``tiles`` are (rows, columns) of the views before the last one, which shows
    the whole picture; neighbouring rows are one run. The manifest must have an
    ``assembly`` that fits its encoders (``problems``).
    """
    made: list[Run] = []
    for run in _runs(manifest, tiles):
        last = made[-1] if made else None
        if last is not None and (last.view, last.start + last.rows) == (run.view, run.start):
            made[-1] = Run(last.view, last.start, last.rows + run.rows)
        else:
            made.append(run)
    return made


def _runs(manifest: Manifest, tiles: tuple[int, int]) -> Iterator[Run]:
    about = manifest.assembly
    assert about is not None
    below, across = tiles
    shown = [shape(encoder, about.square) for encoder in encoders(manifest, tiles)]
    whole, page = len(shown) - 1, shown[-1]
    assert page is not None
    line_end = Run(whole, page.columns, 1) if page.ends else Run(FILE, END_OF_LINE, 1)
    for row in range(below):
        tile = shown[0]
        assert tile is not None
        step = tile.columns + tile.ends
        for line in range(tile.lines):
            for column in range(across):
                yield Run(row * across + column, line * step, tile.columns)
            yield line_end
    step = page.columns + page.ends
    for line in range(page.lines):
        yield Run(whole, line * step, page.columns)
        yield Run(whole, line * step + page.columns, 1) if page.ends else line_end
    if page.closed:
        yield Run(whole, page.lines * step, 1)
    else:
        yield Run(FILE, END_OF_PICTURE, 1)


def says(manifest: Manifest) -> str:
    """Return in words what becomes of a picture, for people; empty without an ``assembly``."""
    about = manifest.assembly
    if about is None:
        return ""
    page = shape(encoders(manifest, (0, 0))[-1], about.square)
    own = [word for word, given in (
        ("lines", page and page.ends), ("the picture", page and page.closed)
    ) if given]  # fmt: skip
    ends = [f"the ends of {' and '.join(own)} are given by the encoder"] if own else []
    if about.rows is not None and len(own) < 2:
        ends.append(f"{'the others' if own else 'ends of lines and picture'} by {about.rows.file}")
    return f"one block of rows, line by line across the tiles, then the page; {', '.join(ends)}"


def problems(manifest: Manifest) -> list[str]:
    """Return what keeps a manifest from making such blocks, each with its key."""
    about = manifest.assembly
    if about is None:
        return []
    found = []
    for i, encoder in enumerate(manifest.encoders):
        if shape(encoder, about.square) is None:
            found.append(f"encoders[{i}].tokens: {_expected(encoder, about)}")
    whole = [encoder for encoder in manifest.encoders if not encoder.tile]
    if len(whole) != 1 or len(manifest.encoders) > 2:
        found.append("assembly: needs one encoder for whole pictures, and one for tiles at most")
    elif (page := shape(whole[0], about.square)) and not page.closed and about.rows is None:
        found.append(
            "assembly.rows: missing, and the encoder of whole pictures gives no end of line or no"
            " end of picture; supply an .npy file of two rows (image_newline, then"
            " view_seperator of the checkpoint)"
        )
    if any(encoder.outputs > 1 for encoder in manifest.encoders):
        found.append("assembly: needs encoders with one output")
    decoder = manifest.decoder
    if decoder.cross_attention is not None or decoder.rope != "plain" or manifest.video is not None:
        found.append("assembly: does not go with cross_attention, mrope or tags of a video")
    if manifest.embeddings is not None and manifest.embeddings.pictures == "rows":
        found.append("assembly: does not go with embeddings.pictures = rows")
    return found


def _expected(encoder: Encoder, about: Assembly) -> str:
    lines, columns = encoder.height // about.square, encoder.width // about.square
    bare, ends = lines * columns, lines * (columns + 1)
    return (
        f"{encoder.tokens}, but {encoder.width}x{encoder.height} pixels are {lines} lines of"
        f" {columns} (assembly.square): {bare} rows, {ends} with the ends of lines, or {ends + 1}"
        " with the end of the picture"
    )
