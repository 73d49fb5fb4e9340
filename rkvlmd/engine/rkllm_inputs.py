"""Builds the ``RKLLMInput`` of each kind, and checks what the library would not."""

from __future__ import annotations

import ctypes as c
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rkvlmd.engine.backend import Rows
from rkvlmd.engine.rkllm_abi import Layout, new_input
from rkvlmd.engine.rkllm_session import ImageTags
from rkvlmd.engine.rkllm_types import Floats, InputType, Ints, pointer
from rkvlmd.errors import RkvlmdError

#: What the library puts the rows of a picture or video in place of.
IMAGE, VIDEO, AUDIO = "<image>", "<video>", "<audio>"


@dataclass(frozen=True, slots=True)
class Block:
    """Pictures, or the frames of videos, as one array.

    ``rows`` is float32 in C order of shape (pictures, tokens, row); a row is
    the embedding size times the encoder's outputs. ``width`` and ``height``
    are the encoder's pixels, which give the positions of the tokens.
    """

    rows: Rows
    width: int
    height: int
    tags: ImageTags


def stack(
    rows: Sequence[Rows], *, tokens: int, row: int, width: int, height: int, tags: ImageTags
) -> Block:
    """Return the rows of some pictures as one block that the library may use as it likes.

    One picture's rows stay where they are if they may be written; others are copied.

    Raises:
      RkvlmdError: ``engine_error`` when a picture has another number of rows,
        or rows of another length, than the model's encoder makes: the library
        would read past the buffer.

    """
    for picture in rows:
        if picture.shape != (tokens, row) or picture.dtype != np.float32:
            raise RkvlmdError(
                "engine_error",
                f"A picture's rows are {' x '.join(map(str, picture.shape))},"
                f" but the model takes {tokens} x {row}.",
            )
    if len(rows) == 1 and rows[0].flags.carray:
        return Block(rows[0][None], width, height, tags)
    block = np.empty((len(rows), tokens, row), np.float32)
    for i, picture in enumerate(rows):
        block[i] = picture
    return Block(block, width, height, tags)


def prompt_input(layout: Layout, prompt: bytes) -> Any:
    """Return an input of text alone, as the user."""
    value = _new(layout, InputType.PROMPT)
    value.prompt_input = prompt
    return value


def token_input(layout: Layout, tokens: npt.NDArray[np.int32]) -> Any:
    """Return an input of token ids; the caller keeps the array (C order) until the run ends."""
    value = _new(layout, InputType.TOKEN)
    value.token_input.input_ids = pointer(tokens, Ints)
    value.token_input.n_tokens = tokens.size
    return value


def embed_input(layout: Layout, rows: Rows) -> Any:
    """Return an input of embeddings, (tokens, embedding size); the caller keeps the array."""
    value = _new(layout, InputType.EMBED)
    value.embed_input.embed = pointer(rows, Floats)
    value.embed_input.n_tokens = rows.shape[0]
    return value


def multimodal_input(
    layout: Layout,
    prompt: bytes,
    pictures: Block | None,
    *,
    videos: Block | None = None,
    frames: int = 1,
) -> Any:
    """Return an input with pictures or, from 1.3.0, videos of ``frames`` frames each.

    The caller keeps the blocks until the run ends.

    Raises:
      RkvlmdError: ``engine_error`` when the places in the prompt are not as
        many as the pictures and videos: the library would read past a buffer.

    """
    count = 0 if pictures is None else len(pictures.rows)
    films = 0 if videos is None else len(videos.rows) // frames
    check_places(prompt, count, films)
    if videos is not None and (not layout.per_run or len(videos.rows) % frames):
        raise RkvlmdError("engine_error", "This version of the RKLLM runtime takes no video.")
    value = _new(layout, InputType.MULTIMODAL)
    target = value.multimodal_input
    target.prompt = prompt
    if pictures is not None and layout.per_run:
        image = target.image
        image.image_embed = pointer(pictures.rows, Floats)
        image.n_image, image.n_image_tokens = count, pictures.rows.shape[1]
        image.image_start, image.image_end = pictures.tags.start, pictures.tags.end
        image.image_content = pictures.tags.content
        image.image_width, image.image_height = pictures.width, pictures.height
    elif pictures is not None:
        target.image_embed = pointer(pictures.rows, Floats)
        target.n_image, target.n_image_tokens = count, pictures.rows.shape[1]
        target.image_width, target.image_height = pictures.width, pictures.height
    if videos is not None:
        video = target.video
        video.video_embed = pointer(videos.rows, Floats)
        video.n_video, video.n_frame_per_video = films, frames
        video.n_frame_tokens = videos.rows.shape[1]
        video.video_start, video.video_end = videos.tags.start, videos.tags.end
        video.video_content = videos.tags.content
        video.frame_width, video.frame_height = videos.width, videos.height
    return value


def check_places(prompt: bytes, pictures: int, videos: int = 0) -> None:
    """Check that the prompt has one place a picture and a video, and none for sound.

    Raises:
      RkvlmdError: ``engine_error``; the renderer or a template is at fault.

    """
    for mark, wanted in ((IMAGE, pictures), (VIDEO, videos), (AUDIO, 0)):
        found = prompt.count(mark.encode())
        if found != wanted:
            raise RkvlmdError("engine_error", f"The prompt has {found} places {mark} for {wanted}.")
    if b"\0" in prompt:
        raise RkvlmdError("engine_error", "The prompt has a NUL character.")


def _new(layout: Layout, kind: InputType) -> Any:
    value = new_input(layout)
    value.role = b"user"
    value.enable_thinking = False
    value.input_type = int(kind)
    return value


def batch(layout: Layout, inputs: Sequence[Any]) -> Any:
    """Return the inputs as an array with the stride of this version."""
    array = (layout.input * len(inputs))()
    for i, value in enumerate(inputs):
        c.memmove(c.byref(array, i * c.sizeof(layout.input)), c.byref(value), c.sizeof(value))
    return array
