"""Pictures of one view each, as a prompt gets them."""

from __future__ import annotations

from collections.abc import Sequence

from rkvlmd.models.manifest import Manifest
from rkvlmd.wire.child import Laid


def one_view(manifest: Manifest, counts: Sequence[int]) -> list[Laid]:
    """Return a picture of one view for each number of image tokens."""
    tags = manifest.image
    around = (tags.start, tags.end) if tags is not None else ("", "")
    return [Laid(layout=[around[0], 0, around[1]], tokens=[count]) for count in counts]
