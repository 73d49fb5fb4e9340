"""The emulated board's own parts; the board itself takes minutes and root, and is not built here."""

from __future__ import annotations

import ctypes as c
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rkvlmd.board import libraries
from tests.npusim import compiler
from tools.emulated import build, cli

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH, TOKENS, EMBED = 4, 6, 3, 8
FLOATS = np.arange(TOKENS * EMBED, dtype=np.float32).reshape(1, TOKENS, EMBED)
SUCCESS, FAIL, MODEL_INVALID, CTX_INVALID, INPUT_INVALID, OUTPUT_INVALID = 0, -1, -6, -7, -8, -9


class Attr(c.Structure):
    """``rknn_tensor_attr``, 376 bytes."""

    _fields_ = (
        ("index", c.c_uint32), ("n_dims", c.c_uint32), ("dims", c.c_uint32 * 16),
        ("name", c.c_char * 256), ("n_elems", c.c_uint32), ("size", c.c_uint32),
        ("fmt", c.c_uint32), ("type", c.c_uint32), ("rest", c.c_uint8 * 32),
    )  # fmt: skip


class Input(c.Structure):
    """``rknn_input``, 32 bytes."""

    _fields_ = (
        ("index", c.c_uint32), ("buf", c.c_void_p), ("size", c.c_uint32),
        ("pass_through", c.c_uint8), ("type", c.c_uint32), ("fmt", c.c_uint32),
    )  # fmt: skip


class Output(c.Structure):
    """``rknn_output``, 24 bytes."""

    _fields_ = (
        ("want_float", c.c_uint8), ("is_prealloc", c.c_uint8), ("index", c.c_uint32),
        ("buf", c.c_void_p), ("size", c.c_uint32),
    )  # fmt: skip


def serve(server: socket.socket, seen: list[bytes]) -> None:
    """Answer as ``toolkit.py`` does, for a model file that says ``the model``."""
    while True:
        try:
            peer, _ = server.accept()
        except OSError:
            return
        with peer, peer.makefile("rb") as file:
            while line := file.readline():
                what, size = line.split()
                data = file.read(int(size))
                if what == b"run":
                    seen.append(data)
                    peer.sendall(b"0\n" + FLOATS.tobytes())
                elif data == b"the model":
                    peer.sendall(
                        f"0 1 1\npixels 1 {HEIGHT} {WIDTH} 3\nrows 1 {TOKENS} {EMBED}\n".encode()
                    )
                else:
                    peer.sendall(b"-6\n")


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    monkeypatch.setenv("EMULATED_RKNN", str(tmp_path / "npu.sock"))
    found: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "npu.sock"))
        server.listen()
        thread = threading.Thread(target=serve, args=(server, found))
        thread.start()
        yield found
        server.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def stand_in() -> Path:
    """Return the stand-in, compiled for this machine."""
    return compiler.program(
        "librknnrt", (build.HERE / "librknnrt.cpp").read_text(), ["-shared", "-pthread"]
    )


@pytest.fixture
def rknn(seen: list[bytes]) -> Any:
    dll = c.CDLL(str(stand_in()))
    dll.rknn_init.argtypes = [c.POINTER(c.c_uint64), c.c_char_p, c.c_uint32, c.c_uint32, c.c_void_p]
    for name in ("rknn_query", "rknn_inputs_set", "rknn_run", "rknn_outputs_get", "rknn_destroy",
                 "rknn_outputs_release", "rknn_set_core_mask"):  # fmt: skip
        getattr(dll, name).argtypes = None
    return dll


def opened(rknn: Any) -> Any:
    context = c.c_uint64()
    assert rknn.rknn_init(c.byref(context), b"the model", 9, 0, None) == SUCCESS
    return context


def given(pixels: np.ndarray[Any, Any], **changes: int) -> Any:
    values = {"index": 0, "buf": pixels.ctypes.data, "size": pixels.nbytes, "pass_through": 0,
              "type": 3, "fmt": 1}  # fmt: skip
    return Input(**(values | changes))


def test_a_picture_goes_through(rknn: Any, seen: list[bytes]) -> None:
    context = opened(rknn)
    assert rknn.rknn_set_core_mask(context, 7) == SUCCESS
    assert rknn.rknn_set_core_mask(context, 6) != SUCCESS
    attr = Attr(index=0)
    assert rknn.rknn_query(context, 1, c.byref(attr), c.sizeof(attr)) == SUCCESS
    assert (attr.name, list(attr.dims[:4]), attr.n_elems) == (b"pixels", [1, 4, 6, 3], 72)
    assert attr.fmt == 1
    attr = Attr(index=0)
    assert rknn.rknn_query(context, 2, c.byref(attr), c.sizeof(attr)) == SUCCESS
    assert (attr.n_dims, attr.n_elems) == (3, TOKENS * EMBED)
    assert rknn.rknn_query(context, 13, c.byref(attr), c.sizeof(attr)) == MODEL_INVALID
    pixels = np.arange(HEIGHT * WIDTH * 3, dtype=np.uint8)
    assert rknn.rknn_inputs_set(context, 1, c.byref(given(pixels))) == SUCCESS
    output = Output(want_float=1, is_prealloc=0, index=0)
    assert rknn.rknn_outputs_get(context, 1, c.byref(output), None) == OUTPUT_INVALID  # no run yet
    assert rknn.rknn_run(context, None) == SUCCESS
    assert rknn.rknn_outputs_get(context, 1, c.byref(output), None) == SUCCESS
    assert output.size == FLOATS.nbytes
    assert c.string_at(output.buf, output.size) == FLOATS.tobytes()
    assert rknn.rknn_outputs_release(context, 1, c.byref(output)) == SUCCESS
    assert seen == [pixels.tobytes()]
    assert rknn.rknn_destroy(context) == SUCCESS
    assert rknn.rknn_run(context, None) == CTX_INVALID


