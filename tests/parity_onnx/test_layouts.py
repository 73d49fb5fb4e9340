"""Every published layout of the files gives the answers of the plain ones, in real children too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rkvlmd.engine import memfd, onnx_decoder
from rkvlmd.models import manifest as manifests
from rkvlmd.models import views
from rkvlmd.wire import child
from tests.fakes.engine_child import started
from tests.parity_onnx import engines, layouts
from tests.parity_onnx.checkpoints import KINDS, make
from tools.exporter import folder as exporter
from tools.exporter import graph as graphs
from tools.exporter.weights import CheckpointError

pytestmark = pytest.mark.torch
NEW = 6
#: Layout, family that it is shown with, and how far its logits may be off.
LAYOUTS: dict[str, tuple[layouts.Layout, str, float]] = {
    "unmerged": (layouts.unmerged, "qwen2_vl", 1e-4),
    "single": (layouts.single_steps, "smolvlm", 1e-4),
    "branched": (layouts.branched, "smolvlm", 1e-4),
    "outside": (layouts.outside, "qwen2_vl", 1e-4),
    "half": (layouts.halved, "smolvlm", 0.1),
    "projector": (layouts.projected, "smolvlm", 1e-4),
    "four_rows": (layouts.four_rows, "qwen2_vl", 1e-4),
    "stacked": (layouts.stacked, "qwen3_vl", 1e-4),
}
Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Make:
    root = tmp_path_factory.mktemp("layouts")

    def get(name: str) -> Path:
        out = root / f"{name}.plain"
        if not out.exists():
            make(KINDS[name], root / name)
            exporter.export(root / name, out, name="tiny", attention="plain")
        return out

    return get


def conversation(name: str) -> list[tuple[list[int], list[child.Span], list[engines.Picture]]]:
    """Return two prompts: the second goes on after the first, with another picture."""
    kind = KINDS[name]
    one, two = engines.picture(kind, 0), engines.picture(kind, 1)
    parts: list[Any] = [engines.text(1, 7), one, engines.text(2, 5)]
    more = [*parts, engines.text(3, 4), two, engines.text(4, 6)]
    return [(*engines.prompt(kind, *parts), [one]), (*engines.prompt(kind, *more), [one, two])]


def answers(folder: Path, name: str) -> tuple[list[list[int]], np.ndarray]:
    """Return the answers to the conversation, and the logits of each one's first token."""
    engine = engines.Engine(folder)
    found, logits = [], []
    for tokens, spans, pictures in conversation(name):
        found.append(engine.ask(tokens, spans, pictures, NEW))
        logits.append(engine.logits[0])
    return found, np.stack(logits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_layout_answers_as_the_plain_one(
    exported: Make, tmp_path: Path, layout: str
) -> None:
    change, name, most = LAYOUTS[layout]
    plain = exported(name)
    folder = shutil.copytree(plain, tmp_path / "m")
    change(folder)
    wanted, wanted_logits = answers(plain, name)
    found, logits = answers(folder, name)
    assert np.abs(logits - wanted_logits).max() < most
    if most < 1e-3:
        assert found == wanted


@pytest.mark.parametrize("precision", ["half", "int8", "int4"])
@pytest.mark.parametrize("attention", ["plain", "gqa"])
def test_rounded_weights_answer_nearly_alike(
    exported: Make, tmp_path: Path, precision: Any, attention: Any
) -> None:
    plain = exported("qwen2_vl")
    out = tmp_path / "m"
    exporter.export(
        plain.parent / "qwen2_vl", out, name="tiny", attention=attention, precision=precision
    )
    _, wanted = answers(plain, "qwen2_vl")
    _, found = answers(out, "qwen2_vl")
    least = {"half": 0.999, "int8": 0.98, "int4": 0.7}[precision]
    assert np.corrcoef(wanted.ravel(), found.ravel())[0, 1] > least


@pytest.mark.parametrize("layout", ["unmerged", "outside", "projector", "stacked"])
@pytest.mark.process
def test_a_real_child_runs_the_layout(exported: Make, tmp_path: Path, layout: str) -> None:
    change, name, _ = LAYOUTS[layout]
    folder = shutil.copytree(exported(name), tmp_path / "m")
    change(folder)
    tree = manifests.to_builtins(manifests.parse((folder / manifests.FILE).read_bytes()))
    load = child.Load(folder=str(folder), manifest=tree | {"stop_ids": []}, options={"threads": 1})
    tokens, spans, pictures = conversation(name)[1]
    fds = []
    with started("encoder") as peer:
        peer.hello()
        peer.send(load)
        peer.until(child.Ready)
        for number, picture in enumerate(pictures):
            fd, tensor = memfd.from_array(picture.pixels, "pixels")
            peer.send(child.Encode(id=number, pixels=tensor, grid=picture.grid), [fd])
            fds += peer.until(child.EncodeDone)[1]
    with started("decoder") as peer:
        peer.hello()
        peer.send(load)
        peer.until(child.Ready)
        peer.send(child.Generate(id=9, tokens=tokens, spans=spans, max_tokens=NEW), fds)
        peer.until(child.Prefilled)
        for _ in range(NEW):
            peer.until(child.Text)
        done, _ = peer.until(child.GenerateDone)
    assert (done.completion, done.reason) == (NEW, "length")


def test_large_models_keep_their_weights_outside(
    exported: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = exported("qwen2_vl")
    monkeypatch.setattr(graphs, "MOST_INSIDE", 10_000)
    out = tmp_path / "m"
    made = exporter.export(plain.parent / "qwen2_vl", out, name="tiny", attention="plain")
    assert {"embed_data", "decoder_data"} < set(made.decoder.files)
    assert [entry.file for entry in made.encoders[0].data] == ["vision_encoder.onnx_data"]
    assert manifests.file_problems(made, out) == []
    assert answers(out, "qwen2_vl")[0] == answers(plain, "qwen2_vl")[0]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "gemma3", "qwen3_5"])
