"""From an order to an ``RKLLMInput``: which kind it is, and what must be right before the call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rkvlmd.engine import rkllm_cross, rkllm_setup
from rkvlmd.engine import rkllm_inputs as inputs
from rkvlmd.engine.backend import Rows
from rkvlmd.engine.rkllm_embed import Table
from rkvlmd.engine.rkllm_library import Library
from rkvlmd.engine.rkllm_record import Parts, parts
from rkvlmd.engine.rkllm_session import ImageTags
from rkvlmd.errors import RkvlmdError
from rkvlmd.models.manifest import Encoder, Manifest
from rkvlmd.wire import child

Order = child.Generate | child.Embed


@dataclass(frozen=True, slots=True)
class Request:
    """One run: the input, what the cache will hold, and what must outlive the run (``kept``).

    ``caches`` are for ``rkllm_set_cross_attn_params``, before the run.
    """

    value: Any
    parts: Parts
    kept: Any = None
    caches: rkllm_cross.Caches | None = None


@dataclass(slots=True)
class _Rows:
    """The rows of an order, by what they stand for; ``videos`` by their numbers."""

    pictures: list[Rows] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    videos: dict[int, list[Rows]] = field(default_factory=dict)
    video_keys: dict[int, str] = field(default_factory=dict)


class Requests:
    """Builds the runs of one model in one library."""

    def __init__(
        self, manifest: Manifest, library: Library, folder: Path, has: Callable[[str], bool]
    ) -> None:
        """Open the embedding table, where the model has one.

        ``has`` says whether a known defect is met (``rkllm_defects``).

        Raises:
          RkvlmdError: ``invalid_model`` for a table that is none.

        """
        self._manifest, self._library, self._has = manifest, library, has
        self._tags = rkllm_setup.tags(manifest.image)
        self._video_tags = rkllm_setup.tags(manifest.video)
        self.table = Table(folder, manifest) if manifest.decoder.input == "embeddings" else None

    def build(self, order: Order, rows: Sequence[Rows]) -> Request:
        """Return the run of an order; ``rows`` are those of its spans.

        Raises:
          RkvlmdError: ``context_length_exceeded``, ``too_many_images``,
            ``invalid_request``, ``model_not_found``, or ``engine_error`` when
            the order is not consistent.

        """
        self._check(order, rows)
        found = _sorted(order.spans, rows)
        prompt = order.prompt.encode()
        inputs.check_places(prompt, len(found.pictures), len(found.videos))
        held = parts(order.prompt, found.keys, list(found.video_keys.values()))
        layout, shape = self._library.layout, self._manifest.decoder.cross_attention
        if shape is not None:
            # The library must see no place: the picture is read beside the prompt.
            place = self._tags.start + self._tags.content + self._tags.end
            text = prompt.replace(inputs.IMAGE.encode(), place)
            caches = rkllm_cross.caches(found.pictures, shape)
            return Request(inputs.prompt_input(layout, text), held, caches=caches)
        if self.table is not None:
            embeds = self.table(order.tokens, order.spans, rows)
            return Request(inputs.embed_input(layout, embeds), held, embeds)
        if self._manifest.decoder.input == "tokens":
            wide = np.asarray(order.tokens, np.int64)
            ids = wide.astype(np.int32)
            if (ids != wide).any() or ids.min() < 0:
                raise RkvlmdError("engine_error", "The prompt has a token that the model lacks.")
            return Request(inputs.token_input(layout, ids), held, ids)
        if not rows:
            return Request(inputs.prompt_input(layout, prompt), held)
        pictures = self._block(found.pictures, self._tags) if found.pictures else None
        videos, frames = self._films(list(found.videos.values()))
        value = inputs.multimodal_input(layout, prompt, pictures, videos=videos, frames=frames)
        return Request(value, held, (pictures, videos))

    def _check(self, order: Order, rows: Sequence[Rows]) -> None:
        if not order.prompt:
            raise RkvlmdError("engine_error", "The prompt is empty.")
        context, known = self._manifest.decoder.context, len(order.tokens)
        if known > context:
            raise RkvlmdError(
                "context_length_exceeded",
                f"This model's context is {context} tokens, but the prompt has {known}.",
                param="messages",
            )
        if not known and self._manifest.decoder.input == "tokens":
            raise RkvlmdError("engine_error", "The prompt has no tokens.")
        if len(rows) != len(order.spans):
            raise RkvlmdError("engine_error", "Pictures and their places differ in number.")
        several = sum(span.video is None for span in order.spans) > 1
        mixes = self._has("mixes_pictures") or self._has("one_picture")
        inside = self.table is None and self._manifest.decoder.cross_attention is None
        if several and mixes and inside:
            raise RkvlmdError(
                "too_many_images",
                f"Version {self._library.version} of the RKLLM runtime mixes up several"
                " pictures of this model; send one.",
                param="messages",
            )
        if any(span.video is not None for span in order.spans) and not (
            inside and self._library.layout.per_run and self._manifest.video is not None
        ):
            raise RkvlmdError(
                "invalid_request",
                f"Version {self._library.version} of the RKLLM runtime takes no video for this"
                " model: it needs 1.3.0 or newer, and a model with tags of videos.",
                param="messages",
            )
        adapters = {adapter.name for adapter in self._manifest.decoder.adapters}
        if order.adapter and order.adapter not in adapters:
            raise RkvlmdError("model_not_found", "The model has no such adapter.", param="model")

    def _block(self, rows: Sequence[Rows], tags: ImageTags) -> inputs.Block:
        encoder = self._encoder(len(rows[0]))
        assembled = self._manifest.assembly is not None
        return inputs.stack(
            rows,
            tokens=len(rows[0]) if assembled else encoder.tokens,
            row=self._manifest.decoder.embedding * encoder.outputs,
            width=encoder.width,
            height=encoder.height,
            tags=tags,
        )

    def _encoder(self, tokens: int) -> Encoder:
        """Return the encoder that gives so many rows: all pictures of a run have one size."""
        encoders = [e for e in self._manifest.encoders if not e.tile]
        return next((e for e in self._manifest.encoders if e.tokens == tokens), encoders[0])

    def _films(self, videos: Sequence[Sequence[Rows]]) -> tuple[inputs.Block | None, int]:
        """Return the frames of all videos as one block, and how many each of them has."""
        if not videos:
            return None, 1
        counts = {len(video) for video in videos}
        if len(counts) > 1:
            raise RkvlmdError(
                "invalid_request",
                "The RKLLM runtime takes several videos with the same number of frames alone;"
                f" these have {' and '.join(map(str, sorted(counts)))}.",
                param="messages",
            )
        frames = [frame for video in videos for frame in video]
        return self._block(frames, self._video_tags), counts.pop()


def _sorted(spans: Sequence[child.Span], rows: Sequence[Rows]) -> _Rows:
    found = _Rows()
    for span, values in zip(spans, rows, strict=True):
        if span.video is None:
            found.pictures.append(values)
            found.keys.append(span.key)
        else:
            found.videos.setdefault(span.video, []).append(values)
            before = found.video_keys.get(span.video, "")
            found.video_keys[span.video] = f"{before} {span.key}"
    return found
