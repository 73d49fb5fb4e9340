"""Every kind of picture file comes out upright, in RGB, and the same."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rkvlmd.engine import colours, picture_speed, pictures, resample
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import geometry, views
from rkvlmd.models.manifest import Encoder, Resize

LIMITS = pictures.Limits(max_bytes=1 << 20, max_pixels=1_000_000, min_side=2, max_aspect=200)
LARGE = pictures.Limits(1 << 30, 1 << 30, 1, 1000)
RED, GREEN, BLUE, WHITE, BLACK = (
    (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0),
)  # fmt: skip


def encoder(width: int = 64, height: int = 48, **more: Any) -> Encoder:
    values = {"baked": True, "layout": "nhwc", "resize": Resize(resample="nearest")} | more
    return Encoder(
        engine="onnx", file="v.onnx", sha256="0" * 64, tokens=4, embedding=8,
        width=width, height=height, **values,
    )  # fmt: skip


def corners() -> Image.Image:
    """64x48: red, green / blue, white."""
    image = Image.new("RGB", (64, 48), WHITE)
    image.paste(RED, (0, 0, 32, 24))
    image.paste(GREEN, (32, 0, 64, 24))
    image.paste(BLUE, (0, 24, 32, 48))
    return image


def file(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes, to: Encoder | None = None, *, exact: bool = True) -> np.ndarray:
    prepared = pictures.prepare(data, to or encoder(), LIMITS, exact=exact)
    return prepared.tensor[0]


def seen(data: bytes, *, exact: bool = True) -> list[tuple[int, ...]]:
    """The colours in the middle of the four quarters."""
    array = pixels(data, exact=exact).astype(int)
    return [tuple(array[y, x].tolist()) for y in (12, 36) for x in (16, 48)]


def near(found: list[tuple[int, ...]], wanted: list[tuple[int, ...]], by: int = 6) -> bool:
    return bool(np.abs(np.array(found) - np.array(wanted)).max() <= by)


FOUR = [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        ("PNG", {}, "png"),
        ("WEBP", {"lossless": True}, "webp"),
        ("WEBP", {"quality": 95}, "webp"),
        ("JPEG", {"quality": 95, "subsampling": 0}, "jpeg"),
        ("JPEG", {"quality": 95, "progressive": True}, "jpeg"),
        ("GIF", {}, "gif"),
    ],
)
def test_formats(kind: str, options: dict[str, Any], name: str, exact: bool) -> None:
    data = file(corners(), kind, **options)
    assert near(seen(data, exact=exact), FOUR, 0 if name == "png" else 12)
    prepared = pictures.prepare(data, encoder(), LIMITS)
    assert (prepared.width, prepared.height, prepared.format) == (64, 48, name)


def grey_four() -> list[tuple[int, ...]]:
    return [(v, v, v) for v in np.asarray(corners().convert("L"))[12::24, 16::32].reshape(-1)]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_grey(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert near(seen(file(corners().convert("L"), kind, **options)), grey_four(), 3)


def test_one_bit() -> None:
    image = Image.new("1", (64, 48), 0)
    image.paste(1, (32, 0, 64, 48))
    assert seen(file(image, "PNG")) == [BLACK, WHITE, BLACK, WHITE]


def test_palette() -> None:
    assert near(seen(file(corners().quantize(8), "PNG")), FOUR, 0)


def test_palette_with_a_transparent_entry() -> None:
    image = Image.new("P", (64, 48), 0)
    image.putpalette([10, 20, 30, *RED])
    image.paste(1, (32, 0, 64, 48))
    assert seen(file(image, "PNG", transparency=0)) == [WHITE, RED, WHITE, RED]
    assert seen(file(image, "PNG")) == [(10, 20, 30), RED, (10, 20, 30), RED]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_lies_on_white(kind: str) -> None:
    image = corners().convert("RGBA")
    image.putalpha(0)
    image.paste((*BLUE, 255), (0, 0, 32, 24))
    image.paste((*BLACK, 128), (32, 0, 64, 24))
    options = {"lossless": True} if kind == "WEBP" else {}
    assert near(seen(file(image, kind, **options)), [BLUE, (127, 127, 127), WHITE, WHITE], 1)


def test_grey_with_alpha() -> None:
    image = Image.new("LA", (64, 48), (0, 0))
    image.paste((40, 255), (0, 0, 32, 48))
    assert seen(file(image, "PNG")) == [(40,) * 3, WHITE, (40,) * 3, WHITE]


def test_colour_key() -> None:
    data = file(corners(), "PNG", transparency=RED)
    assert seen(data) == [WHITE, GREEN, BLUE, WHITE]
    data = file(corners().convert("L"), "PNG", transparency=76)
    assert seen(data)[0] == WHITE


def test_cmyk() -> None:
    assert near(seen(file(corners().convert("CMYK"), "JPEG", quality=95)), FOUR, 12)


def png(depth: int, colour: int, rows: bytes, size: tuple[int, int], *more: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(
            ">I", zlib.crc32(kind + body)
        )  # fmt: skip

    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)),
            *(chunk(m[:4], m[4:]) for m in more),
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        ]
    )


def deep(values: np.ndarray) -> bytes:
    """Rows of a 16-bit PNG, filter type 0 before each."""
    big = values.astype(">u2")
    return b"".join(b"\0" + row.tobytes() for row in big)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    shown = pixels(png(16, 0, deep(values), (64, 48)))
    assert np.array_equal(shown[..., 0], values >> 8)
    assert np.array_equal(shown[..., 0], shown[..., 2])
    # The very first value is the transparent one.
    keyed = pixels(png(16, 0, deep(values), (64, 48), b"tRNS" + struct.pack(">H", 0)))
    assert keyed[0, 0, 0] == 255
    assert keyed[0, 1, 0] == values[0, 1] >> 8


def test_sixteen_bit_colour_and_alpha() -> None:
    values = np.zeros((48, 64, 3), np.uint16)
    values[:, :, 0] = 0x8040
    values[:, 32:, 1] = 0xFFFF
    assert seen(png(16, 2, deep(values), (64, 48))) == [(128, 0, 0), (128, 255, 0)] * 2
    key = b"tRNS" + struct.pack(">HHH", 0x8040, 0, 0)
    assert seen(png(16, 2, deep(values), (64, 48), key)) == [WHITE, (128, 255, 0)] * 2
    grey = np.zeros((48, 64, 2), np.uint16)
    grey[..., 0], grey[:, 32:, 1] = 0x2000, 0xFFFF
    assert seen(png(16, 4, deep(grey), (64, 48))) == [WHITE, (32, 32, 32)] * 2


def packed(values: np.ndarray, depth: int) -> bytes:
    """Rows of a grey PNG of 1, 2 or 4 bits, filter type 0 before each."""
    bits = (values[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    return b"".join(b"\0" + np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in bits)


@pytest.mark.parametrize(
    ("depth", "high"), [(1, 0), (2, 0), (4, 0), (2, 0x0100), (4, 0xFFF0)]
)  # bits above those of a pixel do not count
def test_a_key_of_few_bits(depth: int, high: int) -> None:
    most = (1 << depth) - 1
    values = np.full((48, 64), most, np.uint8)
    values[:, :32] = most // 2  # 0, 1 and 7: none of them is white
    grey = most // 2 * 255 // most
    for key, left in ((most // 2, 255), (most, grey), (most - 1, 255 if depth == 1 else grey)):
        data = png(
            depth, 0, packed(values, depth), (64, 48), b"tRNS" + struct.pack(">H", key + high)
        )
        assert seen(data) == [(left,) * 3, WHITE] * 2
    assert seen(png(depth, 0, packed(values, depth), (64, 48))) == [(grey,) * 3, WHITE] * 2


def test_a_key_of_eight_bits_has_eight() -> None:
    key = b"tRNS" + struct.pack(">HHH", 0x0120, 0x0130, 0x0140)
    rows = b"".join(
        b"\0" + bytes([0x20, 0x30, 0x40] * 32 + [0x20, 0x30, 0x41] * 32) for _ in range(48)
    )
    assert seen(png(8, 2, rows, (64, 48), key)) == [WHITE, (0x20, 0x30, 0x41)] * 2


TURNS = {
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
}  # fmt: skip


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation: int, kind: str, exact: bool) -> None:
    upright = corners().resize((640, 480), Image.Resampling.NEAREST)
    turn = TURNS[orientation]
    stored = upright if turn is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95}
    data = file(stored, kind, exif=exif, **options)
    prepared = pictures.prepare(data, encoder(), LIMITS, exact=exact)
    assert (prepared.width, prepared.height) == (640, 480)
    assert near(seen(data, exact=exact), FOUR, 12)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_a_wrong_orientation_is_none(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert near(seen(file(corners(), "PNG", exif=exif)), FOUR, 0)


def test_a_broken_exif_block_is_no_broken_picture() -> None:
    assert near(seen(file(corners(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")), FOUR, 0)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    others = [Image.new("RGB", (64, 48), BLACK) for _ in range(3)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = file(
        corners(), kind, save_all=True, append_images=others, duration=100, loop=0, **options
    )
    assert near(seen(data), FOUR, 12)


def test_a_gif_with_transparency() -> None:
    image = Image.new("P", (64, 48), 0)
    image.putpalette([0, 0, 0, *RED])
    image.paste(1, (32, 0, 64, 48))
    assert seen(file(image, "GIF", transparency=0)) == [WHITE, RED, WHITE, RED]


def test_a_multi_picture_file_shows_its_first() -> None:
    data = file(
        corners(), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 48))], quality=95
    )
    assert near(seen(data), FOUR, 12)
    assert pictures.prepare(data, encoder(), LIMITS).format == "jpeg"


# --- the fast path -------------------------------------------------------------------


def photo(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(7)
    coarse = random.integers(0, 256, (height // 40, width // 40, 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = random.integers(-4, 5, (height, width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("rule", ["stretch", "pad"])
def test_the_fast_path_is_close_to_the_exact_one(rule: Any) -> None:
    to = encoder(224, 224, resize=Resize(rule=rule))
    data = file(photo(2000, 1500), "JPEG", quality=90)
    found = picture_speed.measure(data, to, repeats=1)
    assert found["error_mean"] < 1.0
    assert found["error_max"] < 24


#: Mean and largest difference that the fast path may make, levels of 255: JPEG drafts and whole
#: factors blur a little less than the full kernel does. Without antialiasing the exact path takes
#: single pixels of a large picture, noise included, and the draft their average.
ERRORS = {"antialiased": (1.0, 24), "not": (3.0, 40)}
CUTTING = {
    "tiles": Resize(rule="tiles", max_tiles=6, thumbnail=True),
    "split": Resize(rule="split", resample="lanczos", longest=448),
    "slices": Resize(rule="slices", max_tiles=4),
    "aspect": Resize(rule="aspect", multiple=28, min_pixels=3136, max_pixels=200704),
    "crop": Resize(rule="crop", short=256),
    "pad": Resize(rule="pad", resample="bilinear", antialias=False),
}


@pytest.mark.parametrize("rule", CUTTING)
@pytest.mark.parametrize("size", [(2000, 1500), (900, 1700)])
def test_the_fast_path_of_every_rule(rule: str, size: tuple[int, int]) -> None:
    resize = CUTTING[rule]
    to = encoder(224, 224, resize=resize)
    data = file(photo(*size), "JPEG", quality=90)

    def planner(width: int, height: int) -> views.Plan:
        cuts = geometry.cut(width, height, to).cuts
        return views.Plan(tuple(views.View(0, cut, 4) for cut in cuts), tuple(range(len(cuts))))

    fast, exact = (
        pictures.prepare_views(data, planner, (to,), LARGE, exact=exact) for exact in (False, True)
    )
    assert fast.plan == exact.plan
    mean, most = ERRORS["antialiased" if resize.antialias else "not"]
    for one, other in zip(fast.tensors, exact.tensors, strict=True):
        difference = np.abs(one.astype(int) - other)
        assert difference.mean() < mean
        assert difference.max() < most


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("exact", [True, False])
def test_views_in_turn_are_the_views_in_one_memory(layout: Any, exact: bool) -> None:
    to = encoder(112, 112, resize=CUTTING["split"], layout=layout, baked=False)
    data = file(photo(1600, 1200), "JPEG", quality=90)

    def planner(width: int, height: int) -> views.Plan:
        cuts = geometry.cut(width, height, to).cuts
        return views.Plan(tuple(views.View(0, cut, 4) for cut in cuts), tuple(range(len(cuts))))

    whole = pictures.prepare_views(data, planner, (to,), LARGE, exact=exact)
    kept = Image.core.get_blocks_max()
    turn = pictures.stream_views(data, planner, (to,), LARGE, exact=exact)
    places = set()
    for one, other in zip(whole.tensors, turn.tensors, strict=True):
        assert np.array_equal(one, other)
        places.add(other.ctypes.data)
    assert len(whole.tensors) == 13
    assert len(places) == 1
    assert Image.core.get_blocks_max() == kept


def test_parts_are_resized_as_the_whole() -> None:
    """Bit by bit: a part resized alone is what would be cut out of the whole."""
    image = photo(1000, 750)
    resize = Resize(rule="split", resample="lanczos", longest=1024)
    sheets = resample.Sheets(image, exact=False)
    whole = np.asarray(image.resize((1024, 768), Image.Resampling.LANCZOS))
    for cut in geometry.cut(4000, 3000, encoder(256, 256, resize=resize)).cuts[:-1]:
        left, top, width, height = cut.place
        assert sheets._is_cell(cut)
        found = sheets.pixels(cut, resize)
        assert np.array_equal(found, whole[top : top + height, left : left + width])


@pytest.fixture
def decoded_sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The size of each picture as it came out of the decoder."""
    sizes = []
    real = colours.to_rgb

    def spy(image: Image.Image, stored: str) -> Image.Image:
        sizes.append(image.size)
        return real(image, stored)

    monkeypatch.setattr(colours, "to_rgb", spy)
    return sizes


