"""What is refused before the NPU works on it, with both numbers: too many tokens, rows, views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import PicturePart, TextPart
from rkvlmd.models import views
from rkvlmd.wire.frames import MAX_FDS

if TYPE_CHECKING:
    from rkvlmd.actors.job import Job
    from rkvlmd.actors.ready import Picture, View
    from rkvlmd.messages import Turn
    from rkvlmd.models.catalog import Entry
    from rkvlmd.settings import Settings

#: Characters; the longest tokens of known vocabularies have half as many.
_LONGEST_TOKEN = 256


def check_places(job: Job, entry: Entry) -> None:
    """Refuse more pictures than the context holds before the first one is fetched or decoded.

    Each is counted with the fewest tokens that it can have; ``prompt`` counts exactly.

    Raises:
      RkvlmdError: ``context_length_exceeded``, with both numbers, and what to lower.

    """
    sources, manifest = job.request.pictures, entry.manifest
    if not sources or not manifest.encoders:
        return
    tokens = sum(views.least(manifest, source.detail) for source in sources)
    if tokens >= manifest.decoder.context:
        raise too_long(tokens, manifest.decoder.context, tokens, len(sources))


def check_text(entry: Entry, turns: Sequence[Turn]) -> None:
    """Refuse what cannot fit, however it is cut into tokens, before anybody works on it."""
    parts = (part for turn in turns for part in turn.parts)
    size = sum(len(part.text) for part in parts if isinstance(part, TextPart))
    context = entry.manifest.decoder.context
    if size > _LONGEST_TOKEN * context:
        raise RkvlmdError(
            "context_length_exceeded",
            f"The text has {size} characters, more than the model's context of {context} tokens"
            " can hold.",
            param="messages",
        )


def check_same(job: Job, before: Entry, entry: Entry) -> None:
    """Refuse to go on with a model whose files were exchanged while the job waited.

    Its pictures and its prompt were made for the one that was there before.
    """
    if before.digest != entry.digest:
        raise RkvlmdError(
            "model_unloaded",
            f"The model '{job.model}' was exchanged while the request waited; send it again.",
            should_retry=True,
        )


def limit(job: Job, entry: Entry, settings: Settings) -> int:
    """Return how many tokens may be generated: what was asked for, within the context."""
    context = entry.manifest.decoder.context
    left = context - job.prompt_tokens
    if left < 1:
        parts = [part for turn in job.request.turns for part in turn.parts]
        places = sum(isinstance(part, PicturePart) for part in parts)
        raise too_long(job.prompt_tokens, context, job.image_tokens, places)
    default = entry.manifest.defaults.max_tokens or settings.models.max_tokens
    return min(left, job.request.max_tokens or default)


def too_long(tokens: int, context: int, image_tokens: int, pictures: int) -> RkvlmdError:
    """Return the error with both numbers, and what to lower."""
    said = (
        f"The prompt has {tokens} tokens, but the model's context holds {context} tokens, prompt"
        " and answer together."
    )
    if 2 * image_tokens > tokens:
        said += (
            f" {image_tokens} of them are those of {pictures} pictures: send fewer pictures, or"
            " with detail 'low' where the model makes fewer tokens of them."
        )
    return RkvlmdError("context_length_exceeded", said, param="messages")


def row_bytes(entry: Entry, view: View) -> int:
    """Return how many bytes the rows of a view have: float32, of every output of its encoder."""
    manifest = entry.manifest
    return view.tokens * manifest.encoders[view.encoder].outputs * manifest.decoder.embedding * 4


def check_rows(entry: Entry, pictures: list[Picture], most: int) -> None:
    """Check that all pictures have embeddings of no more than ``most`` bytes, and few views.

    Raises:
      RkvlmdError: ``too_many_images``, with both numbers.

    """
    size = sum(row_bytes(entry, view) for picture in pictures for view in picture.views)
    if size > most:
        raise RkvlmdError(
            "too_many_images",
            f"The embeddings of these pictures are {size} bytes, but one request may have {most}"
            " (queue.max_embedding_bytes).",
            param="messages",
        )
    count = sum(len(picture.views) for picture in pictures)
    if count > MAX_FDS:
        raise RkvlmdError(
            "too_many_images",
            f"The pictures of this request have {count} views, but an engine takes {MAX_FDS} at"
            " most: send fewer pictures, or with detail 'low'.",
            param="messages",
        )
