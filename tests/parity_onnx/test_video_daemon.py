"""The whole daemon, from the frames of a video to the answer's text, against transformers."""

from __future__ import annotations

import base64
import importlib
import io
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from tests.e2e.daemon import running
from tests.fakes import videos
from tests.parity_onnx import engines
from tests.parity_onnx.checkpoints import IDS, KINDS, quiet
from tests.parity_onnx.test_daemon import drawing, exported, url
from tests.parity_onnx.test_daemon import processed as pictures_of
from tests.parity_onnx.test_video import PAD, Film, reference

pytestmark = [pytest.mark.torch, pytest.mark.process]
NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
NEW = 6
CONFIG = "[media]\nexact = true\n"
#: Of one frame, and of all frames together: both rules make smaller frames than pictures are.
SIZES = {"run": (128, 512), "timed": (128, 2048)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[Any, Path]]]:
    def bound(checkpoint: Path) -> None:
        least, most = SIZES[kind(checkpoint.name)]
        (checkpoint / "video_preprocessor_config.json").write_text(
            json.dumps({"size": {"shortest_edge": least, "longest_edge": most}}), encoding="utf-8"
        )

    return exported(tmp_path_factory.mktemp("daemon"), NAMES, bound)


def kind(name: str) -> str:
    return "run" if name.startswith("qwen2") else "timed"


