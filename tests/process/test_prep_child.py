"""A real prep child: pictures and prompts in, pixels and tokens out, within its memory."""

from __future__ import annotations

import base64
import hashlib
import io
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import trio
from PIL import Image

from rkvlmd.actors.blobs import Blob
from rkvlmd.actors.prep import Prep
from rkvlmd.engine import memfd, pictures, resample
from rkvlmd.models.manifest import Decoder, Encoder, File, Manifest, Patches, Resize, Tags
from rkvlmd.wire import child
from tests.fakes.engine_child import Process, started
from tests.fakes.scripted import make_model, settings_for

pytestmark = pytest.mark.process

ENCODER = Encoder(
    engine="onnx", file="v.onnx", sha256="0" * 64, tokens=64, embedding=8, width=96, height=64,
    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize=Resize(rule="pad"),
)  # fmt: skip
ANYTHING = File(file="anything", sha256="0" * 64)
MANIFEST = Manifest(
    schema=1, name="m", family="smolvlm", encoders=(ENCODER,),
    image=Tags(start="<", content="i", end=">"),
    decoder=Decoder(engine="onnx", files={"embed": ANYTHING, "decoder": ANYTHING}, context=512,
                    embedding=8),
)  # fmt: skip
MEMORY = 1 << 30


@pytest.fixture(scope="module")
def prep() -> Iterator[Process]:
    with started("prep", "--memory", str(MEMORY)) as process:
        process.hello()
        yield process


def png(size: tuple[int, int] = (120, 90)) -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize(size).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def order(number: int = 1, **more: Any) -> child.Picture:
    values: dict[str, Any] = {
        "encoding": "raw", "manifest": msgspec.to_builtins(MANIFEST), "max_bytes": 20 << 20,
        "max_pixels": 50_000_000, "min_side": 2, "max_aspect": 200,
    } | more  # fmt: skip
    return child.Picture(id=number, **values)


