"""InternVL3 and 3.5: tiles and a thumbnail, one run of tokens between one pair of tags."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rkvlmd.models.families import Family
from rkvlmd.models.families.chatml import chatml

if TYPE_CHECKING:
    from rkvlmd.models.geometry import Cuts
    from rkvlmd.models.manifest import Tags

START, END = "<img>", "</img>"
PICTURE = "<IMG_CONTEXT>"


def layout(tags: Tags, cuts: Cuts) -> list[str | int]:
    """Return all views between ``<img>`` and ``</img>``, whoever has to write these.

    With empty tags in the manifest librkllmrt adds none: it would put them
    around every tile.
    """
    return [tags.start or START, *range(len(cuts.cuts)), tags.end or END]


FAMILY = Family(
    name="internvl",
    # The processor's own template; a picture stands on a line of its own before the text.
    template=chatml(PICTURE, between="\\n"),
    layout=layout,
)
