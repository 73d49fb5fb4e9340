"""Jobs whose pictures become several views, through real prep, encoder and decoder children."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from PIL import Image

from rkvlmd.actors.blobs import Blob
from tests.fakes.scripted import Scripts, chat, collect, make_model, open_house, submit, waits

pytestmark = pytest.mark.process

ECHO = Scripts({}, {"mode": "echo"}, {})


def png(width: int, height: int) -> str:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def ask(width: int, height: int, pictures: int = 1, **more: Any) -> Any:
    request = chat("x", pictures=pictures)
    data = png(width, height)
    sources = tuple(replace(source, data=data, **more) for source in request.pictures)
    return replace(request, pictures=sources)


def change(folder: Path, **values: Any) -> None:
    path = folder / "rkvlm.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | values))


def two_encoders(folder: Path) -> None:
    """Let 16x16 pixels see the whole picture, and 8x8 pixels the tiles of it."""
    manifest = json.loads((folder / "rkvlm.json").read_text())
    (whole,) = manifest["encoders"]
    whole["resize"] = {"rule": "base_tiles", "min_tiles": 2, "max_tiles": 4}
    (folder / "tile.onnx").write_bytes(b"tiles")
    digest = hashlib.sha256(b"tiles").hexdigest()
    tile = {**whole, "file": "tile.onnx", "sha256": digest, "width": 8, "height": 8, "tokens": 3}
    tile |= {"tile": True, "resize": {"rule": "stretch"}}
    change(folder, encoders=[whole, tile], family="deepseek_ocr")


async def test_a_picture_of_three_views_and_two_encoders(tmp_path: Path) -> None:
    two_encoders(make_model(tmp_path / "models"))
    async with open_house(tmp_path, scripts=ECHO) as house:
        with trio.fail_after(60):
            text, end = await collect(submit(house, ask(40, 20)))
            assert text.startswith("pictures=3 "), end
            assert end.usage.image_tokens == 3 + 3 + 4
            assert house.tools.cache.misses == 3
            # The same file again: nothing is encoded. Its low detail: only the whole picture.
            again, _ = await collect(submit(house, ask(40, 20)))
            assert again == text
            assert (house.tools.cache.misses, house.tools.cache.hits) == (3, 3)
            low, end = await collect(submit(house, ask(40, 20, detail="low")))
            assert low.startswith("pictures=1 ")
            assert end.usage.image_tokens == 4
            # One that is no larger than a tile is not cut.
            small, end = await collect(submit(house, ask(8, 8)))
            assert small.startswith("pictures=1 ")
            assert end.usage.image_tokens == 4
    assert Blob.live == 0


async def test_all_views_of_a_picture_as_one_block(tmp_path: Path) -> None:
    """As DeepSeek-OCR reads them: the CPU engine's children assemble them too."""
    folder = make_model(tmp_path / "models")
    two_encoders(folder)
    encoders = json.loads((folder / "rkvlm.json").read_text())["encoders"]
    encoders[0] |= {"tokens": 7}
    encoders[1] |= {"tokens": 3}
    change(folder, encoders=encoders, assembly={"square": 8})
    async with open_house(tmp_path, scripts=Scripts({}, {"mode": "echo"}, {})) as house:
        with trio.fail_after(60):
            text, end = await collect(submit(house, ask(40, 20)))
            # Two tiles of one row each, a line's end, and the whole with 2 x 3 rows and an end.
            assert text.startswith("pictures=1 "), end
            assert end.usage.image_tokens == 3 + 7
            assert house.tools.cache.misses == 3
            again, _ = await collect(submit(house, ask(40, 20)))
            assert again == text
            assert house.tools.cache.hits == 3
            low, end = await collect(submit(house, ask(40, 20, detail="low")))
            assert low.startswith("pictures=1 ")
            assert end.usage.image_tokens == 7
    assert Blob.live == 0