@pytest.mark.parametrize("encoding", ["raw", "base64"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_picture(prep: Process, encoding: Any, exact: bool) -> None:
    data = png()
    source = data if encoding == "raw" else base64.encodebytes(data)
    prep.send(order(3, encoding=encoding, exact=exact), [memfd.create(source)])
    done, fds = prep.until(child.PictureDone)
    assert done == child.PictureDone(
        id=3, sha256=hashlib.sha256(data).hexdigest(), width=120, height=90, format="png",
        views=[child.View(encoder=0, tokens=64,
                          tensor=child.Tensor(shape=(1, 3, 64, 96), dtype="float32"))],
        layout=["<", 0, ">"], fds=1,
    )  # fmt: skip
    limits = pictures.Limits(1 << 20, 1 << 20, 1, 1000)
    wanted = pictures.prepare(data, ENCODER, limits, exact=exact).tensor
    assert np.array_equal(prep.array(fds[0], done.views[0].tensor), wanted)


@pytest.mark.parametrize("encoding", ["raw", "base64"])
def test_a_picture_that_is_known_is_not_decoded(prep: Process, encoding: Any) -> None:
    data = png()
    sha256 = hashlib.sha256(data).hexdigest()
    source = data if encoding == "raw" else base64.encodebytes(data)
    prep.send(order(3, encoding=encoding, known=["0" * 64, sha256]), [memfd.create(source)])
    done, fds = prep.until(child.PictureDone)
    assert (done.sha256, done.views, fds) == (sha256, [], [])
    # Not even looked at: this one no decoder would take.
    broken = data[:40]
    known = [hashlib.sha256(broken).hexdigest()]
    prep.send(order(4, known=known), [memfd.create(broken)])
    assert prep.until(child.PictureDone)[0].sha256 == known[0]
    prep.send(order(5, encoding=encoding, known=known), [memfd.create(source)])
    done, fds = prep.until(child.PictureDone)
    assert len(done.views) == len(fds) == 1


def test_a_picture_of_several_views(prep: Process) -> None:
    tiles = msgspec.structs.replace(
        ENCODER, width=32, height=32, resize=Resize(rule="tiles", max_tiles=4, thumbnail=True)
    )
    model = msgspec.structs.replace(MANIFEST, family="internvl", encoders=(tiles,))
    data = png((128, 64))
    built = msgspec.to_builtins(model)
    prep.send(order(4, manifest=built, exact=True), [memfd.create(data)])
    done, fds = prep.until(child.PictureDone)
    assert (len(done.views), done.layout) == (3, ["<", 0, 1, 2, ">"])
    halves = [prep.array(fd, view.tensor) for fd, view in zip(fds, done.views, strict=True)]
    image = Image.open(io.BytesIO(data)).convert("RGB")
    wide = np.asarray(image.resize((64, 32), Image.Resampling.BICUBIC))
    for half, pixels in zip(halves, (wide[:, :32], wide[:, 32:]), strict=False):
        assert np.array_equal(half, resample.to_tensor(pixels, tiles))
    prep.send(order(5, manifest=built, detail="low"), [memfd.create(data)])
    done, fds = prep.until(child.PictureDone)
    assert (len(done.views), len(fds), done.layout) == (1, 1, ["<", 0, ">"])


def test_a_picture_in_patches(prep: Process) -> None:
    resize = Resize(rule="aspect", multiple=28, min_pixels=3136, max_pixels=50176)
    large = msgspec.structs.replace(
        ENCODER, resize=resize, patches=Patches(size=14, temporal=2, merge=2)
    )
    model = msgspec.structs.replace(MANIFEST, family="qwen2_vl", encoders=(large,))
    prep.send(order(6, manifest=msgspec.to_builtins(model)), [memfd.create(png((120, 90)))])
    (view,) = prep.until(child.PictureDone)[0].views
    assert (view.patches, view.grid, view.tokens) == ((1, 6, 8), (1, 3, 4), 12)
    assert view.tensor == child.Tensor(shape=(48, 3 * 2 * 14 * 14), dtype="float32")


@pytest.mark.parametrize(
    ("source", "more", "code"),
    [
        (b"", {}, "empty_image_file"),
        (b"", {"encoding": "base64"}, "empty_image_file"),
        (b"AAAA!", {"encoding": "base64"}, "invalid_base64_image"),
        (b"AAAA", {"encoding": "base64"}, "invalid_image_format"),
        (png()[:200], {}, "image_parse_error"),
        (png(), {"max_bytes": 100}, "image_file_too_large"),
        (b"A" * 5000, {"max_bytes": 100, "encoding": "base64"}, "image_file_too_large"),
        (png(), {"max_pixels": 1000}, "image_too_large"),
        (png(), {"min_side": 91}, "image_too_small"),
    ],
)
def test_bad_pictures_leave_it_well(
    prep: Process, source: bytes, more: dict[str, Any], code: str
) -> None:
    prep.send(order(8, **more), [memfd.create(source)])
    failed, _ = prep.until(child.Failed)
    assert (failed.id, failed.code) == (8, code)
    prep.send(order(9), [memfd.create(png())])
    assert prep.until(child.PictureDone)[0].id == 9


def test_a_picture_above_its_memory() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8000, 6000)).save(buffer, "PNG")
    with started("prep", "--memory", str(300 << 20)) as process:
        process.hello()
        process.send(order(1), [memfd.create(png())])
        process.until(child.PictureDone)
        process.send(order(2), [memfd.create(buffer.getvalue())])
        failed, _ = process.until(child.Failed)
        assert failed.code == "image_too_large"
        process.send(order(3), [memfd.create(png())])
        assert process.until(child.PictureDone)[0].id == 3


def test_the_largest_picture_fits_its_memory() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg, paletted = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8000, 6250)).save(jpeg, "JPEG", exif=exif)
    Image.new("P", (8000, 6250)).save(paletted, "PNG", transparency=0)
    with started("prep", "--memory", str(MEMORY)) as process:
        process.hello()
        for data in (jpeg.getvalue(), paletted.getvalue()):
            process.send(order(1, exact=True), [memfd.create(data)])
            done, _ = process.until(child.PictureDone)
            assert done.width * done.height == 50_000_000


