"""Videos of their own kind, from 1.3.0: frames, tags and places as the library wants them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rkvlmd.errors import RkvlmdError
from rkvlmd.wire import child
from tests.npusim import folders, models
from tests.npusim.bench import Bench
from tests.npusim.fixture import Sim
from tests.npusim.house import plug_in

pytestmark = pytest.mark.process

NEW = ["1.3.0", "1.3.1"]


@pytest.fixture
def sim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sim]:
    yield plug_in(tmp_path, monkeypatch)
    Bench.close_all()


def rows(number: int, outputs: int = 1) -> Any:
    return models.rows_of(number, folders.TOKENS, folders.EMBED, outputs)


def spans(*places: int | Sequence[int]) -> tuple[list[child.Span], list[int]]:
    """Return the spans of pictures (a number) and videos (numbers), and all numbers in order."""
    found, numbers, videos = [], [], 0
    for place in places:
        inside = [place] if isinstance(place, int) else list(place)
        video = None if isinstance(place, int) else videos
        videos += video is not None
        found += [
            child.Span(start=0, count=folders.TOKENS, key=f"picture {n}", video=video)
            for n in inside
        ]
        numbers += inside
    return found, numbers


def ask(bench: Bench, prompt: str, *places: Any, outputs: int = 1) -> tuple[dict[str, str], Any]:
    given, numbers = spans(*places)
    order = child.Generate(
        id=1, tokens=[], prompt=f"<|im_start|>user\n{prompt}<|im_end|>\n", count=100,
        spans=given, max_tokens=500,
    )  # fmt: skip
    said: list[Any] = []
    done = bench.decoder.generate(order, [rows(n, outputs) for n in numbers], said.append)
    text = "".join(m.text for m in said if isinstance(m, child.Text))
    return models.answer(text), done


@pytest.mark.parametrize("version", NEW)
@pytest.mark.parametrize("outputs", [1, 4])
def test_frames_arrive_in_order(sim: Sim, version: str, outputs: int) -> None:
    bench = Bench(sim, version, outputs=outputs, video=True)
    said, _ = ask(bench, "<video>what happens?", [3, 4, 5], outputs=outputs)
    assert (said["pictures"], said["videos"], said["frames"]) == ("0", "1", "3")
    assert said["sums"] == ",".join(models.sum_of(rows(n, outputs)) for n in (3, 4, 5))
    run = sim.one("run")
    assert (run["frames"], run["frames_per_video"], run["frame_tokens"]) == (3, 3, folders.TOKENS)
    assert (run["frame_width"], run["frame_height"]) == (folders.SIDE, folders.SIDE)
    assert run["video_content"] == "<|video_pad|>"
    assert (run["video_start"], run["video_end"]) == ("<|vision_start|>", "<|vision_end|>")
    assert not sim.trace("misuse")


@pytest.mark.parametrize("version", NEW)
def test_pictures_and_videos_in_one_prompt(sim: Sim, version: str) -> None:
    bench = Bench(sim, version, video=True)
    said, done = ask(bench, "<video>a <image> b <video> c <image>", [1, 2], 7, [3, 4], 8)
    assert (said["pictures"], said["videos"], said["frames"]) == ("2", "2", "4")
    numbers = (1, 2, 7, 3, 4, 8)
    assert said["sums"] == ",".join(models.sum_of(rows(n)) for n in numbers)
    assert done.reason == "stop"
    # A follow-up computes only what is new.
    _, again = ask(bench, "<video>a <image> b <video> c <image>", [1, 2], 7, [3, 4], 8)
    assert again.perf.prefill_tokens == 0


@pytest.mark.parametrize("pictures", ["apart", "blind", "never"])
def test_another_frame_is_another_video(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, pictures: str
) -> None:
    monkeypatch.setenv("NPUSIM_PICTURES", pictures)
    bench = Bench(sim, "1.3.0", video=True)
    for frames in ([1, 2, 3], [1, 2, 4], [1, 2]):
        said, _ = ask(bench, "<video>what?", frames)
        assert said["sums"] == ",".join(models.sum_of(rows(n)) for n in frames)


@pytest.mark.parametrize(("version", "video"), [("1.2.1", True), ("1.2.3", True), ("1.3.0", False)])
def test_where_no_video_is_taken(sim: Sim, version: str, video: bool) -> None:
    bench = Bench(sim, version, video=video)
    runs = len(sim.trace("run"))
    with pytest.raises(RkvlmdError, match=r"takes no video .* needs 1\.3\.0 or newer") as caught:
        ask(bench, "<video>what?", [1, 2])
    assert caught.value.code == "invalid_request"
    assert len(sim.trace("run")) == runs
    assert ask(bench, "<image>what?", 1)[0]["pictures"] == "1"


def test_videos_of_different_lengths(sim: Sim) -> None:
    bench = Bench(sim, "1.3.0", video=True)
    with pytest.raises(RkvlmdError, match="same number of frames alone; these have 2 and 3"):
        ask(bench, "<video><video>", [1, 2], [1, 2, 3])


@pytest.mark.parametrize(
    ("prompt", "places"),
    [("<video>", [1]), ("none", [[1, 2]]), ("<video><video>", [[1, 2]]), ("<image>", [[1, 2]])],
)
def test_places_are_counted(sim: Sim, prompt: str, places: Any) -> None:
    bench = Bench(sim, "1.3.0", video=True)
    runs = len(sim.trace("run"))
    with pytest.raises(RkvlmdError, match="The prompt has") as caught:
        ask(bench, prompt, *places)
    assert caught.value.code == "engine_error"
    assert len(sim.trace("run")) == runs
