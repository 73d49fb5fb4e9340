"""Untrusted picture bytes to an encoder's input: limits, decoding, orientation."""

from __future__ import annotations

import binascii
import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
from PIL import GifImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from rkvlmd.engine import colours, resample, webp
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import geometry
from rkvlmd.models.manifest import Encoder
from rkvlmd.models.views import Plan, View

# Imported because that registers them: else Pillow loads all of its forty plugins for WebP.
_PLUGINS = (JpegImagePlugin, PngImagePlugin, WebPImagePlugin, GifImagePlugin)
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SPACE = b" \t\r\n\f\v"
#: Base64 of n bytes has 4n/3 characters; more than twice as many is not worth reading.
_MOST_TEXT = 2


@dataclass(frozen=True, slots=True)
class Limits:
    """What a picture may be: ``[media]`` of the settings."""

    max_bytes: int
    max_pixels: int
    min_side: int
    max_aspect: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """``tensor`` is the encoder's input; sizes are of the upright original, pixels."""

    tensor: npt.NDArray[Any]
    width: int
    height: int
    format: str


@dataclass(frozen=True, slots=True)
class Views:
    """One tensor for each view of ``plan``; sizes are of the upright original, pixels."""

    tensors: list[npt.NDArray[Any]]
    plan: Plan
    width: int
    height: int
    format: str


@dataclass(frozen=True, slots=True)
class Stream:
    """``Views`` whose tensors are made one by one: each is valid until the next is asked for.

    To ask for one raises what ``prepare_views`` raises.
    """

    tensors: Iterator[npt.NDArray[Any]]
    plan: Plan
    width: int
    height: int
    format: str


Planner = Callable[[int, int], Plan]


def check_bytes(size: int, limits: Limits) -> None:
    """Raise unless a file of this size may be read."""
    if size == 0:
        raise RkvlmdError("empty_image_file", "The picture is empty.")
    if size > limits.max_bytes:
        raise RkvlmdError(
            "image_file_too_large",
            f"The picture file has {size} bytes; the limit is {limits.max_bytes} bytes.",
        )


