"""MiniCPM-V 2.6: the numbered whole picture, then rows of slices, each between its tags."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rkvlmd.models import prompt
from rkvlmd.models.families import Family
from rkvlmd.models.families.chatml import chatml

if TYPE_CHECKING:
    from rkvlmd.models.geometry import Cuts
    from rkvlmd.models.manifest import Tags

START, END = "<image>", "</image>"
SLICE_START, SLICE_END = "<slice>", "</slice>"


def layout(tags: Tags, cuts: Cuts) -> list[str | int]:
    """Return the picture's number, the whole picture, and a line for each row of slices."""
    line: list[str | int] = [f"<image_id>{prompt.NUMBER}</image_id>"]
    if cuts.whole is not None:
        line += [tags.start or START, cuts.whole, tags.end or END]
    for row in range(cuts.rows):
        if row:
            line.append("\n")
        for column in range(cuts.columns):
            line += [SLICE_START, cuts.cell(row, column), SLICE_END]
    return line


FAMILY = Family(
    name="minicpmv",
    # The model's own code joins the parts of a message with line feeds.
    template=chatml("(<image>./</image>)", system="You are a helpful assistant.", between="\\n"),
    layout=layout,
)
