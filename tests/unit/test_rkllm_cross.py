"""Models that read their pictures beside the prompt: ``rkllm_set_cross_attn_params``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rkvlmd.engine import rkllm_cross
from rkvlmd.errors import ManifestError, RkvlmdError
from rkvlmd.models import manifest as manifests
from rkvlmd.models import views
from tests.npusim import folders, models
from tests.npusim.bench import Bench
from tests.npusim.fixture import Sim
from tests.npusim.house import plug_in

pytestmark = pytest.mark.process

SIZES = (2, 3, 4)
SHAPE = manifests.CrossAttention(layers=2, kv_heads=3, head_dim=4)


@pytest.fixture
def sim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sim]:
    yield plug_in(tmp_path, monkeypatch)
    Bench.close_all()


def expected(pictures: list[int]) -> str:
    return models.cross_sum([models.caches_of(p, folders.TOKENS, *SIZES) for p in pictures])


def test_rows_and_back() -> None:
    outputs = [models.caches_of(p, 5, *SIZES) for p in (7, 8)]
    rows = [rkllm_cross.rows_of(pair, SHAPE, 5) for pair in outputs]
    assert rows[0].shape == (5, 2 * 24)
    found = rkllm_cross.caches(rows, SHAPE)
    np.testing.assert_array_equal(found.keys, np.concatenate([k for k, _ in outputs], 1))
    np.testing.assert_array_equal(found.values, np.concatenate([v for _, v in outputs], 3))
    assert found.keys.flags.c_contiguous
    assert found.values.flags.c_contiguous
    np.testing.assert_array_equal(found.positions, np.arange(10, dtype=np.int32))
    assert found.param.num_tokens == 10
    batched = [output[None] for output in outputs[0]]
    np.testing.assert_array_equal(rkllm_cross.rows_of(batched, SHAPE, 5), rows[0])


def test_shapes_that_are_others() -> None:
    keys, values = models.caches_of(1, 5, *SIZES)
    for pair in ((keys, keys), (values, keys), (keys[:1], values), (keys[0], values)):
        with pytest.raises(RkvlmdError, match=r"The encoder's (keys|values) are"):
            rkllm_cross.rows_of(pair, SHAPE, 5)
    with pytest.raises(RkvlmdError, match="The encoder's keys are 2 x 5 x 3 x 4"):
        rkllm_cross.rows_of((keys, values), SHAPE, 6)
    for rows in (np.zeros((5, 47), np.float32), np.zeros((5, 48)), np.zeros(48, np.float32)):
        with pytest.raises(RkvlmdError, match="takes rows of 48"):
            rkllm_cross.caches([rows], SHAPE)


@pytest.mark.parametrize("version", ["1.2.3", "1.3.0", "1.3.1"])
@pytest.mark.parametrize("pictures", ["apart", "blind"])
def test_the_right_caches_arrive(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, version: str, pictures: str
) -> None:
    monkeypatch.setenv("NPUSIM_PICTURES", pictures)
    bench = Bench(sim, version, cross=SIZES)
    assert sim.one("init")["cross"] is True
    assert len(sim.trace("run")) == 0  # no probe: there are no rows in its cache
    questions = ((1, "what is it?"), "and what else?", (2, "and this one?"))
    for order, text, done in bench.talk(*questions):
        said = models.answer(text)
        assert said["cross"] == expected(bench.pictures)
        assert said["pictures"] == "0"  # nothing is put into the prompt
        run = sim.one("run")
        assert run["kind"] == "prompt"
        assert "<image>" not in run["prompt"]
        assert run["prompt"].count("<|vision_start|><|image_pad|><|vision_end|>") == len(
            bench.pictures
        )
        assert sim.one("cross")["tokens"] == folders.TOKENS * len(bench.pictures)
        assert done.prompt == len(order.tokens) == int(said["tokens"])
    assert not sim.trace("misuse")


def test_other_pictures_make_all_of_the_cache_wrong(sim: Sim) -> None:
    bench = Bench(sim, "1.3.0", cross=SIZES)
    text, _ = bench.ask((1, "x"))
    before = len(sim.trace("clear"))
    _, done = bench.ask((1, "x"), text, "y")
    assert len(sim.trace("clear")) == before
    assert done.cached
    _, done = bench.ask((2, "x"), text, "y")
    assert len(sim.trace("clear")) == before + 1
    assert done.cached == 0
    # One picture more: what stands before it was computed without it.
    _, done = bench.ask((2, "x"), text, (3, "y"))
    assert len(sim.trace("clear")) == before + 2
    assert done.cached == 0


def test_text_alone_has_one_token_of_zeros(sim: Sim) -> None:
    bench = Bench(sim, "1.3.0", cross=SIZES)
    text, _ = bench.ask("hello")
    nothing = [(np.zeros((2, 1, 3, 4), np.float32), np.zeros((2, 3, 4, 1), np.float32))]
    assert models.answer(text)["cross"] == models.cross_sum(nothing)
    assert sim.one("cross")["tokens"] == 1


def test_the_mask_is_the_manifest_s(sim: Sim) -> None:
    folder = folders.write(sim.folder / "m", cross=SIZES)
    tree = json.loads((folder / "rkvlm.json").read_text())
    tree["decoder"]["cross_attention"]["mask"] = 0.0
    (folder / "rkvlm.json").write_text(json.dumps(tree))
    bench = Bench(sim, "1.3.0")
    text, _ = bench.ask((5, "x"))
    caches = [models.caches_of(5, folders.TOKENS, *SIZES)]
    assert models.answer(text)["cross"] == models.cross_sum(caches, mask=0.0)


def test_a_model_without_cross_attention_refuses_it(sim: Sim) -> None:
    bench = Bench(sim, "1.3.0", cross=SIZES, model={"cross": False})
    with pytest.raises(RkvlmdError, match="took no cross attention"):
        bench.ask((1, "x"))


def test_a_picture_is_one_token_of_the_prompt(sim: Sim) -> None:
    tree = json.loads((folders.write(sim.folder / "m", cross=SIZES) / "rkvlm.json").read_text())
    plan = views.plan(manifests.from_builtins(tree), 640, 480)
    assert [view.tokens for view in plan.views] == [1]


@pytest.mark.parametrize(
    "change",
    [
        {"encoders": {"outputs": 1}},
        {"encoders": {"embedding": 16}},
        {"decoder": {"prompt_cache": "You are"}},
        {"decoder": {"input": "embeddings"}},
        {"mask": 1e300},
        {"mask": -1e39},
    ],
)
def test_manifests_that_cannot_be(sim: Sim, change: Any) -> None:
    tree = json.loads((folders.write(sim.folder / "m", cross=SIZES) / "rkvlm.json").read_text())
    manifests.parse(json.dumps(tree).encode())
    tree["encoders"][0] |= change.get("encoders", {})
    tree["decoder"] |= change.get("decoder", {})
    if "mask" in change:
        tree["decoder"]["cross_attention"]["mask"] = change["mask"]
    with pytest.raises(ManifestError, match="cross_attention"):
        manifests.parse(json.dumps(tree).encode())
