"""The encoder backend against the stand-in for rknn-toolkit-lite2."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rkvlmd.errors import RkvlmdError
from rkvlmd.wire import child
from tests.npusim import folders, models
from tests.npusim.fixture import PYTHON, Sim
from tests.npusim.house import plug_in


@pytest.fixture
def sim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sim]:
    monkeypatch.syspath_prepend(str(PYTHON))
    yield plug_in(tmp_path, monkeypatch)
    for name in [n for n in sys.modules if n.partition(".")[0] == "rknnlite"]:
        del sys.modules[name]
    sys.modules.pop("rkvlmd.engine.rknn_encoder", None)


def load(sim: Sim, soc: str = "rk3588", **folder: Any) -> tuple[Any, dict[str, Any]]:
    from rkvlmd.engine.rknn_encoder import RknnEncoder

    path = sim.folder / "m"
    tree = json.loads(
        (path if path.exists() else folders.write(path, **folder))
        .joinpath("rkvlm.json")
        .read_text()
    )
    encoder = RknnEncoder()
    order = child.Load(folder=str(path), manifest=tree, options={"soc": soc})
    return encoder, encoder.load(order, lambda *_: None)


def picture(seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (folders.SIDE, folders.SIDE, 3), np.uint8)


@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("batched", [True, False])
def test_rows_are_interleaved(sim: Sim, outputs: int, batched: bool) -> None:
    encoder, ready = load(sim, outputs=outputs, vision_file={"batched": batched})
    pixels = picture()
    rows = encoder.encode(pixels)
    expected = models.rows_of(models.number_of(pixels), folders.TOKENS, folders.EMBED, outputs)
    assert rows.dtype == np.float32
    assert rows.flags.c_contiguous
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(encoder.encode(pixels[None]), expected)
    assert ready == {
        "libraries": {"librknnrt": "RKNN VERSION: API: 2.3.2 (npusim) DRV: 0.9.8"},
        "toolkit": "2.5.0", "core_mask": 7, "file_released": True, "tokens": folders.TOKENS,
        "embedding": folders.EMBED, "outputs": outputs,
    }  # fmt: skip


def test_the_copy_of_the_file_is_given_back(sim: Sim) -> None:
    encoder, _ = load(sim)
    assert encoder._lite.rknn_data is None


def test_a_copy_that_is_needed_stays(sim: Sim, monkeypatch: pytest.MonkeyPatch) -> None:
    # That it can go is an inference from the library's source.
    monkeypatch.setenv("NPUSIM_RKNN_DATA", "needed")
    encoder, ready = load(sim)
    assert ready["file_released"] is False
    assert encoder._lite.rknn_data
    assert encoder.encode(picture()).shape == (4, 16)


def test_a_driver_that_is_too_old(sim: Sim, monkeypatch: pytest.MonkeyPatch) -> None:
    from rkvlmd.board.driver import Driver

    monkeypatch.setenv("NPUSIM_DRIVER", "0.9.3")
    with pytest.raises(RkvlmdError, match="the NPU does not take"):
        load(sim)
    monkeypatch.setattr("rkvlmd.board.driver.read", lambda _root: Driver("rknpu", "0.9.3"))
    with pytest.raises(RkvlmdError, match=r"driver is version 0\.9\.3, .* need 0\.9\.8") as caught:
        load(sim)
    assert caught.value.code == "model_failed"
    monkeypatch.setenv("NPUSIM_OLD_DRIVER", "works")
    assert load(sim)[0].encode(picture()).shape == (4, 16)


@pytest.mark.parametrize(
    ("soc", "mask"),
    [("rk3588", 7), ("rk3588s", 7), ("rk3576", 3), ("rk3562", 0), ("rv1126b", 0), ("rk3568", 0)],
)
def test_the_core_mask_follows_the_soc(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, soc: str, mask: int
) -> None:
    platform = soc.removesuffix("s")
    monkeypatch.setenv("NPUSIM_PLATFORM", platform.upper())
    load(sim, soc, vision_file={"platform": platform})
    assert sim.one("encoder_init")["core_mask"] == mask


@pytest.mark.parametrize("mask", [0, 1, 3])
def test_the_manifest_can_choose_the_cores(sim: Sim, mask: int) -> None:
    folder = folders.write(sim.folder / "m")
    tree = json.loads((folder / "rkvlm.json").read_text())
    tree["encoders"][0]["core_mask"] = mask
    (folder / "rkvlm.json").write_text(json.dumps(tree))
    load(sim)
    assert sim.one("encoder_init")["core_mask"] == mask


LOADS = [
    # file, SoC, environment, what the error says
    ({"platform": "rk3576"}, "rk3588", {}, r"encoders\[0\]\.file: .* for rk3576, but this is rk3588"),
    ({"version": 7}, "rk3588", {}, "the NPU does not take"),
    ({}, "rk3588", {"FAULT": "fail@load"}, "the NPU does not take"),
    ({"tokens": 5}, "rk3588", {}, r"encoders\[0\]\.tokens: .* says 4, but the file gives 5"),
    ({"embed": 8}, "rk3588", {}, r"encoders\[0\]\.embedding: .* says 16, but the file gives 8"),
    ({"outputs": 3}, "rk3588", {}, r"encoders\[0\]\.outputs: .* says 4, but the file has 3"),
    ({"width": 32}, "rk3588", {}, "The vision encoder failed"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "soc", "env", "says"), LOADS)
def test_loads_that_fail(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, file: Any, soc: str, env: Any, says: str
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(f"NPUSIM_{name}", value)
    with pytest.raises(RkvlmdError, match=says) as caught:
        load(sim, soc, outputs=4, vision_file=file)
    assert "/" not in caught.value.message


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "no .rknn file"), (b"ONNX" + bytes(100), "no .rknn file"),
     (None, "is cut short"), (b"RKNN\0\0\0\0" + bytes(5), "is cut short")],
)  # fmt: skip
def test_files_that_are_no_encoder(sim: Sim, content: bytes | None, says: str) -> None:
    file = folders.write(sim.folder / "m") / "vision.rknn"
    file.write_bytes(file.read_bytes()[:-20] if content is None else content)
    with pytest.raises(RkvlmdError, match=says):
        load(sim)
    file.unlink()
    with pytest.raises(RkvlmdError, match=r"vision\.rknn is missing"):
        load(sim)


def test_a_form_that_nobody_knows_is_left_to_the_library(sim: Sim) -> None:
    file = folders.write(sim.folder / "m") / "vision.rknn"
    data = file.read_bytes()
    file.write_bytes(data[:16] + b"\xff" * 8 + data[24:])  # a length that makes no sense
    with pytest.raises(RkvlmdError, match="the NPU does not take"):
        load(sim)


@pytest.mark.parametrize(
    ("kind", "says"),
    [("none", "failed"), ("nan", "not a number"), ("shape", "3 x 16 values instead of 4 x 16"),
     ("outputs", "3 outputs instead of 4")],
)  # fmt: skip
def test_encodes_that_fail(sim: Sim, monkeypatch: pytest.MonkeyPatch, kind: str, says: str) -> None:
    encoder, _ = load(sim, outputs=4)
    monkeypatch.setenv("NPUSIM_FAULT", f"{kind}@encode")
    with pytest.raises(RkvlmdError, match=says) as caught:
        encoder.encode(picture())
    assert caught.value.code == "engine_error"
    assert encoder.encode(picture()).shape == (4, 64)


@pytest.mark.parametrize("outputs", [1, 4])
def test_rows_go_where_they_are_wanted(sim: Sim, outputs: int) -> None:
    encoder, _ = load(sim, outputs=outputs)
    pixels = picture()
    assert encoder.rows_shape == (folders.TOKENS, outputs * folders.EMBED)
    place = np.full(encoder.rows_shape, -1, np.float32)
    encoder.encode_into(pixels, None, lambda: place)
    expected = models.rows_of(models.number_of(pixels), folders.TOKENS, folders.EMBED, outputs)
    np.testing.assert_array_equal(place, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_found_anywhere(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    encoder, _ = load(sim, outputs=2)
    assert folders.TOKENS == 4
    # Then the last step is a short one.
    monkeypatch.setattr(sys.modules[type(encoder).__module__], "_TOKENS", 3)
    for output, token, column in ((0, 0, 0), (1, 2, 7), (0, 3, 15), (1, 3, 0)):
        found = [np.ones((1, folders.TOKENS, folders.EMBED), np.float32) for _ in range(2)]
        monkeypatch.setattr(encoder._lite, "inference", lambda found=found, **_: found)
        assert encoder.encode(picture()).shape == (folders.TOKENS, 2 * folders.EMBED)
        found[output][0, token, column] = value
        with pytest.raises(RkvlmdError, match="not a number"):
            encoder.encode(picture())


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((64, 64, 3), np.float32), np.zeros((64, 32, 3), np.uint8), np.zeros(10, np.uint8)],
)
def test_pixels_that_are_none(sim: Sim, pixels: Any) -> None:
    encoder, _ = load(sim)
    encodes = len(sim.trace("encode"))
    with pytest.raises(RkvlmdError, match="but the encoder takes"):
        encoder.encode(pixels)
    assert len(sim.trace("encode")) == encodes


def test_a_library_that_cannot_say_for_whom_a_file_is(
    sim: Sim, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rknnlite.api import RKNNLite

    def fails(*_args: Any, **_more: Any) -> None:
        raise RuntimeError("no such model")

    monkeypatch.setattr(RKNNLite, "list_support_target_platform", fails)
    monkeypatch.setattr(RKNNLite, "get_sdk_version", fails)
    encoder, ready = load(sim)
    assert ready["libraries"] == {"librknnrt": ""}
    assert encoder.encode(picture()).shape == (4, 16)
    for said in (None, {}, {"support_target_platform": None}, ["rk3576"]):
        monkeypatch.setattr(
            RKNNLite, "list_support_target_platform", lambda *_a, said=said, **_k: said
        )
        load(sim)
    monkeypatch.setattr(
        RKNNLite, "list_support_target_platform",
        lambda *_a, **_k: {"support_target_platform": ["RK3566", "RK3568"]},
    )  # fmt: skip
    with pytest.raises(RkvlmdError, match="for rk3566, rk3568, but this is rk3588"):
        load(sim)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rkvlmd.engine.roles import EngineRole

    monkeypatch.setitem(sys.modules, "rknnlite", None)
    tree = json.loads((folders.write(tmp_path / "m") / "rkvlm.json").read_text())
    order = child.Load(folder=str(tmp_path / "m"), manifest=tree)
    sys.modules.pop("rkvlmd.engine.rknn_encoder", None)
    with pytest.raises(RkvlmdError, match=r"'rknnlite(\.api)?', which is not installed"):
        EngineRole("encoder").work(order, [], lambda *_, **_k: None)
