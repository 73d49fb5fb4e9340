"""A house of real actors and real children, whose engines follow a script instead of a model."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import trio
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from rkvlmd.actors.child import Child
from rkvlmd.actors.house import House
from rkvlmd.actors.job import Job
from rkvlmd.actors.loading import Loader
from rkvlmd.actors.prep import Prep
from rkvlmd.messages import ChatRequest, Ended, PicturePart, PictureSource, TextPart, Turn
from rkvlmd.settings import Settings
from tests.fakes.parts import ROOM, house_of

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}[end]{% endfor %}"
)


def _png() -> str:
    """A grey picture of 4x4 pixels: a PNG, base64."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (90, 90, 90)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


PNG = _png()


def make_model(parent: Path, name: str = "scripted", *, context: int = 512) -> Path:
    """Write a model folder with a real tokenizer and template, and files nobody opens."""
    folder = parent / name
    folder.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<image>", special=True), AddedToken("[end]")])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    for file in ("vision.onnx", "embed.onnx", "decoder.onnx"):
        (folder / file).write_bytes(f"{name} {file}".encode())

    def sha(file: str) -> str:
        return hashlib.sha256((folder / file).read_bytes()).hexdigest()

    def entry(file: str) -> dict[str, str]:
        return {"file": file, "sha256": sha(file)}

    manifest = {
        "schema": 1,
        "name": name,
        "family": "smolvlm",
        "encoders": [
            {"engine": "onnx", **entry("vision.onnx"), "width": 16, "height": 16,
             "tokens": 4, "embedding": 8},
        ],
        "decoder": {
            "engine": "onnx",
            "files": {"embed": entry("embed.onnx"), "decoder": entry("decoder.onnx")},
            "context": context,
            "embedding": 8,
            "kv_bytes_per_token": 64,
        },
        "tokenizer": entry("tokenizer.json"),
        "template": entry("chat_template.jinja"),
        "image": {"content": "<image>"},
        "special_strings": ["<image>", "[end]"],
        "embeddings": {"inputs": ["text", "image"], "normalise": False},
        "capabilities": ["image", "multi_image", "embeddings"],
    }  # fmt: skip
    (folder / "rkvlm.json").write_text(json.dumps(manifest))
    return folder


def settings_for(tmp: Path, **sections: dict[str, Any]) -> Settings:
    """Return settings in which nothing is too slow, all paths in ``tmp``."""
    base: dict[str, dict[str, Any]] = {
        "state": {"dir": str(tmp / "state")},
        "models": {"dir": str(tmp / "models"), "demo": False},
        "http": {"bind": "127.0.0.1:0"},
        "control": {"path": str(tmp / "control.sock")},
        "engine": {
            "first_token_seconds": 60.0, "prefill_rate": 1000.0, "token_seconds": 60.0,
            "abort_seconds": 60.0, "encode_seconds": 60.0, "grace_seconds": 5.0,
        },
        "prep": {"job_seconds": 30.0},
    }  # fmt: skip
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    settings = Settings()
    return replace(
        settings, **{name: replace(getattr(settings, name), **v) for name, v in base.items()}
    )


#: Waits for what hangs: long enough for what does not on a busy machine, short enough for a test.
SHORT: dict[str, dict[str, Any]] = {
    "engine": {"first_token_seconds": 4.0, "token_seconds": 4.0, "encode_seconds": 4.0},
    "prep": {"job_seconds": 4.0},
}


@contextmanager
def waits(house: House, **sections: dict[str, Any]) -> Iterator[None]:
    """Change deadlines of a running house inside the block, as a reload does."""
    before = house.settings
    changed = {name: replace(getattr(before, name), **v) for name, v in sections.items()}
    house.adopt(replace(before, **changed))
    yield
    house.adopt(before)


@dataclass
class Scripts:
    """The script of each role; may be changed while the house stands, for children to come."""

    encoder: dict[str, Any]
    decoder: dict[str, Any]
    prep: dict[str, Any]


def spare_parts(settings: Settings, scripts: Scripts) -> tuple[Loader, Prep]:
    """Return a loader and a prep pool whose children follow the scripts."""

    def options(role: str) -> dict[str, Any]:
        return {"backend": "scripted", "script": getattr(scripts, role)}

    def prep_child(name: str) -> Child:
        arguments = ["--script", json.dumps(scripts.prep)] if scripts.prep else []
        return Child(name, "prep", settings.engine, arguments=arguments)

    state = Path(settings.state.dir)
    state.mkdir(parents=True, exist_ok=True)
    return Loader(settings, state, options=options), Prep(settings, prep_child)


@asynccontextmanager
async def open_house(
    tmp: Path,
    *,
    scripts: Scripts | None = None,
    names: tuple[str, ...] = ("scripted",),
    room: Callable[[], int] = lambda: ROOM,
    **sections: dict[str, Any],
) -> AsyncIterator[House]:
    """Start prep, residency and scheduler over scripted children; no fronts."""
    settings = settings_for(tmp, **sections)
    for name in names:
        if not (tmp / "models" / name).exists():
            make_model(tmp / "models", name)
    scripts = scripts or Scripts({}, {}, {})
    loader, prep = spare_parts(settings, scripts)
    async with house_of(settings, loader, prep, room=room) as house:
        yield house


def chat(text: str = "hello", pictures: int = 0, **more: Any) -> ChatRequest:
    """Return a request with the small picture, as often as said."""
    parts: list[Any] = [PicturePart(i) for i in range(pictures)]
    sources = tuple(
        PictureSource("base64", PNG, f"messages[0].content[{i}].image_url") for i in range(pictures)
    )
    return ChatRequest(turns=(Turn("user", (*parts, TextPart(text))),), pictures=sources, **more)


_numbers = iter(range(1, 1_000_000))


def submit(house: House, request: ChatRequest, client: str = "10.0.0.1") -> Job:
    """Admit and start one job."""
    slot = house.scheduler.reserve(client, 1000)
    try:
        return house.scheduler.submit(slot, request, request_id=f"r{next(_numbers)}")
    finally:
        slot.release()


async def collect(job: Job) -> tuple[str, Ended]:
    """Read a job to its end."""
    text = ""
    while True:
        more, end = await job.outbox.take()
        text += more
        if end is not None:
            return text, end


async def in_order(jobs: dict[str, Job]) -> list[str]:
    """Return the names in the order in which their jobs end, all of them well."""
    ended: list[str] = []

    async def watch(name: str, job: Job) -> None:
        _, end = await collect(job)
        assert end.reason in ("stop", "length"), end
        ended.append(name)

    async with trio.open_nursery() as nursery:
        for name, job in jobs.items():
            nursery.start_soon(watch, name, job)
    return ended


async def until_phase(house: House, job: Job, *phases: str) -> None:
    """Wait until the job is in one of the phases; one waiter a job at a time."""
    with trio.fail_after(60):
        while job.phase not in phases:
            assert job.outbox.end is None, job.outbox.end
            moved = trio.Event()
            job.on_phase = moved.set
            await moved.wait()
