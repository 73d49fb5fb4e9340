"""The whole daemon, from a picture file to the answer's text, against transformers."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from rkvlmd.models import manifest as manifests
from tests.e2e.daemon import running
from tests.parity_onnx import engines
from tests.parity_onnx.checkpoints import IDS, KINDS, Kind, make, quiet
from tools.exporter import folder as exporter

pytestmark = [pytest.mark.torch, pytest.mark.process]
#: Pictures of any size in patches, with features of inner layers, with states; tiles and a
#: thumbnail; pictures that see themselves whole.
NAMES = ("qwen2_vl", "qwen3_vl", "qwen3_5", "internvl", "gemma3")
NEW = 6
SIZES = ((40, 24), (17, 50))


def drawing(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


#: The image processor of each family in transformers.
PROCESSORS = {"internvl": "GotOcr2ImageProcessorPil", "gemma3": "Gemma3ImageProcessorPil"}


def processed(kind: Kind, checkpoint: Path, images: list[Image.Image]) -> list[engines.Picture]:
    """Return what the family's own processor makes of the pictures."""

    def work() -> list[Any]:
        import transformers

        name = PROCESSORS.get(kind.name, "Qwen2VLImageProcessorPil")
        processor = getattr(transformers, name).from_pretrained(checkpoint)
        return [processor([image], return_tensors="np") for image in images]

    found = []
    for number, one in enumerate(quiet(work)):
        pixels, key = np.asarray(one["pixel_values"], np.float32), f"p{number}"
        if kind.grids:
            t, h, w = (int(n) for n in one["image_grid_thw"][0])
            found.append(engines.Picture(key, pixels, t * h * w // 4, (t, h, w)))
        else:
            found.append(engines.Picture(key, pixels, kind.tokens * len(pixels)))
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[Any, Path]]]:
    return exported(tmp_path_factory.mktemp("daemon"), NAMES)


def exported(
    root: Path, names: Sequence[str], change: Callable[[Path], object] = lambda _: None
) -> tuple[Path, dict[str, tuple[Any, Path]]]:
    """Make and export checkpoints, changed before that; return the models' folder and all of them."""
    found = {}
    for name in names:
        found[name] = make(KINDS[name], root / name), root / name
        change(root / name)
        exporter.export(root / name, root / "models" / name, name=name)
    return root / "models", found


def test_answers_with_pictures_equal_transformers(
    tmp_path: Path, made: tuple[Path, dict[str, tuple[Any, Path]]]
) -> None:
    models, checkpoints = made
    images = [drawing(*size) for size in SIZES]
    with running(tmp_path, models) as daemon, httpx.Client(timeout=120) as http:
        for name, (model, checkpoint) in checkpoints.items():
            kind = KINDS[name]
            pictures = processed(kind, checkpoint, images)
            varied = kind.grids or name == "internvl"
            assert not varied or pictures[0].tokens != pictures[1].tokens
            tags = manifests.parse((models / name / manifests.FILE).read_bytes()).image
            assert tags is not None
            turns: list[dict[str, Any]] = []
            text = ""
            for number, image in enumerate(images):
                line = f"What is {number}?"
                parts = [{"type": "image_url", "image_url": {"url": url(image)}},
                         {"type": "text", "text": line}]  # fmt: skip
                turns.append({"role": "user", "content": parts})
                seen = pictures[: number + 1]
                places = tags.content * seen[-1].tokens
                text += f"user: {tags.start}{places}{tags.end}{line}<|im_end|>"
                tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
                tokens = tokenizer.encode(text).ids
                wanted: list[int] = []
                while len(wanted) < NEW and (not wanted or wanted[-1] != IDS["<|im_end|>"]):
                    logits = engines.reference(kind, model, tokens + wanted, seen)
                    wanted.append(int(logits[-1].argmax()))
                body = {"model": name, "messages": turns, "max_tokens": NEW, "temperature": 0}
                answer = http.post(f"{daemon.url}/v1/chat/completions", json=body).json()
                assert "error" not in answer, answer
                assert answer["usage"]["prompt_tokens"] == len(tokens)
                said = answer["choices"][0]["message"]["content"]
                stops = [t for t in wanted if t != IDS["<|im_end|>"]]
                assert said in {
                    tokenizer.decode(stops, skip_special_tokens=skip) for skip in (True, False)
                }
                # The model is random: its words may be no text, so the next turn has others.
                turns.append({"role": "assistant", "content": "Yes."})
                text += "assistant: Yes.<|im_end|>"