def test_a_prompt(prep: Process, tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    manifest = msgspec.json.decode((folder / "rkvlm.json").read_bytes())
    turns = [{"role": "user", "parts": [{"picture": 0}, {"text": "<image> hi"}]}]
    laid = [child.Laid(layout=["", 0, ""], tokens=[3])]
    for number in (1, 2):
        prep.send(
            child.Render(
                id=number, folder=str(folder), manifest=manifest, turns=turns, pictures=laid
            )
        )
        done, _ = prep.until(child.RenderDone)
        assert done.id == number
        ((start, count, index, _),) = done.spans
        assert (count, index) == (3, 0)
        image = done.tokens[start]
        assert [i for i, t in enumerate(done.tokens) if t == image] == [*range(start, start + 3)]
    (folder / "chat_template.jinja").unlink()
    prep.send(child.Render(id=3, folder=str(folder), manifest=manifest, turns=turns, pictures=laid))
    failed, _ = prep.until(child.Failed)
    assert failed.code == "invalid_model"
    assert str(tmp_path) not in failed.message


@pytest.mark.parametrize("kind", ["kill", "hang", "error"])
def test_faults_on_demand(kind: str) -> None:
    with started("prep", script={"fault": {"at": "picture", "kind": kind}}) as process:
        process.hello()
        process.send(order(1), [memfd.create(png())])
        if kind == "kill":
            assert process.eof()
            assert process.wait() == -signal.SIGKILL
        elif kind == "hang":
            assert isinstance(process.receive()[0], child.Beat)
        else:
            assert process.until(child.Failed)[0].code == "engine_error"


def _mapped(pid: int, *libraries: str) -> list[bool]:
    maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
    return [library in maps for library in libraries]


def test_a_child_for_pictures_loads_no_tokenizer_before_a_prompt(tmp_path: Path) -> None:
    with started("prep", "--warm", "pictures") as process:
        process.hello()
        process.send(order(1), [memfd.create(png())])
        process.until(child.PictureDone)
        assert _mapped(process.popen.pid, "PIL", "tokenizers") == [True, False]
        folder = make_model(tmp_path)
        manifest = msgspec.json.decode((folder / "rkvlm.json").read_bytes())
        turns = [{"role": "user", "parts": [{"text": "hi"}]}]
        process.send(
            child.Render(id=2, folder=str(folder), manifest=manifest, turns=turns, pictures=[])
        )
        process.until(child.RenderDone)
        assert _mapped(process.popen.pid, "PIL", "tokenizers") == [True, True]


def test_freed_memory_goes_back() -> None:
    """What one order frees is not kept for the next; only a tenth of it may stay."""
    program = """
import sys
from rkvlmd.engine import heap

def anonymous():
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))

before = anonymous()
pieces = [bytes(4096) for _ in range(8192)]
kept, most = pieces[::512], anonymous()
del pieces
heap.trim()
print(before, most, anonymous())
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    before, most, after = map(int, run.stdout.split())
    assert most - before > 30_000
    assert after - before < (most - before) / 10


def test_it_imports_no_engine() -> None:
    with started("prep") as process:
        process.hello()
        process.send(order(1), [memfd.create(png())])
        process.until(child.PictureDone)
        maps = Path(f"/proc/{process.popen.pid}/maps").read_text(encoding="utf-8")
        assert "onnxruntime" not in maps
        assert "PIL" in maps


async def test_one_child_of_two_has_the_tokenizer(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    manifest = msgspec.json.decode((folder / "rkvlm.json").read_bytes())
    turns = [{"role": "user", "parts": [{"text": "hi"}]}]
    pool = Prep(settings_for(tmp_path, prep={"prompt_wait_seconds": 60.0}))

    async def picture() -> None:
        source = Blob(memfd.create(png()))
        _, blobs = await pool.do(order, [source], expect=child.PictureDone)
        for blob in blobs:
            blob.close()

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(pool.run)
            for _ in range(3):
                async with trio.open_nursery() as both:
                    both.start_soon(picture)
                    both.start_soon(picture)
                await pool.do(
                    lambda number: child.Render(
                        id=number, folder=str(folder), manifest=manifest, turns=turns, pictures=[]
                    ),
                    [],
                    expect=child.RenderDone,
                )
            have = {name: _mapped(c.pid, "tokenizers") for name, c in pool.children.items()}
            nursery.cancel_scope.cancel()
    assert have == {"prep:1": [True], "prep:2": [False]}


@pytest.mark.parametrize(
    "words",
    [[], ["cook"], ["prep"], ["prep", "--fd"], ["prep", "--fd", "x"], ["prep", "fd", "3"],
     ["prep", "--fd", "3", "--memory", "-1"], ["prep", "--fd", "3", "--speed", "1"]],
)  # fmt: skip
def test_a_command_line_that_is_none(words: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "rkvlmd.engine", *words], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "what is" in run.stderr


def test_what_stays_is_not_looked_at_again() -> None:
    program = """
import gc
from rkvlmd.engine import heap

kept = [[] for _ in range(1000)]
heap.give_back()
print(gc.get_freeze_count(), len(gc.get_objects()))
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    frozen, left = map(int, run.stdout.split())
    assert frozen > 1000
    assert left < 100


def test_the_collector_does_not_count_what_stays() -> None:
    """Else old garbage would gather until there is a quarter as much of it."""
    program = """
import gc
from rkvlmd.engine import heap

kept = [[] for _ in range(200_000)]
heap.give_back()
before = gc.get_stats()[2]["collections"]
for _ in range(200_000):
    circle = []
    circle.append(circle)
print(gc.get_stats()[2]["collections"] - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) > 0