@pytest.mark.parametrize(
    ("size", "target", "scale"),
    [((800, 600), 100, 2), ((800, 800), 100, 4), ((1600, 1600), 100, 8), ((399, 900), 200, 1)],
)
def test_the_largest_reduction_that_leaves_twice_the_target(
    size: tuple[int, int], target: int, scale: int, decoded_sizes: list[tuple[int, int]]
) -> None:
    data = file(Image.new("RGB", size, RED), "JPEG")
    limits = pictures.Limits(1 << 20, 4_000_000, 2, 200)
    prepared = pictures.prepare(data, encoder(target, target), limits)
    assert (prepared.width, prepared.height) == size
    assert decoded_sizes == [tuple(-(-n // scale) for n in size)]
    assert all(n >= 2 * target for n in decoded_sizes[0]) or scale == 1
    pictures.prepare(data, encoder(target, target), limits, exact=True)
    assert decoded_sizes[1] == size


@pytest.mark.parametrize(("side", "scale"), [(1690, 1), (1710, 2), (3420, 4)])
def test_the_reduction_for_a_large_target(
    side: int, scale: int, decoded_sizes: list[tuple[int, int]]
) -> None:
    """Four tiles of 448 pixels: at least 19/20 of 896 are decoded."""
    to = encoder(448, 448, resize=Resize(rule="tiles", min_tiles=4, max_tiles=4))

    def planner(width: int, height: int) -> views.Plan:
        cuts = geometry.cut(width, height, to).cuts
        return views.Plan(tuple(views.View(0, cut, 4) for cut in cuts), tuple(range(len(cuts))))

    data = file(Image.new("RGB", (side, side), RED), "JPEG")
    made = pictures.prepare_views(data, planner, (to,), LARGE)
    assert len(made.tensors) == 4
    decoded = -(-side // scale)
    assert decoded_sizes == [(decoded, decoded)]
    assert decoded >= resample.LARGE_GAP * 896 or scale == 1


def test_base64_in_all_its_spellings() -> None:
    data = bytes(range(256)) * 3 + b"\xff\xef"
    text = base64.b64encode(data)
    broken = b"\r\n".join(text[i : i + 76] for i in range(0, len(text), 76)) + b"\n"
    for spelling in (text, broken, text.rstrip(b"="), base64.urlsafe_b64encode(data), b" " + text):
        assert pictures.from_base64(spelling, LIMITS) == data


@pytest.mark.parametrize(
    "text",
    [
        b"!!!!", b"QUJD*", b"Q", b"QUJDR", b"QUJD=QUJD", b"====", b"=", b"QUI==", b"\xff\xfe\x00",
        b"data:image/png;base64,QUJD", b"QUJD" * 10 + "é".encode(), b"../etc/passwd",
    ],
)  # fmt: skip
def test_base64_with_garbage(text: bytes) -> None:
    with pytest.raises(RkvlmdError) as info:
        pictures.from_base64(text, LIMITS)
    assert info.value.code == "invalid_base64_image"


@pytest.mark.parametrize("text", [b"", b" \n"])
def test_base64_of_nothing(text: bytes) -> None:
    with pytest.raises(RkvlmdError) as info:
        pictures.from_base64(text, LIMITS)
    assert info.value.code == "empty_image_file"


def test_base64_above_the_limit() -> None:
    with pytest.raises(RkvlmdError, match="1048577 bytes; the limit is 1048576") as info:
        pictures.from_base64(base64.b64encode(bytes((1 << 20) + 1)), LIMITS)
    assert info.value.code == "image_file_too_large"
    assert len(pictures.from_base64(base64.b64encode(bytes(1 << 20)), LIMITS)) == 1 << 20
    pictures.check_text(2 << 20, LIMITS)
    with pytest.raises(RkvlmdError):
        pictures.check_text(3 << 20, LIMITS)
