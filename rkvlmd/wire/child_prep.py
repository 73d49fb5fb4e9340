"""What the daemon and its prep children say to each other: pictures, videos, prompts."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from rkvlmd.wire.message import Message, Natural, Tensor


class Picture(Message, frozen=True, tag="picture", kw_only=True):
    """Prep: decode one picture. One memfd: its source bytes.

    ``encoding`` says what they are: ``base64`` text or the ``raw`` file.
    ``manifest`` and ``detail`` say which views it becomes (``models.views``).
    Limits as in ``[media]``. Answered by ``picture_done`` with one memfd per
    view; without any where the SHA-256 of the file is one of ``known``: then
    it was not decoded.
    """

    id: int
    encoding: Literal["base64", "raw"]
    manifest: dict[str, Any]
    detail: Literal["auto", "low", "high"] = "auto"
    max_bytes: Natural
    max_pixels: Natural
    min_side: Natural
    max_aspect: Natural
    exact: bool = False
    known: list[str] = msgspec.field(default_factory=list)


class Laid(msgspec.Struct, frozen=True, kw_only=True):
    """What stands at a picture's place: strings, and numbers of views.

    ``tokens`` has the image tokens of each view. ``video``: the views are the
    frames of a video, for which RKLLM has a place of its own.
    """

    layout: list[str | int]
    tokens: list[int]
    video: bool = False


class Video(Message, frozen=True, tag="video", kw_only=True):
    """Prep: sample frames of a video, evenly. One memfd: its source bytes.

    ``encoding`` says what they are: ``base64`` text, the ``raw`` file, or
    ``frames``: base64 texts of pictures, joined by commas. At most
    ``max_frames`` are taken, and no more than fit into ``max_tokens`` tokens of
    the model that ``manifest`` describes. Frames of more than
    ``frame_pixels`` are made smaller. Other limits as in ``[media]``;
    ``seconds`` bounds the work. Answered by ``video_done``.
    """

    id: int
    encoding: Literal["base64", "raw", "frames"]
    manifest: dict[str, Any]
    detail: Literal["auto", "low", "high"] = "low"
    max_frames: Natural
    max_tokens: Natural
    max_bytes: Natural
    max_pixels: Natural
    max_seconds: float
    frame_pixels: Natural
    seconds: float


class Frames(Message, frozen=True, tag="frames", kw_only=True):
    """Prep: frames of a video become one input of an encoder of patches.

    One memfd a frame: a picture file; the last one stands for those that are
    missing. ``manifest`` and ``detail`` say for which encoder (``models.films``),
    ``size`` is the width and height to which all frames of the video are resized.
    Answered by ``picture_done`` with one view; its ``sha256`` is over those of the files.
    """

    id: int
    manifest: dict[str, Any]
    detail: Literal["auto", "low", "high"] = "auto"
    size: tuple[Natural, Natural]
    max_bytes: Natural
    max_pixels: Natural
    exact: bool = False


class Render(Message, frozen=True, tag="render", kw_only=True):
    """Prep: template, neutralise, tokenise, expand pictures.

    ``turns`` is a list of ``{"role": ..., "parts": [{"text": ...} or
    {"picture": index}, ...]}``, with ``"thought"`` where an answer had one;
    ``pictures`` is what stands for each picture, by index. ``thinking`` is the
    template's ``enable_thinking``, ``None`` to leave it undefined. Answered by
    ``render_done``.
    """

    id: int
    folder: str
    manifest: dict[str, Any]
    turns: list[dict[str, Any]]
    pictures: list[Laid]
    thinking: bool | None = None


class View(msgspec.Struct, frozen=True, kw_only=True):
    """One encoder input of a picture: ``encoder`` by index, ``tokens`` that its rows fill.

    ``patches`` is the grid for ``Encode``, ``grid`` the one for ``Span``.
    """

    encoder: Natural
    tensor: Tensor
    tokens: Natural
    patches: tuple[int, int, int] | None = None
    grid: tuple[int, int, int] | None = None


class PictureDone(Message, frozen=True, tag="picture_done", kw_only=True):
    """``sha256`` is over the picture file's bytes; one memfd per view.

    ``layout`` is what stands at the picture's place in the prompt. ``tiles``:
    all views are one place, number 0, these rows and columns of tiles first
    (``models.assembly``). Of a file that the order names as known there is
    nothing but the hash.
    """

    id: int
    sha256: str
    width: int
    height: int
    format: str
    views: list[View]
    layout: list[str | int]
    tiles: tuple[Natural, Natural] | None = None


class VideoDone(Message, frozen=True, tag="video_done", kw_only=True):
    """One memfd per frame: a picture file, of ``times[i]`` seconds after the start.

    ``times`` is empty where nobody knows them; ``duration`` is 0 then.
    ``width`` and ``height`` are those of the first frame, for models that take videos
    (``models.films``).
    """

    id: int
    format: str
    frames: int
    times: list[float]
    duration: float
    width: Natural = 0
    height: Natural = 0


class RenderDone(Message, frozen=True, tag="render_done", kw_only=True):
    """``tokens``: the whole prompt, pictures expanded.

    ``spans`` as (start, count, picture, view), in the order of the prompt.
    ``prompt`` and ``count`` for RKLLM, as in ``generate``; where ``tokens`` is
    empty, the spans have no start. ``thinks``: the prompt ends inside thoughts.
    ``switched``: the order's ``thinking`` was nothing, or could be followed.
    """

    id: int
    tokens: list[int]
    spans: list[tuple[int, int, int, int]]
    prompt: str = ""
    count: Natural = 0
    thinks: bool = False
    switched: bool = True
