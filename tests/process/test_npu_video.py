"""Videos and embeddings on a simulated board: native from 1.3.0 on, as pictures before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.e2e.daemon import Daemon, png, running
from tests.fakes import videos
from tests.npusim import compiler, folders
from tests.npusim.fixture import Sim
from tests.npusim.house import plug_in

pytestmark = pytest.mark.process
FRAMES = 3


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Sim, Daemon]]:
    """A daemon with two libraries; the models differ in the one that they want."""
    with pytest.MonkeyPatch.context() as patch:
        sim = plug_in(tmp_path_factory.mktemp("sim"), patch)
        libraries = sim.folder / "libraries"
        libraries.mkdir()
        for version in ("1.2.3", "1.3.0"):
            (libraries / f"librkllmrt-{version}.so").symlink_to(compiler.library(version))
        where = sim.folder / "models"
        make(where / "new", "1.3.0")
        make(where / "old", "1.2.3")
        make(where / "late", "1.2.3", multi_image_from="1.3.0")
        config = f'[npu]\nlibrary = "{libraries}"\nsoc = "rk3588"\n[models]\ndemo = false\n'
        config += f"[media]\nmax_frames = {FRAMES}\n"
        with running(sim.folder, where, config=config) as daemon:
            yield sim, daemon
            assert daemon.stop() == 0
            assert not sim.trace("misuse")


def make(folder: Path, version: str, **decoder: Any) -> None:
    folders.write(
        folder,
        video=True,
        decoder={"runtime_versions": [version], **decoder},
        embeddings={"inputs": ["text", "image"], "normalise": False, "pool": "mean"},
        capabilities=["image", "multi_image", "video", "embeddings"],
    )


def ask(daemon: Daemon, model: str, *parts: dict[str, Any]) -> httpx.Response:
    body = {"model": model, "max_tokens": 4, "messages": [{"role": "user", "content": list(parts)}]}
    return httpx.post(daemon.url + "/v1/chat/completions", json=body, timeout=120)


def film(count: int) -> dict[str, Any]:
    url = videos.uri(videos.gif(count), "image/gif")
    return {"type": "video_url", "video_url": {"url": url}}


def picture(grey: int) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": png((grey, grey, grey))}}


def test_frames_are_a_video_from_1_3_on(board: tuple[Sim, Daemon]) -> None:
    sim, daemon = board
    text = {"type": "text", "text": "What moves?"}
    answer = ask(daemon, "new", picture(9), film(9), text, film(2))
    assert answer.status_code == 200, answer.text
    run = sim.trace("run")[-1]
    assert "<image><video>What moves?<video>" in run["prompt"]
    # Two of each: the library takes the same number of frames of every video.
    assert run["frames_per_video"] == 2
    assert run["video_content"] == "<|video_pad|>"
    details = answer.json()["usage"]["prompt_tokens_details"]
    assert details["image_tokens"] == 5 * folders.TOKENS


def test_frames_are_pictures_before_1_3(board: tuple[Sim, Daemon]) -> None:
    sim, daemon = board
    answer = ask(daemon, "old", film(9), {"type": "text", "text": "What moves?"})
    assert answer.status_code == 200, answer.text
    prompt = sim.trace("run")[-1]["prompt"]
    line = "3 frames of a video, at 0.0, 2.0 and 4.0 seconds:\n"
    assert line + "<image>" * FRAMES + "\nWhat moves?" in prompt
    assert answer.json()["usage"]["prompt_tokens_details"]["image_tokens"] == 3 * folders.TOKENS


@pytest.mark.parametrize("parts", [(film(4),), (picture(1), picture(2))], ids=["film", "two"])
def test_a_library_that_mixes_pictures_is_not_given_several(
    board: tuple[Sim, Daemon], parts: tuple[dict[str, Any], ...]
) -> None:
    answer = ask(board[1], "late", *parts)
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert "from version 1.3.0 of the RKLLM library on" in error["message"]
    assert error["param"].startswith("messages[0].content[")


@pytest.mark.parametrize("model", ["new", "old"])
def test_embeddings_come_from_hidden_states(board: tuple[Sim, Daemon], model: str) -> None:
    _, daemon = board

    def embed(given: Any) -> np.ndarray:
        answer = httpx.post(
            daemon.url + "/v1/embeddings", json={"model": model, "input": given}, timeout=120
        )
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert body["usage"]["prompt_tokens"] > 0
        return np.array([item["embedding"] for item in body["data"]])

    found = embed(["a text", "another text", "a text"])
    assert found.shape == (3, folders.EMBED)
    assert np.array_equal(found[0], found[2])
    assert not np.array_equal(found[0], found[1])
    assert not np.array_equal(embed([picture(10)]), embed([picture(200)]))
    # And the next chat is served as if nothing had been.
    assert ask(daemon, model, {"type": "text", "text": "hello"}).status_code == 200
