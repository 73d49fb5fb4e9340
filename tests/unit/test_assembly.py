"""All views of a picture as one block of rows, against the published arithmetic on arrays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkvlmd.engine import memfd
from rkvlmd.engine.assemble import Assembler
from rkvlmd.errors import ManifestError, RkvlmdError
from rkvlmd.models import assembly, views
from rkvlmd.models import manifest as manifests
from rkvlmd.models.manifest import Manifest

Floats = npt.NDArray[np.float32]
ZERO = "0" * 64
WIDTH = 3
#: Rows of an encoder of ``lines`` x ``lines``: bare, with ends of lines, with everything.
ENDS = {"bare": (0, 0), "lines": (1, 0), "closed": (1, 1)}


def tokens(lines: int, kind: str) -> int:
    newline, closed = ENDS[kind]
    return lines * (lines + newline) + closed


def tree(
    *, whole: str = "closed", tile: str = "closed", lines: int = 16, small: int = 10,
    rows: bool = False, engine: str = "rkllm", most: int = 9,
) -> dict[str, Any]:  # fmt: skip
    file = {"file": "f", "sha256": ZERO}
    npu = {"engine": "rknn", "baked": True, "layout": "nhwc", "embedding": WIDTH, **file}
    if engine == "onnx":
        npu |= {"engine": "onnx", "baked": False, "layout": "nchw"}
    rule = {"rule": "base_tiles", "min_tiles": 2, "max_tiles": most}
    about: dict[str, Any] = {"square": 64}
    if rows:
        about["rows"] = {"file": "rows.npy", "sha256": ZERO}
    size = {"width": 64 * lines, "height": 64 * lines, "tokens": tokens(lines, whole)}
    part = {"width": 64 * small, "height": 64 * small, "tokens": tokens(small, tile)}
    files = {"model": file} if engine == "rkllm" else {"embed": file, "decoder": file}
    return {
        "schema": 1, "name": "m", "family": "deepseek_ocr", "image": {"content": "<p>"},
        "encoders": [{**npu, **size, "resize": rule}, {**npu, **part, "tile": True}],
        "decoder": {"engine": engine, "files": files, "context": 4096, "embedding": WIDTH},
        "tokenizer": file, "template": file, "assembly": about,
    }  # fmt: skip


def parsed(changed: dict[str, Any]) -> Manifest:
    return manifests.parse(json.dumps(changed).encode())


def problems(changed: dict[str, Any]) -> str:
    with pytest.raises(ManifestError) as caught:
        parsed(changed)
    return "; ".join(caught.value.problems)


# --- the order -----------------------------------------------------------------------


def published(
    tiles: Floats | None, page: Floats, grid: tuple[int, int], newline: Floats, separator: Floats
) -> Floats:
    """Put rows together as ``modeling_deepseekocr.py`` does with ``torch``; no row twice read.

    ``tiles`` are (views, h x w, n) or ``None``, ``page`` (h x w, n), ``grid`` rows and columns.
    """
    n = page.shape[-1]
    side = int(len(page) ** 0.5)
    whole = np.concatenate(
        [page.reshape(side, side, n), np.broadcast_to(newline, (side, 1, n))], axis=1
    ).reshape(-1, n)
    if tiles is None:
        return np.concatenate([whole, separator[None]])
    down, across = grid
    h = int(tiles.shape[1] ** 0.5)
    local = (
        tiles.reshape(down, across, h, h, n)
        .transpose(0, 2, 1, 3, 4)
        .reshape(down * h, across * h, n)
    )
    ends = np.broadcast_to(newline, (down * h, 1, n))
    local = np.concatenate([local, ends], axis=1).reshape(-1, n)
    return np.concatenate([local, whole, separator[None]])


def given_by(bare: Floats, kind: str, newline: Floats, separator: Floats) -> Floats:
    """Return what an encoder of a kind gives for a view."""
    side, n = int(len(bare) ** 0.5), bare.shape[-1]
    rows = bare
    if ENDS[kind][0]:
        ends = np.broadcast_to(newline, (side, 1, n))
        rows = np.concatenate([bare.reshape(side, side, n), ends], axis=1).reshape(-1, n)
    return np.concatenate([rows, separator[None]]) if ENDS[kind][1] else rows


KINDS = st.sampled_from(sorted(ENDS))
GRIDS = st.sampled_from(
    [(0, 0)] + [(r, c) for r in range(1, 10) for c in range(1, 10) if r * c < 10]
)


def numbers(*shape: int, start: int) -> Floats:
    return np.arange(start, start + int(np.prod(shape)), dtype=np.float32).reshape(shape)


@given(KINDS, KINDS, GRIDS, st.integers(1, 4), st.integers(1, 3))
def test_the_order_is_the_published_one(
    whole: str, tile: str, grid: tuple[int, int], lines: int, small: int
) -> None:
    own = whole != "closed"
    manifest = parsed(tree(whole=whole, tile=tile, lines=lines, small=small, rows=own, most=9))
    newline, separator = np.full(WIDTH, -1, np.float32), np.full(WIDTH, -2, np.float32)
    page = numbers(lines**2, WIDTH, start=10_000)
    parts = numbers(grid[0] * grid[1], small**2, WIDTH, start=0) if grid[0] else None
    given_rows = [given_by(part, tile, newline, separator) for part in parts] if grid[0] else []
    given_rows.append(given_by(page, whole, newline, separator))
    file = np.stack([newline, separator])
    made = np.concatenate([
        (file if run.view == assembly.FILE else given_rows[run.view])[run.start :][: run.rows]
        for run in assembly.order(manifest, grid)
    ])  # fmt: skip
    assert np.array_equal(made, published(parts, page, grid, newline, separator))
    assert assembly.count(manifest, grid) == len(made)


def test_as_many_rows_as_the_published_prompt_has_places() -> None:
    """``infer()``: (16 + 1) x 16 + 1 for the page; (10 c + 1) x 10 r for the tiles."""
    manifest = parsed(tree())
    for rows, columns in ((1, 2), (3, 2), (3, 3), (9, 1)):
        wanted = (10 * columns + 1) * 10 * rows + 17 * 16 + 1
        assert assembly.count(manifest, (rows, columns)) == wanted
    assert assembly.count(manifest, (0, 0)) == 273


def test_a_picture_is_one_place_of_all_its_rows() -> None:
    manifest = parsed(tree())
    plan = views.plan(manifest, 1280, 1920)
    assert (len(plan.views), plan.tiles, plan.layout) == (7, (3, 2), ("", 0, ""))
    assert plan.places == (21 * 30 + 273,)
    assert plan.tokens == 903
    assert [view.encoder for view in plan.views] == [1] * 6 + [0]
    for small in (views.plan(manifest, 640, 640), views.plan(manifest, 1280, 1920, "low")):
        assert (len(small.views), small.tiles, small.tokens) == (1, (0, 0), 273)


# --- what a manifest may say ---------------------------------------------------------


@pytest.mark.parametrize("engine", ["rkllm", "onnx"])
def test_rows_of_the_file_are_needed_where_no_encoder_gives_them(engine: str) -> None:
    for whole in ("bare", "lines"):
        said = problems(tree(whole=whole, engine=engine))
        assert "assembly.rows: missing" in said
        assert "image_newline" in said
        parsed(tree(whole=whole, rows=True, engine=engine))
    parsed(tree(tile="bare", engine=engine))


def test_what_does_not_go_together() -> None:
    changed = tree()
    changed["encoders"][1]["tokens"] = 112
    said = problems(changed)
    assert "encoders[1].tokens: 112, but 640x640 pixels are 10 lines of 10" in said
    assert "100 rows, 110 with the ends of lines, or 111 with the end" in said
    changed = tree()
    changed["encoders"].append(changed["encoders"][1])
    assert "one encoder for whole pictures, and one for tiles" in problems(changed)
    changed = tree()
    changed["video"] = {"content": "<v>"}
    assert "assembly: does not go with cross_attention, mrope or tags" in problems(changed)
    changed = tree()
    changed["encoders"][0]["outputs"] = 2
    assert "encoders with one output" in problems(changed)
    changed = tree()
    changed["capabilities"] = ["embeddings"]
    changed["embeddings"] = {"inputs": ["image"], "pictures": "rows"}
    assert "does not go with embeddings.pictures = rows" in problems(changed)
    # Without an assembly the library would be given tiles as pictures of their own.
    changed = tree()
    del changed["assembly"]
    assert "rkllm needs as many tokens of a tile" in problems(changed)


# --- the block -----------------------------------------------------------------------


def fds(*arrays: Floats) -> Iterator[int]:
    for array in arrays:
        fd, _ = memfd.from_array(np.ascontiguousarray(array, np.float32), "rows")
        yield fd


def test_a_block_is_put_together_from_memory_files(tmp_path: Path) -> None:
    own = np.array([[7, 8, 9], [-7, -8, -9]], np.float16)
    np.save(tmp_path / "rows.npy", own)
    manifest = parsed(tree(whole="bare", tile="closed", lines=2, small=1, rows=True))
    make = Assembler(tmp_path, manifest)
    page, tiles = numbers(4, WIDTH, start=100), numbers(2, 3, WIDTH, start=0)
    block = make(fds(*tiles, page), (1, 2), 3 + 6 + 1)
    newline, separator = own.astype(np.float32)
    wanted = published(tiles[:, :1], page, (1, 2), newline, separator)
    assert np.array_equal(block, wanted)
    assert block.flags.carray  # the library writes nowhere else than here
    with pytest.raises(memfd.MemoryFileError, match="do not make 11 rows"):
        make(fds(*tiles, page), (1, 2), 11)
    with pytest.raises(memfd.MemoryFileError):
        make(fds(tiles[0], tiles[1], page[:3]), (1, 2), 10)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((2, WIDTH + 1), np.float32), np.zeros((3, WIDTH), np.float32),
        np.zeros((2, WIDTH), np.float64), np.zeros((2, WIDTH), np.int8),
        np.array([[0, 0, np.nan], [0, 0, 0]], np.float32),
        np.array([[0, 0, 0], [0, np.inf, 0]], np.float16),
    ],
)  # fmt: skip
def test_a_file_of_other_rows_is_refused(tmp_path: Path, wrong: Any) -> None:
    np.save(tmp_path / "rows.npy", wrong)
    refused(tmp_path)


@pytest.mark.parametrize("data", [b"", b"rubbish", b"\x93NUMPY\x01\x00", b"x" * 10_000])
def test_a_file_that_is_no_npy_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "rows.npy").write_bytes(data)
    refused(tmp_path)


def test_a_header_that_promises_too_much_and_objects_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.zeros((2, WIDTH), np.float32))
    data = (tmp_path / "rows.npy").read_bytes()
    (tmp_path / "rows.npy").write_bytes(data.replace(b"(2, 3)", b"(2,9**9)", 1))
    refused(tmp_path)
    (tmp_path / "rows.npy").write_bytes(data.replace(b"(2, 3), }", b"(9999,3)}"))
    refused(tmp_path)
    np.save(tmp_path / "rows.npy", np.array([{}, {}], object), allow_pickle=True)
    refused(tmp_path)


def refused(folder: Path) -> None:
    manifest = parsed(tree(whole="bare", rows=True))
    with pytest.raises(
        RkvlmdError, match=r"assembly\.rows\.file: must be an \.npy file of 2 x 3"
    ) as c:
        Assembler(folder, manifest)
    assert c.value.code == "invalid_model"
    assert str(folder) not in c.value.message
