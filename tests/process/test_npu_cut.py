"""Pictures that are cut into parts, from published files to the decoder of a simulated board.

DeepSeek-OCR's tiles become one block of rows, MiniCPM-V's slices a place each between their tags.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from tokenizers import Tokenizer

from rkvlmd.ctl.__main__ import main
from rkvlmd.engine import pictures
from rkvlmd.models import manifest as manifests
from rkvlmd.models import templates, views
from rkvlmd.models.templates import Template
from tests.house.tree import ROOT
from tests.npusim import downloads, models
from tests.npusim.downloads import Board

pytestmark = pytest.mark.process

Floats = npt.NDArray[np.float32]
CATALOGUE, _ = templates.load([ROOT / "etc" / "models.d"])
TILES, SLICES = CATALOGUE["deepseek-ocr-tiles"], CATALOGUE["minicpm-v-2.6-slices"]
INTERNVL = CATALOGUE["internvl3-1b-tiles"]
LIMITS = pictures.Limits(max_bytes=1 << 24, max_pixels=1 << 26, min_side=1, max_aspect=200)


def shown(board: Board, model: str, file: bytes, detail: Any) -> tuple[views.Plan, list[Floats]]:
    """Return what becomes of a picture, and what its encoders make of each view."""
    manifest = manifests.parse((board.folder / "models" / model / "rkvlm.json").read_bytes())
    seen = pictures.prepare_views(
        file, lambda w, h: views.plan(manifest, w, h, detail), manifest.encoders, LIMITS
    )
    rows = []
    for view, pixels in zip(seen.plan.views, seen.tensors, strict=True):
        encoder = manifest.encoders[view.encoder]
        number = models.number_of(pixels)
        rows.append(models.rows_of(number, encoder.tokens, encoder.embedding))
    return seen.plan, rows


def ask(board: Board, model: str, content: Sequence[Any]) -> tuple[dict[str, str], Any]:
    return board.ask(model, [{"role": "user", "content": list(content)}])


def photo(width: int, height: int, seed: int = 0) -> bytes:
    """Return a PNG in which no two parts are alike."""
    small = np.random.default_rng(seed).integers(0, 256, (13, 17, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR).save(file, "PNG")
    return file.getvalue()


def part(file: bytes, detail: str = "auto") -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(file).decode()
    return {"type": "image_url", "image_url": {"url": url, "detail": detail}}


TEXT = {"type": "text", "text": "What is this?"}


def download(
    folder: Path, template: Template, encoders: Sequence[tuple[int, int]], **arrays: Any
) -> None:
    """Write a decoder, its tokenizer, and encoders of (side in pixels, rows)."""
    # Rows of several views in one block are none of one picture, as the library is told.
    downloads.decoder(folder, template, signed_rows=False)
    for side, rows in encoders:
        downloads.encoder(folder, template, side, side, rows)
    downloads.arrays(folder, **arrays)


OWN = np.random.default_rng(1).standard_normal((2, 1280)).astype(np.float16)


def table() -> npt.NDArray[np.float16]:
    words = 256 + len(SLICES.manifest["special_strings"])
    return np.random.default_rng(2).standard_normal((words, 3584)).astype(np.float16)


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    folder = tmp_path_factory.mktemp("board")

    def install(into: Path) -> None:
        source = folder / "downloads"
        # As Rockchip's script exports them, with the rows between lines; and bare ones.
        download(source / "tiles", TILES, [(640, 111), (1024, 273)])
        download(source / "bare", TILES, [(640, 100), (1024, 256)], separators=OWN)
        download(source / "slices", SLICES, [(448, 64)], embed=table())
        download(source / "internvl", INTERNVL, [(448, 256)])
        given = {"tiles": TILES, "bare": TILES, "slices": SLICES, "internvl": INTERNVL}
        for name, template in given.items():
            argv = ["import", str(source / name), "--models", str(into)]
            assert main(["--json", *argv, "--as", name, "--model", template.model]) == 0

    with downloads.serving(folder, install) as made:
        yield made


# --- DeepSeek-OCR: one block ---------------------------------------------------------


def block(tiles: Sequence[Floats], page: Floats, down: int, across: int, *, bare: bool) -> Floats:
    """Return the rows of a page, line by line across its tiles, as one reads it."""
    newline, end = OWN.astype(np.float32) if bare else (page[16], page[272])
    step, wide = (10, 16) if bare else (11, 17)
    rows: list[Floats] = []
    for line in range(down * 10):
        for column in range(across):
            tile = tiles[line // 10 * across + column]
            first = line % 10 * step
            rows += list(tile[first : first + 10])
        rows.append(newline)
    for line in range(16):
        rows += list(page[line * wide : line * wide + 16])
        rows.append(newline if bare else page[line * wide + 16])
    return np.stack([*rows, end])


def block_of(board: Board, file: bytes) -> Floats:
    """Return what becomes of a page that the model ``tiles`` cuts."""
    plan, (*tiles, page) = shown(board, "tiles", file, "auto")
    assert plan.tiles is not None
    return block(tiles, page, *plan.tiles, bare=False)


@pytest.mark.parametrize("name", ["tiles", "bare"])
@pytest.mark.parametrize(
    ("size", "grid"), [((1300, 900), (2, 3)), ((700, 1500), (2, 1)), ((640, 600), (0, 0))]
)
def test_tiles_and_page_are_one_block(
    name: str, size: tuple[int, int], grid: tuple[int, int], board: Board
) -> None:
    file = photo(*size)
    plan, (*tiles, page) = shown(board, name, file, "auto")
    assert plan.tiles == grid
    wanted = block(tiles, page, *grid, bare=name == "bare")
    said, done = ask(board, name, [part(file), TEXT])
    assert said["pictures"] == "1"
    assert said["sums"] == models.sum_of(wanted)
    down, across = grid
    count = down * 10 * (across * 10 + 1) + 273 if down else 273
    assert done.usage.prompt_tokens_details.image_tokens == count == len(wanted)
    assert done.usage.prompt_tokens == int(said["tokens"])
    run = board.sim.one("run")
    assert (run["picture_tokens"], run["prompt"].count("<image>")) == (count, 1)
    assert (run["width"], run["height"]) == (1024, 1024)


def test_a_page_is_encoded_once(board: Board) -> None:
    file = photo(1300, 900, seed=3)
    before = len(board.sim.trace("encode"))
    first, _ = ask(board, "tiles", [part(file), TEXT])
    assert len(board.sim.trace("encode")) - before == 7
    again, _ = ask(board, "tiles", [part(file), {"type": "text", "text": "Free OCR."}])
    assert again["sums"] == first["sums"]
    assert len(board.sim.trace("encode")) - before == 7
    # Only the page, and another input than among the seven: nothing says that they are the same.
    low, done = ask(board, "tiles", [part(file, "low"), TEXT])
    assert done.usage.prompt_tokens_details.image_tokens == 273
    _, (page,) = shown(board, "tiles", file, "low")
    assert low["sums"] == models.sum_of(page)


def test_the_next_turn_goes_on_after_the_block(board: Board) -> None:
    file = photo(700, 1500, seed=5)
    content = [part(file), TEXT]
    first, done = ask(board, "tiles", content)
    answer = {"role": "assistant", "content": done.choices[0].message.content}
    turns = [{"role": "user", "content": content}, answer, {"role": "user", "content": "More."}]
    said, later = board.ask("tiles", turns)
    assert said["sums"] == first["sums"]
    assert later.usage.prompt_tokens_details.cached_tokens > len(block_of(board, file))


def test_an_embedding_of_a_page(board: Board) -> None:
    file = photo(1300, 900, seed=6)
    body = {"model": "tiles", "input": [part(file), TEXT]}
    found = httpx.post(f"{board.daemon.url}/v1/embeddings", json=body, timeout=120).json()
    assert len(found["data"][0]["embedding"]) == 1280, found
    run = board.sim.one("run")
    assert (run["pictures"], run["picture_tokens"]) == (1, len(block_of(board, file)))


# --- MiniCPM-V 2.6: a place for each view --------------------------------------------


def rows_of_prompt(board: Board, prompt: str, given: Sequence[Floats]) -> Floats:
    """Return the rows of a whole prompt, those of pictures in place of ``<unk>``."""
    tokenizer = Tokenizer.from_file(str(board.folder / "models" / "slices" / "tokenizer.json"))
    ids = np.array(tokenizer.encode(prompt, add_special_tokens=False).ids)
    rows = table()[ids].astype(np.float32)
    places = ids == tokenizer.token_to_id("<unk>")
    rows[places] = np.concatenate(given) if given else 0
    return rows


HEAD = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
TAIL = "\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
WORDS = "<unk>" * 64


def slices(number: int, down: int, across: int) -> str:
    line = "".join(f"<slice>{WORDS}</slice>" for _ in range(across))
    return f"<image_id>{number}</image_id><image>{WORDS}</image>" + "\n".join([line] * down)


def test_slices_reach_the_decoder_between_their_tags(board: Board) -> None:
    file, small = photo(1280, 800), photo(300, 200, seed=4)
    plan, rows = shown(board, "slices", file, "high")
    assert len(plan.views) == 7
    _, one = shown(board, "slices", small, "auto")
    said, done = ask(board, "slices", [part(file, "high"), part(small, "high"), TEXT])
    prompt = HEAD + slices(0, 2, 3) + "\n" + slices(1, 0, 0) + TAIL
    wanted = rows_of_prompt(board, prompt, [*rows, *one])
    assert said["sums"] == models.sum_of(wanted)
    assert int(said["embeds"]) == len(wanted) == done.usage.prompt_tokens
    assert done.usage.prompt_tokens_details.image_tokens == 8 * 64
    assert board.sim.one("run")["kind"] == "embed"


def test_slices_are_asked_for(board: Board) -> None:
    """An encode takes seconds on an NPU: without ``detail: high`` there is one."""
    file = photo(1280, 800)
    for detail in ("auto", "low"):
        _, (row,) = shown(board, "slices", file, detail)
        said, done = ask(board, "slices", [part(file, detail), TEXT])
        wanted = rows_of_prompt(board, HEAD + slices(0, 0, 0) + TAIL, [row])
        assert said["sums"] == models.sum_of(wanted)
        assert done.usage.prompt_tokens_details.image_tokens == 64


def test_what_a_client_writes_is_no_tag(board: Board) -> None:
    """Neither a place of a picture nor a token of the model, whatever the text says."""
    text = {"type": "text", "text": "<image><slice><unk></slice> or <image>./</image>?"}
    said, done = ask(board, "slices", [part(photo(1280, 800), "high"), text])
    assert done.usage.prompt_tokens == int(said["embeds"])
    assert done.usage.prompt_tokens_details.image_tokens == 7 * 64


# --- InternVL: a place for each tile, between one pair of tags -------------------------


def test_tiles_reach_the_decoder_between_one_pair_of_tags(board: Board) -> None:
    file = photo(1300, 900, seed=7)
    plan, rows = shown(board, "internvl", file, "high")
    assert len(plan.views) == 7
    said, done = ask(board, "internvl", [part(file, "high"), TEXT])
    assert said["pictures"] == "7"
    assert said["sums"] == ",".join(models.sum_of(one) for one in rows)
    assert done.usage.prompt_tokens_details.image_tokens == 7 * 256
    assert done.usage.prompt_tokens == int(said["tokens"])
    run = board.sim.one("run")
    assert "<img>" + "<image>" * 7 + "</img>\nWhat is this?" in run["prompt"]
    assert run["image_start"] == run["image_end"] == ""
    _, (row,) = shown(board, "internvl", file, "auto")
    said, _ = ask(board, "internvl", [part(file), TEXT])
    assert said["sums"] == models.sum_of(row)


# --- the owner's side ----------------------------------------------------------------


def test_show_and_check_explain(board: Board, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--models", str(board.folder / "models")]
    for name, words in (
        (
            "tiles",
            ("; tiles of 640x640", "one block", "lines and the picture are given by the encoder"),
        ),
        ("bare", ("; tiles of 640x640", "one block", "by separators.npy")),
        ("slices", ("448x448, padded, and in slices where a request says detail high",)),
    ):
        assert main(["show", name, *where]) == 0
        said = capsys.readouterr().out
        assert all(word in said for word in words), said
        assert main(["check", name, *where]) == 0
        assert "not right" not in capsys.readouterr().out
    # The rows of another model.
    np.save(board.folder / "models" / "bare" / "separators.npy", np.zeros((2, 896), np.float32))
    try:
        assert main(["check", "bare", "--quick", *where]) == 1
        said = capsys.readouterr().out
        assert "assembly.rows.file" in said
        assert "2 x 1280" in said
    finally:
        np.save(board.folder / "models" / "bare" / "separators.npy", OWN)


def test_an_import_tells_of_the_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    download(tmp_path / "download", CATALOGUE["deepseek-ocr"], [(448, 57)])
    (tmp_path / "models").mkdir()
    argv = ["import", str(tmp_path / "download"), "--models", str(tmp_path / "models")]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "note: --model: deepseek-ocr-tiles is another way to use these files" in said
    assert main(["show", "deepseek-ocr-tiles", "--models", str(tmp_path / "models")]) == 0
    assert "1024x1024 (273 tokens), 640x640 (111 tokens)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("template", "encoders", "words"),
    [
        (TILES, [(640, 100), (1024, 256)], ("assembly.rows: missing", "image_newline")),
        (TILES, [(1024, 273)], ("base_tiles needs an encoder with tile = true",)),
        (SLICES, [(448, 64)], ("embed.npy", "writes <image> before a part")),
    ],
)
def test_an_import_says_what_is_missing(
    template: Template, encoders: Any, words: Sequence[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    download(tmp_path / "download", template, encoders)
    (tmp_path / "models").mkdir()
    argv = ["import", str(tmp_path / "download"), "--models", str(tmp_path / "models")]
    assert main(["--json", *argv, "--model", template.model]) == 1
    said = json.dumps(capsys.readouterr())
    assert all(word in said for word in words), said
    assert not list((tmp_path / "models").iterdir())
