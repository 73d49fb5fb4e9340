"""``.rknn`` files, and models against a machine."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from rkvlmd.board import fits, rknn
from rkvlmd.board.finding import Finding
from rkvlmd.board.memory import Memory
from rkvlmd.board.soc import SOCS
from tests.fakes.boards.maker import rknn as rknn_file

ROOM = Memory(total=8 << 30, available=6 << 30, cma=None, cma_free=None, limit=None)
RK3588 = fits.Machine(SOCS["rk3588s"], ROOM, rkllm=("1.3.0",), rknn="2.3.2", cpus=8)


def trailer(tmp_path: Path, content: bytes) -> rknn.Trailer:
    file = tmp_path / "x.rknn"
    file.write_bytes(content)
    return rknn.read(file)


def test_trailer(tmp_path: Path) -> None:
    found = trailer(tmp_path, rknn_file("rk3588", "2.5.0", 4))
    assert found == rknn.Trailer("read", ("rk3588",), "2.5.0", 4)


def test_a_file_cut_short_anywhere(tmp_path: Path) -> None:
    whole = rknn_file()
    for size in range(8, len(whole), 7):
        assert trailer(tmp_path, whole[:size]).state == "short", size
    assert trailer(tmp_path, whole + b"more").state == "read"


def packed(text: bytes, length: int | None = None, body: int = 16) -> bytes:
    head = b"RKNN\0\0\0\0" + struct.pack("<QQ", 6, body) + bytes(40 + min(body, 16))
    return head + struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    ("content", "state"),
    [
        (b"", "other"),
        (b"onnx" * 9, "other"),
        (packed(b"{}", body=1 << 60), "unknown"),
        (packed(b"{}", length=1 << 50), "unknown"),
        (packed(b"{}", length=1000), "short"),
        (packed(b"[1]"), "unknown"),
        (packed(b"{nothing"), "unknown"),
        (packed(b"[" * 100_000), "unknown"),
        (packed(b"\xff\xfe{}"), "unknown"),
        (packed(b"{}"), "read"),
        (packed(b"{}\0\0"), "read"),
    ],
)
def test_other_layouts(tmp_path: Path, content: bytes, state: str) -> None:
    assert trailer(tmp_path, content).state == state


@pytest.mark.parametrize(
    "tree",
    [
        {"target_platform": 5, "version": [], "output_num": True},
        {"target_platform": [None, 7], "version": None, "output_num": "4"},
    ],
)
def test_values_of_another_kind_are_not_known(tmp_path: Path, tree: dict[str, Any]) -> None:
    assert trailer(tmp_path, packed(json.dumps(tree).encode())) == rknn.Trailer("read")


def test_a_folder_is_unreadable(tmp_path: Path) -> None:
    assert rknn.read(tmp_path).state == "unreadable"


# --- models ------------------------------------------------------------------------------


def model(tmp_path: Path, content: bytes = rknn_file(), **changes: Any) -> fits.Model:
    file = tmp_path / "vision.rknn"
    file.write_bytes(content)
    of = fits.Model(
        name="m",
        encoders=(fits.Encoder("encoders[0]", "rknn", file, 1),),
        decoder="rkllm",
        file=Path("qwen_w8a8_rk3588.rkllm"),
        context=4096,
        bytes=3 << 30,
        npu_cores=3,
    )
    return dataclasses.replace(of, **changes)


def keys(lines: list[Finding]) -> dict[str, str]:
    return {line.id.removeprefix("model."): line.status for line in lines}


def test_a_model_that_fits(tmp_path: Path) -> None:
    (line,) = fits.findings(model(tmp_path), RK3588, [])
    assert (line.id, line.status, line.facts) == ("model.ok", "ok", {"model": "m"})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (rknn_file("rk3576"), {"soc": "stop"}),
        (rknn_file(version="2.5.0"), {"toolkit": "stop"}),
        (rknn_file(version="2.3.3"), {"toolkit": "warn"}),
        (rknn_file(version="1.6.0"), {"ok": "ok"}),
        (rknn_file(version="unreadable"), {"ok": "ok"}),
        (rknn_file(outputs=4), {"outputs": "warn"}),
        (rknn_file()[:300], {"file": "warn"}),
        (b"other", {"file": "warn"}),
        (packed(b"[]"), {"file": "note"}),
    ],
)
def test_encoder_files(tmp_path: Path, content: bytes, expected: dict[str, str]) -> None:
    found = keys(fits.findings(model(tmp_path, content), RK3588, []))
    assert found == expected


def test_rk3566_and_rk3568_are_one_npu(tmp_path: Path) -> None:
    machine = dataclasses.replace(RK3588, soc=SOCS["rk3568"])
    of = model(tmp_path, rknn_file("rk3566"), decoder="onnx", file=None)
    assert keys(fits.findings(of, machine, [])) == {"ok": "ok"}
    of = model(tmp_path, rknn_file("rk3588"), decoder="onnx", file=None)
    assert keys(fits.findings(of, machine, [])) == {"soc": "stop"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"npu_cores": 4}, {"cores": "stop"}),
        ({"iommu_domain": 0}, {"domain": "note"}),
        ({"iommu_domain": 1}, {"ok": "ok"}),
        ({"runtime_versions": ("1.2.3", "1.2")}, {"runtime": "stop"}),
        ({"runtime_versions": ("1.3",)}, {"ok": "ok"}),
        ({"runtime_versions": ("1.2", "1.3")}, {"ok": "ok"}),
        ({"runtime_versions": ("1.3.0",)}, {"ok": "ok"}),
        ({"cpu_mask": 0xF0}, {"ok": "ok"}),
        ({"cpu_mask": 0xF00}, {"cpus": "warn"}),
        ({"context": 4000}, {"ok": "ok"}),
        ({"context": 4001}, {"context": "warn"}),
        ({"file": Path("m_RK3576.rkllm")}, {"name": "warn"}),
        ({"file": Path("model.rkllm")}, {"ok": "ok"}),
        ({"bytes": 9 << 30}, {"memory": "stop"}),
        ({"bytes": 7 << 30}, {"memory": "warn"}),
        ({"kv_bytes": 9 << 30}, {"memory": "stop"}),
    ],
)
def test_decoders(tmp_path: Path, changes: dict[str, Any], expected: dict[str, str]) -> None:
    assert keys(fits.findings(model(tmp_path, **changes), RK3588, [])) == expected


def test_the_reserve_and_a_control_group_count(tmp_path: Path) -> None:
    small = dataclasses.replace(RK3588, memory=dataclasses.replace(ROOM, limit=2 << 30))
    assert keys(fits.findings(model(tmp_path), small, [])) == {"memory": "stop"}
    reserve = dataclasses.replace(RK3588, reserve=6 << 30)
    assert keys(fits.findings(model(tmp_path), reserve, [])) == {"memory": "stop"}


def test_nothing_is_known_of_the_machine(tmp_path: Path) -> None:
    machine = fits.Machine(None, Memory(None, None, None, None, None))
    assert keys(fits.findings(model(tmp_path), machine, [])) == {"ok": "ok"}


def test_what_stops_an_engine_stops_its_models(tmp_path: Path) -> None:
    above = [
        Finding("a", "stop", "library A", "x", engines=("rknn",)),
        Finding("b", "warn", "library B", "x", engines=("rkllm",)),
        Finding("c", "stop", "package C", "x", engines=("onnx",)),
    ]
    (line,) = fits.findings(model(tmp_path), RK3588, above)
    assert (line.id, line.status) == ("model.machine", "stop")
    assert line.says == "cannot load here; see above: library A"