def test_pieces_of_a_prompt_give_what_the_whole_does(
    exported: Make, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    plain = exported(name)
    wanted = answers(plain, name)
    monkeypatch.setattr(onnx_decoder, "CHUNK", 9)
    found = answers(plain, name)
    assert found[0] == wanted[0]
    assert np.abs(found[1] - wanted[1]).max() < 1e-4


def test_a_picture_that_sees_itself_whole_is_never_kept_in_part(exported: Make) -> None:
    kind, folder = KINDS["gemma3"], exported("gemma3")
    one = engines.picture(kind, 0)
    # The prompt ends with the picture: its last place is computed again, and so is all of it.
    tokens = [*engines.text(1, 7), *engines.prompt(kind, one)[0][1:-1]]
    span = child.Span(start=7, count=one.tokens, key=one.key)
    engine = engines.Engine(folder)
    first = engine.ask(tokens, [span], [one], NEW)
    logits = engine.logits[0]
    assert engine.ask(tokens, [span], [one], NEW) == first
    assert engine.cached == 7
    assert np.abs(engine.logits[0] - logits).max() < 1e-5


def test_states_that_cannot_be_cut_back_begin_again(exported: Make) -> None:
    folder = exported("qwen3_5")
    tokens = engines.text(1, 9)
    engine = engines.Engine(folder)
    first = engine.ask(tokens, [], [], NEW)
    longer = [*tokens, *first, *engines.text(2, 3)]
    engine.ask(longer, [], [], NEW)
    assert engine.cached == len(tokens) + NEW - 1
    assert engine.ask([*tokens, 40], [], [], NEW) == engines.Engine(folder).ask(
        [*tokens, 40], [], [], NEW
    )
    assert engine.cached == 0


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_5"])
def test_conversations_in_turn_answer_as_each_alone(exported: Make, name: str) -> None:
    folder = exported(name)
    first, second = engines.text(1, 12), [*engines.text(1, 3), *engines.text(5, 9)]
    alone = [engines.Engine(folder).ask(tokens, [], [], NEW) for tokens in (first, second)]
    engine = engines.Engine(folder, conversations_bytes=1 << 20)
    for _ in range(2):
        assert [engine.ask(tokens, [], [], NEW) for tokens in (first, second)] == alone
    again = [*first, *alone[0], 40]
    assert engine.ask(again, [], [], NEW) == engines.Engine(folder).ask(again, [], [], NEW)
    assert engine.cached == len(first) + NEW - 1


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_an_encoder_of_one_size_gives_the_rows_of_the_one_for_any(
    exported: Make, tmp_path: Path, name: str
) -> None:
    plain, size = exported(name), (24, 16)
    made = exporter.export(
        plain.parent / name, tmp_path / "m", name="tiny", attention="plain", size=size
    )
    assert (made.encoders[0].patches, made.encoders[0].tokens) == (None, 6)
    rng = np.random.default_rng(3)
    pixels = rng.uniform(-1, 1, (3, 16, 24)).astype(np.float32)
    # As the processors flatten: blocks of 2 x 2 patches of 4 pixels, each repeated in time.
    blocks = pixels.reshape(3, 2, 2, 4, 3, 2, 4).transpose(1, 4, 2, 5, 0, 3, 6)
    patches = np.repeat(blocks.reshape(24, 3, 1, 16), 2, axis=2).reshape(24, 96)
    any_size = engines.Engine(plain).encoder.encode(patches, (1, 4, 6))
    one_size = engines.Engine(tmp_path / "m").encoder.encode(pixels)
    assert np.abs(any_size - one_size).max() < 1e-4
    # The decoder still gets rows and columns.
    assert [view.grid for view in views.plan(made, 100, 40).views] == [(1, 2, 3)]
    with pytest.raises(CheckpointError, match="multiples of 8"):
        exporter.export(plain.parent / name, tmp_path / "n", name="x", size=(20, 16))