def test_it_is_no_laxer_than_the_header(rknn: Any, seen: list[bytes]) -> None:
    context = c.c_uint64()
    assert rknn.rknn_init(c.byref(context), b"another", 7, 0, None) == MODEL_INVALID
    context = opened(rknn)
    pixels = np.zeros(HEIGHT * WIDTH * 3, np.uint8)
    for wrong in ({"type": 0}, {"fmt": 0}, {"size": 71}, {"pass_through": 1}, {"index": 1}):
        assert rknn.rknn_inputs_set(context, 1, c.byref(given(pixels, **wrong))) == INPUT_INVALID
    assert rknn.rknn_inputs_set(context, 2, c.byref(given(pixels))) == INPUT_INVALID
    assert rknn.rknn_run(context, None) == INPUT_INVALID
    assert rknn.rknn_inputs_set(context, 1, c.byref(given(pixels))) == SUCCESS
    assert rknn.rknn_run(context, None) == SUCCESS
    halves = Output(want_float=0, index=0)
    assert rknn.rknn_outputs_get(context, 1, c.byref(halves), None) == OUTPUT_INVALID
    assert rknn.rknn_destroy(context) == SUCCESS
    assert len(seen) == 1


def test_without_its_other_half(rknn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMULATED_RKNN", "/nowhere")
    context = c.c_uint64()
    assert rknn.rknn_init(c.byref(context), b"the model", 9, 0, None) == FAIL


def test_doctor_can_tell_its_version() -> None:
    assert libraries.version_of(stand_in(), libraries.RKNN) == "2.5.0"


def test_what_is_missing_is_said_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = build.Workshop(tmp_path, lambda _line: None)
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build.sys, "version_info", (3, 11, 0))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(build.BoardError, match="needs root"):
        shop.check()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BoardError, match=r"Missing: qemu-user-static, .*\n  apt-get install"):
        shop.check()
    monkeypatch.setattr(build.shutil, "which", lambda _name: "/bin/true")
    monkeypatch.setattr(build, "BINFMT", tmp_path)
    with pytest.raises(build.BoardError, match="update-binfmts --enable qemu-aarch64"):
        shop.check()
    (tmp_path / "qemu-aarch64").write_text("enabled\ninterpreter /usr/bin/qemu\nflags: POCF\n")
    shop.check()
    (tmp_path / "qemu-aarch64").write_text("enabled\ninterpreter /usr/bin/qemu\nflags: \n")
    with pytest.raises(build.BoardError, match="update-binfmts"):
        shop.check()
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    with pytest.raises(build.BoardError, match="needs x86-64"):
        shop.check()


def test_a_step_is_done_once(tmp_path: Path) -> None:
    lines: list[str] = []
    shop, done = build.Workshop(tmp_path, lines.append), []
    for content in ("a", "a", "b"):
        shop.once("step", "the step", content, lambda: done.append(1))
    assert len(done) == 2
    assert [line.split()[0] for line in lines].count("old") == 1
    with pytest.raises(build.BoardError, match="false ended with 1"):
        shop.run("false")


def test_the_disk_that_it_takes_is_told_by_part(tmp_path: Path) -> None:
    shop = build.Workshop(tmp_path / "board", lambda _line: None)
    outside = tmp_path / "outside"
    outside.mkdir()
    files = {
        outside / "large": 9_000_000,
        shop.folder / "toolkit" / "lib" / "python3.11" / "site-packages" / "torch" / "a": 7_000_000,
        shop.folder
        / "toolkit"
        / "lib"
        / "python3.11"
        / "site-packages"
        / "nvidia"
        / "b": 6_000_000,
        shop.folder / "toolkit" / "lib" / "python3.11" / "site-packages" / "numpy" / "c": 8_000_000,
        shop.root / "var" / "cache" / "apt" / "archives" / "d.deb": 500_000,
        shop.root / "usr" / "e": 2_000_000,
        shop.log: 300_000,
    }
    for path, size in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(size))
    (shop.root / "usr" / "again").hardlink_to(shop.root / "usr" / "e")
    (shop.root / "elsewhere").symlink_to(outside)
    sizes = shop.sizes()
    expected = {
        "in all": 23_800_000, "torch": 13_000_000, "toolkit": 8_000_000, "root": 2_000_000,
        "packages": 500_000,
    }  # fmt: skip
    assert list(sizes) == list(expected)
    # Blocks and the folders themselves come on top.
    for name, size in expected.items():
        assert size <= sizes[name] < size + 120_000, name
    assert cli.told(sizes) == "disk: in all 0.02 GB: torch 0.01 GB, toolkit 0.01 GB"


def test_nothing_built_takes_nothing(tmp_path: Path) -> None:
    shop = build.Workshop(tmp_path / "board", lambda _line: None)
    assert set(shop.sizes()) == {"in all"}
    assert build.disk_bytes(tmp_path / "nothing") == 0


def test_help_needs_nothing() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "emulated_board", "--help"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "--set-up" in done.stdout
