"""Pictures that are none: each gets its own code, with numbers and without library text."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rkvlmd.engine import pictures
from rkvlmd.errors import CODES, RkvlmdError
from rkvlmd.models.manifest import Encoder

LIMITS = pictures.Limits(max_bytes=1 << 20, max_pixels=1_000_000, min_side=2, max_aspect=200)
ENCODER = Encoder(
    engine="onnx", file="v.onnx", sha256="0" * 64, tokens=4, embedding=8, width=32, height=32
)


def file(size: tuple[int, int], kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = Image.radial_gradient("L").resize(size).convert("RGB")
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refusal(data: bytes, limits: pictures.Limits = LIMITS) -> RkvlmdError:
    with pytest.raises(RkvlmdError) as info:
        pictures.prepare(data, ENCODER, limits)
    assert info.value.status == 400
    return info.value


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 << 16))
    idat = b"IDAT" + rows
    return b"".join([
        b"\x89PNG\r\n\x1a\n",
        struct.pack(">I", 13), body, struct.pack(">I", zlib.crc32(body)),
        struct.pack(">I", len(rows)), idat, struct.pack(">I", zlib.crc32(idat)),
    ])  # fmt: skip


def webp_header(width: int, height: int) -> bytes:
    flags = bytes(4)
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + flags + size
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif_header(width: int, height: int) -> bytes:
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0)
    return (
        b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + frame + b"\x02;"
    )


def test_empty() -> None:
    assert refusal(b"").code == "empty_image_file"


@pytest.mark.parametrize(
    "data",
    [
        b"hello, this is no picture", b"\0", b"GIF88a" + bytes(50), b"%PDF-1.7\n", b"<svg></svg>",
        b"BM" + bytes(100), b"II*\0" + bytes(100), b"\x89PNG", b"RIFF\0\0\0\0WAVE", b"\xff\xd8",
    ],
)  # fmt: skip
def test_not_a_picture(data: bytes) -> None:
    assert refusal(data).code == "invalid_image_format"


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "ICO", "PPM", "TGA"])
def test_formats_that_are_not_allowed(kind: str) -> None:
    assert refusal(file((32, 32), kind)).code == "invalid_image_format"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_cut_off(kind: str, keep: float) -> None:
    data = file((300, 200), kind)
    error = refusal(data[: int(len(data) * keep)])
    assert error.code == "image_parse_error"
    assert "damaged or cut off" in error.message


def test_damaged() -> None:
    data = bytearray(file((300, 200), "PNG"))
    data[60:80] = bytes(20)
    assert refusal(bytes(data)).code == "image_parse_error"


@pytest.mark.parametrize(
    "data",
    [png_header(50_000, 50_000), webp_header(16_383, 16_383), gif_header(60_000, 60_000)],
    ids=["png", "webp", "gif"],
)
def test_a_bomb_is_refused_by_its_header(data: bytes) -> None:
    error = refusal(data)
    assert error.code == "image_too_large"
    assert "the limit is 1000000 pixels" in error.message


def test_a_gif_frame_larger_than_its_screen() -> None:
    data = bytearray(gif_header(60_000, 60_000))
    data[6:10] = struct.pack("<HH", 10, 10)
    assert refusal(bytes(data)).code == "image_too_large"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_over_the_pixel_limit_says_both_numbers(kind: str) -> None:
    error = refusal(file((1001, 1000), kind))
    assert error.code == "image_too_large"
    assert "1001000 pixels (1001x1000)" in error.message
    assert "1000000" in error.message
    limits = pictures.Limits(1 << 20, 1001 * 1000, 2, 200)
    assert pictures.prepare(file((1001, 1000), kind), ENCODER, limits).width == 1001


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_one_pixel(kind: str) -> None:
    error = refusal(file((1, 1), kind))
    assert error.code == "image_too_small"
    assert "1x1" in error.message


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (10, 30_000)])
def test_a_line(size: tuple[int, int]) -> None:
    error = refusal(file(size, "PNG"))
    assert error.code == "image_too_small"
    assert f"{size[0]}x{size[1]}" in error.message


def test_the_aspect_limit_itself_is_allowed() -> None:
    assert pictures.prepare(file((400, 2), "PNG"), ENCODER, LIMITS).width == 400
    assert "at most 200 times" in refusal(file((401, 2), "PNG")).message


def test_file_size() -> None:
    data = file((30, 30), "PNG")
    limits = pictures.Limits(len(data) - 1, 1_000_000, 2, 200)
    error = refusal(data, limits)
    assert error.code == "image_file_too_large"
    assert f"{len(data)} bytes" in error.message


def test_memory_is_an_error_of_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError

    data = file((300, 200), "PNG")
    monkeypatch.setattr(Image.Image, "resize", fail)
    assert refusal(data).code == "image_too_large"


@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF"]),
    at=st.floats(0, 1),
    new=st.binary(min_size=1, max_size=40),
    cut=st.booleans(),
)
def test_whatever_the_bytes_are_it_ends_in_pixels_or_in_a_code(
    kind: str, at: float, new: bytes, cut: bool
) -> None:
    data = bytearray(_SAMPLES[kind])
    start = int(at * len(data))
    data[start : start + len(new)] = new
    shape, code = (1, 3, 32, 32), "image_parse_error"
    try:
        shape = pictures.prepare(bytes(data[:start] if cut else data), ENCODER, LIMITS).tensor.shape
    except RkvlmdError as error:
        code = error.code
    assert shape == (1, 3, 32, 32)
    assert CODES[code][0] == 400


_SAMPLES = {kind: file((40, 30), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF")}