def processed(name: str, frames: list[Image.Image], seconds: float) -> Film:
    """Return what the family's video processor makes of frames.

    Its own sizes and patches; Pillow's resampling, as torchvision is not needed here.
    """
    import torch
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    three = quiet(
        lambda: importlib.import_module("transformers.models.qwen3_vl.video_processing_qwen3_vl")
    )
    width, height = frames[0].size
    least, most = SIZES[kind(name)]
    if kind(name) == "run":
        high, wide = smart_resize(height, width, factor=8, min_pixels=least, max_pixels=most)
    else:
        high, wide = three.smart_resize(
            num_frames=len(frames), height=height, width=width, temporal_factor=2, factor=8,
            min_pixels=least, max_pixels=most,
        )  # fmt: skip
    sheets = [
        np.asarray(f.resize((wide, high), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        for f in frames
    ]
    pixels = (np.stack(sheets).astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(
        0.5
    )
    processor = quiet(lambda: three.Qwen3VLVideoProcessor(patch_size=4))
    flat, *grid = processor.patchify(
        torch.from_numpy(pixels)[None], patch_size=4, merge_size=2, temporal_patch_size=2
    )
    t, h, w = (int(n) for n in grid)
    return Film(name, list(flat[0].numpy().reshape(t, h * w, -1)), (t, h, w), [], seconds)


def written(name: str, film: Film, times: list[float]) -> str:
    """Return what the family's processor writes for a video."""
    count, rows, columns = film.grid
    pads = "<|video_pad|>" * (rows * columns // 4)
    if kind(name) == "run":
        return f"<|vision_start|>{pads * count}<|vision_end|>"
    times = [*times, *times[-1:] * (-len(times) % 2)]
    parts = "".join(
        f"<{(times[2 * i] + times[2 * i + 1]) / 2:.1f} seconds><|vision_start|>{pads}<|vision_end|>"
        for i in range(count)
    )
    return f"<|vision_start|>{parts}<|vision_end|>"


def decided(
    model: Any, tokenizer: Tokenizer, text: str, given: list[Film | engines.Picture]
) -> tuple[list[int], list[int]]:
    """Return the prompt's tokens and the greedy answer of transformers."""
    tokens = tokenizer.encode(text).ids
    sorts = {PAD: 2, IDS["<|image_pad|>"]: 1}
    kinds = np.array([sorts.get(token, 0) for token in tokens])
    wanted: list[int] = []
    while len(wanted) < NEW and (not wanted or wanted[-1] != IDS["<|im_end|>"]):
        logits = reference(model, tokens + wanted, kinds, given)
        wanted.append(int(logits[-1].argmax()))
    return tokens, [token for token in wanted if token != IDS["<|im_end|>"]]


def test_answers_with_videos_equal_transformers(
    tmp_path: Path, made: tuple[Path, dict[str, tuple[Any, Path]]]
) -> None:
    models, checkpoints = made
    # An odd number, so that the last frame stands twice; nobody knows their times.
    frames = [drawing(40 + n, 24).crop((0, 0, 40, 24)) for n in range(5)]
    files = [base64.b64decode(url(frame).partition(",")[2]) for frame in frames]
    listed = {"type": "video_url", "video_url": {"url": videos.frames_uri(files)}}
    # And a file with times: 6 frames, half a second apart.
    gif = videos.gif(6, seconds=0.5)
    timed = {"type": "video_url", "video_url": {"url": videos.uri(gif, "image/gif")}}
    with Image.open(io.BytesIO(gif)) as image:
        drawn = []
        for n in range(6):
            image.seek(n)
            drawn.append(image.convert("RGB"))
    still = drawing(24, 40)
    shown = {"type": "image_url", "image_url": {"url": url(still)}}
    with running(tmp_path, models, config=CONFIG) as daemon, httpx.Client(timeout=120) as http:
        for name, (model, checkpoint) in checkpoints.items():
            tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
            first = processed(name, frames, 1.0)
            second = processed(name, drawn, 1.0)
            (third,) = pictures_of(KINDS[name], checkpoint, [still])
            assert first.grid[0] == second.grid[0] == 3
            pads = "<|image_pad|>" * third.tokens
            steps: list[tuple[list[Any], str, list[Film | engines.Picture]]] = [
                ([listed], written(name, first, [0.0, 0.5, 1.0, 1.5, 2.0]), [first]),
                (
                    [timed, shown],
                    written(name, second, [0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
                    + f"<|vision_start|>{pads}<|vision_end|>",
                    [first, second, third],
                ),
            ]
            turns: list[dict[str, Any]] = []
            text = ""
            before = 0
            for parts, line, given in steps:
                words = {"type": "text", "text": "What?"}
                turns.append({"role": "user", "content": [*parts, words]})
                text += f"user: {line}What?<|im_end|>"
                tokens, wanted = decided(model, tokenizer, text, given)
                body = {"model": name, "messages": turns, "max_tokens": NEW, "temperature": 0}
                answer = http.post(f"{daemon.url}/v1/chat/completions", json=body).json()
                assert "error" not in answer, (name, answer)
                usage = answer["usage"]
                assert usage["prompt_tokens"] == len(tokens)
                details = usage["prompt_tokens_details"]
                seen = tokens.count(PAD) + tokens.count(IDS["<|image_pad|>"])
                assert details["image_tokens"] == seen
                # The first video is still in the cache, all of it; states cannot be cut back.
                assert details["cached_tokens"] >= before or name == "qwen3_5"
                said = answer["choices"][0]["message"]["content"]
                assert said in {
                    tokenizer.decode(wanted, skip_special_tokens=skip) for skip in (True, False)
                }, name
                turns.append({"role": "assistant", "content": "Yes."})
                text += "assistant: Yes.<|im_end|>"
                before = len(tokens)


def test_a_bad_frame_is_named(
    tmp_path: Path, made: tuple[Path, dict[str, tuple[Any, Path]]]
) -> None:
    good = videos.jpeg(40)
    with running(tmp_path, made[0], config=CONFIG) as daemon:
        for bad, what in (([b"no picture", good], "first frame"), ([good, good[:80]], "A frame")):
            part = {"type": "video_url", "video_url": {"url": videos.frames_uri(bad)}}
            body = {"model": "qwen3_vl", "messages": [{"role": "user", "content": [part]}]}
            answer = httpx.post(f"{daemon.url}/v1/chat/completions", json=body, timeout=120)
            error = answer.json()["error"]
            assert answer.status_code == 400, error
            assert what in error["message"]
            assert error["param"].startswith("messages[0].content[0]")