async def test_pictures_of_any_size_in_patches(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "models")
    manifest = json.loads((folder / "rkvlm.json").read_text())
    manifest["encoders"][0] |= {
        "patches": {"size": 4, "temporal": 2, "merge": 2}, "tokens": 64,
        "resize": {"rule": "aspect", "multiple": 8, "min_pixels": 64, "max_pixels": 4096},
        "width": 64, "height": 64,
    }  # fmt: skip
    change(folder, encoders=manifest["encoders"], family="qwen2_vl")
    async with open_house(tmp_path, scripts=ECHO) as house:
        with trio.fail_after(60):
            # The encoder is told the grid, so that its rows are as many as the prompt has places.
            for size, tokens in (((40, 20), 5 * 2), ((16, 24), 2 * 3), ((400, 200), 11 * 5)):
                text, end = await collect(submit(house, ask(*size)))
                assert text.startswith("pictures=1 "), end
                assert end.usage.image_tokens == tokens
    assert Blob.live == 0


def large_pictures(tmp_path: Path) -> None:
    """Write a model of whose context a picture takes more than a third."""
    folder = make_model(tmp_path / "models")
    manifest = json.loads((folder / "rkvlm.json").read_text())
    manifest["encoders"][0]["tokens"] = 200
    change(folder, encoders=manifest["encoders"])


async def test_pictures_that_fill_the_context(tmp_path: Path) -> None:
    large_pictures(tmp_path)
    async with open_house(tmp_path, scripts=ECHO) as house:
        with trio.fail_after(60):
            _, end = await collect(submit(house, ask(16, 16, pictures=3)))
            assert end.error is not None
            assert end.error.code == "context_length_exceeded"
            for number in ("600 tokens", "512 tokens", "3 pictures", "fewer pictures", "'low'"):
                assert number in end.error.message
            text, _ = await collect(submit(house, ask(16, 16, pictures=2)))
            assert text.startswith("pictures=2 ")
    assert Blob.live == 0


async def test_pictures_that_fill_the_context_are_not_looked_at(tmp_path: Path) -> None:
    large_pictures(tmp_path)
    request = ask(16, 16, pictures=3)
    none = base64.b64encode(b"no picture at all").decode()
    request = replace(request, pictures=tuple(replace(s, data=none) for s in request.pictures))
    async with open_house(tmp_path, scripts=ECHO) as house:
        with trio.fail_after(60):
            _, end = await collect(submit(house, request))
            assert end.error is not None
            assert end.error.code == "context_length_exceeded"
            request = replace(request, pictures=request.pictures[:2], turns=chat("x", 2).turns)
            _, end = await collect(submit(house, request))
            assert end.error is not None
            assert end.error.code == "invalid_image_format"


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        # The first loop in a rendering, not in the probe that a template gets when it is read.
        "{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
        "{% if p.text == 'x' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
        "{% endfor %}{% endif %}{% else %}<image>{% endif %}{% endfor %}{% endfor %}",
    ],
)
async def test_a_template_that_loops_for_ever(tmp_path: Path, template: str) -> None:
    folder = make_model(tmp_path / "models", "loops")
    (folder / "chat_template.jinja").write_text(template)
    digest = hashlib.sha256(template.encode()).hexdigest()
    change(folder, template={"file": "chat_template.jinja", "sha256": digest})
    make_model(tmp_path / "models", "well")
    async with open_house(tmp_path, names=("loops", "well"), prep={"children": 1}) as house:
        with trio.fail_after(60):
            with waits(house, prep={"job_seconds": 2.0}):
                _, end = await collect(submit(house, chat("x", model="loops")))
            assert end.error is not None
            assert (end.reason, end.error.code) == ("engine_died", "engine_died")
            assert "too long to prepare" in end.error.message
            # The child is gone with its loop; the next order gets another one.
            text, end = await collect(submit(house, chat("x", model="well")))
            assert (text.split()[0], end.reason) == ("t0", "stop")