def check_text(size: int, limits: Limits) -> None:
    """Raise if base64 text of this many characters cannot be a picture within the limits."""
    if size > _MOST_TEXT * limits.max_bytes + 1024:
        check_bytes(size * 3 // 4, limits)


def from_base64(text: bytes, limits: Limits) -> bytes:
    """Return the file behind base64 text.

    White space anywhere, missing padding and the URL-safe alphabet are
    accepted; everything else that is not base64 is an error.
    """
    text = text.translate(None, _SPACE)
    check_bytes(len(text) and max(1, len(text.rstrip(b"=")) * 3 // 4), limits)
    if b"-" in text or b"_" in text:
        text = text.translate(bytes.maketrans(b"-_", b"+/"))
    if b"=" not in text[-2:]:
        text += b"=" * (-len(text) % 4)
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error:
        raise RkvlmdError("invalid_base64_image", "The picture is not valid base64.") from None


def sniff(data: bytes) -> str | None:
    """Return the format that the first bytes say, by Pillow's name."""
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:6] in {b"GIF87a", b"GIF89a"}:
        return "GIF"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return None


def prepare(data: bytes, encoder: Encoder, limits: Limits, *, exact: bool = False) -> Prepared:
    """Decode a picture file into the one input of an encoder whose rule cuts nothing.

    See ``prepare_views``.
    """

    def planner(width: int, height: int) -> Plan:
        return Plan((View(0, geometry.single(width, height, encoder), encoder.tokens),), (0,))

    views = prepare_views(data, planner, (encoder,), limits, exact=exact)
    return Prepared(views.tensors[0], views.width, views.height, views.format)


def prepare_views(
    data: bytes,
    planner: Planner,
    encoders: Sequence[Encoder],
    limits: Limits,
    *,
    exact: bool = False,
) -> Views:
    """Decode a picture file and bring it into the shapes that the encoders want.

    ``planner`` says which views a picture of some width and height becomes.
    ``exact`` decodes everything before it resizes; without it a JPEG is
    decoded at the smallest of 1/1, 1/2, 1/4 and 1/8 that leaves at least twice
    the target in both axes (19/20 of a large target), and large pictures
    shrink by whole factors first.

    Raises:
      RkvlmdError: each way in which the file is no picture within the limits.

    """
    with _reading(data, limits) as kind:
        image, size, plan = _decode(data, kind, planner, limits, exact=exact)
        tensors = resample.to_inputs(image, plan.views, encoders, exact=exact)
    return Views(tensors, plan, size[0], size[1], kind.lower())


def stream_views(
    data: bytes,
    planner: Planner,
    encoders: Sequence[Encoder],
    limits: Limits,
    *,
    exact: bool = False,
) -> Stream:
    """Do what ``prepare_views`` does with memory for one tensor of each size.

    The picture is decoded at once.

    Raises:
      RkvlmdError: each way in which the file is no picture within the limits.

    """
    with _reading(data, limits) as kind:
        image, size, plan = _decode(data, kind, planner, limits, exact=exact)
    made = resample.inputs_in_turn(image, plan.views, encoders, exact=exact)
    return Stream(_told(made, kind), plan, size[0], size[1], kind.lower())


def _told(tensors: Iterator[npt.NDArray[Any]], kind: str) -> Iterator[npt.NDArray[Any]]:
    """Make tensors; what goes wrong with those, and not with who asks, is the picture's fault."""
    while True:
        with _telling(kind):
            tensor = next(tensors, None)
        if tensor is None:
            return
        yield tensor


def frame_pixels(
    data: bytes, planner: Planner, encoder: Encoder, limits: Limits, *, exact: bool = False
) -> tuple[resample.Pixels, View]:
    """Decode a picture file into the one view of its plan, uint8 of (height, width, 3).

    Raises:
      RkvlmdError: as ``prepare_views``.

    """
    with _reading(data, limits) as kind:
        image, _, plan = _decode(data, kind, planner, limits, exact=exact)
        view = plan.views[0]
        return resample.Sheets(image, exact=exact).pixels(view.cut, encoder.resize), view


def upright_size(data: bytes, limits: Limits) -> tuple[int, int]:
    """Return the width and height of a picture file without decoding it.

    Raises:
      RkvlmdError: as ``prepare_views``, as far as its header shows.

    """
    with _reading(data, limits) as kind:
        if kind == "WEBP":
            _check_size(webp.canvas(data), limits)
        with _open(data, kind) as image:
            _check_size(image.size, limits)
            return _upright(image.size, _orientation(image))


@contextmanager
def _reading(data: bytes, limits: Limits) -> Iterator[str]:
    """Check a file's size, tell its format, and turn what a decoder raises into what clients read.

    Raises:
      RkvlmdError: each way in which the file is no picture within the limits.

    """
    check_bytes(len(data), limits)
    kind = sniff(data)
    if kind is None:
        raise RkvlmdError(
            "invalid_image_format",
            "The picture is no JPEG, PNG, WebP or GIF file.",
        )
    with _telling(kind):
        yield kind


@contextmanager
def _telling(kind: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            # Pillow warns of pictures above its own limit, and of odd files that it can read.
            warnings.simplefilter("ignore")
            yield
    except RkvlmdError:
        raise
    except MemoryError:
        raise RkvlmdError(
            "image_too_large", "The picture needs more memory than one picture may take."
        ) from None
    except Exception:  # noqa: BLE001 - hostile bytes make a decoder raise nearly anything
        raise RkvlmdError(
            "image_parse_error", f"The picture is a damaged or cut off {_name(kind)} file."
        ) from None


def _decode(
    data: bytes, kind: str, planner: Planner, limits: Limits, *, exact: bool
) -> tuple[Image.Image, tuple[int, int], Plan]:
    """Return an upright RGB picture, the size of the upright original, and what it becomes."""
    plan = None
    if kind == "WEBP":
        # Its plugin allocates two canvases when it opens the file.
        _check_size(webp.canvas(data), limits)
    with _open(data, kind) as image:
        _check_size(image.size, limits)
        size = image.size
        stored = colours.stored(image)
        if kind == "JPEG":
            orientation = _orientation(image)
            if not exact and isinstance(image, JpegImagePlugin.JpegImageFile):
                plan = planner(*_upright(size, orientation))
                _draft(image, orientation, plan)
            image.load()
        else:
            image.load()
            # A GIF's first frame may be larger than what its header says.
            _check_size(image.size, limits)
            size = image.size
            orientation = _orientation(image)
        rgb = colours.to_rgb(image, stored)
        if orientation in _TURNS:
            rgb = rgb.transpose(_TURNS[orientation])
    size = _upright(size, orientation)
    return rgb, size, plan or planner(*size)


def _upright(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return size if orientation < 5 else (size[1], size[0])


def _open(data: bytes, kind: str) -> ImageFile.ImageFile:
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        image = Image.open(io.BytesIO(data), formats=(kind,))
    finally:
        Image.MAX_IMAGE_PIXELS = before
    if not isinstance(image, ImageFile.ImageFile):
        raise TypeError("not a file")
    return image


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    short, long = min(size), max(size)
    if width * height > limits.max_pixels:
        raise RkvlmdError(
            "image_too_large",
            f"The picture has {width * height} pixels ({width}x{height}); the limit is"
            f" {limits.max_pixels} pixels.",
        )
    if short < limits.min_side:
        raise RkvlmdError(
            "image_too_small",
            f"The picture is {width}x{height} pixels; each side must have at least"
            f" {limits.min_side}.",
        )
    if long > short * limits.max_aspect:
        raise RkvlmdError(
            "image_too_small",
            f"The picture is {width}x{height} pixels; its long side may be at most"
            f" {limits.max_aspect} times the short one.",
        )


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - a broken EXIF block makes no broken picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _draft(image: JpegImagePlugin.JpegImageFile, orientation: int, plan: Plan) -> None:
    """Decode fewer pixels where every view still has enough of them."""
    firsts = [view.cut.sizes[0] for view in plan.views]
    target = _upright((max(w for w, _ in firsts), max(h for _, h in firsts)), orientation)
    gap = resample.GAP if math.prod(target) <= resample.LARGE else resample.LARGE_GAP
    image.draft(None, (math.ceil(gap * target[0]), math.ceil(gap * target[1])))


def _name(kind: str) -> str:
    return "WebP" if kind == "WEBP" else kind
