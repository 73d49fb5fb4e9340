"""Versions and copies of the vendor's libraries, and the Python packages."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rkvlmd.board import libraries, toolkit
from rkvlmd.board.finding import Finding, Needs
from rkvlmd.board.libraries import RKLLM, RKNN, version_of, versions_of
from rkvlmd.board.root import open_root
from rkvlmd.engine import rkllm_abi
from tests.fakes.boards.maker import ARM, Board, rkllm, rknnrt

NEED = Needs(frozenset({"rknn", "rkllm"}), board=True)
SPARE = Needs(frozenset(), board=True)
PC = Needs(frozenset(), board=False)
FOLDER = "/venv/site-packages"


@pytest.fixture
def board() -> Board:
    return Board(
        here={
            "user": "me", "uid": 1000, "gids": [1000], "machine": "aarch64", "python": [3, 11],
            "folders": [FOLDER], "library_path": ["/opt/mine"],
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("RKLLM SDK (version: 1.2.0 | target: Linux | build: f8ca3ae8 2025-04-08)", "1.2.0"),
        ("RKLLM SDK (version: 1.2.1b1 | target", "1.2.1b1"),
        ("RKLLM SDK (version:1.3.10)", "1.3.10"),
        ("rknn llm lib version: 0.9.1 (x)", "0.9.1"),
        ("RKLLM SDK (version: next)", None),
        ("RKLLM SDK (version: 1.2.3 | RKLLM SDK (version: 1.3.0 |", None),
        ("librknnrt version: 2.3.2 (429f97ae6b@2025-04-09T09:09:27)", None),
    ],
)
def test_version_of(tmp_path: Path, text: str, version: str | None) -> None:
    file = tmp_path / "lib.so"
    file.write_bytes(b"\0\xff" * 50 + text.encode() + bytes(9))
    assert version_of(file) == version


def test_version_of_librknnrt(tmp_path: Path) -> None:
    file = tmp_path / "lib.so"
    file.write_bytes(rknnrt("2.3.2"))
    assert version_of(file, RKNN) == "2.3.2"
    assert version_of(tmp_path / "missing", RKNN) is None
    with pytest.raises(FileNotFoundError):
        versions_of(tmp_path / "missing")


def test_version_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the chunks part the string, the version is whole."""
    monkeypatch.setattr(libraries, "_CHUNK", 256)
    text = b"RKLLM SDK (version: 1.2.1b1 | target: Linux)"
    file = tmp_path / "lib.so"
    for place in range(180, 270):
        file.write_bytes(bytes(place) + text + bytes(300))
        assert versions_of(file) == {"1.2.1b1"}
    file.write_bytes(bytes(220) + b"RKLLM SDK (version: 1.2.1")
    assert versions_of(file) == {"1.2.1"}


def test_the_table_of_versions_is_the_engine_s() -> None:
    assert tuple(rkllm_abi.VERSIONS) == libraries.RKLLM_VERSIONS


# --- which copy --------------------------------------------------------------------------


def lines_of(
    board: Board, folder: Path, needs: Needs = NEED, setting: str = "", layout: str = ""
) -> list[Finding]:
    root, here = open_root(board.write(folder))
    found = libraries.copies(root, RKLLM, here, setting)
    return libraries.findings(RKLLM, found, here, needs, setting, layout)


def test_the_first_of_the_search_is_used(board: Board, tmp_path: Path) -> None:
    board.files |= {
        "/usr/lib/librkllmrt.so": rkllm("1.2.3"),
        "/opt/mine/librkllmrt.so": rkllm("1.3.0"),
    }
    used, other = lines_of(board, tmp_path)
    assert (used.status, used.facts["path"]) == ("ok", "/opt/mine/librkllmrt.so")
    assert used.facts["version"] == "1.3.0"
    assert (other.id, other.status) == ("librkllmrt.copies", "warn")
    assert "1.2.3 in /usr/lib/librkllmrt.so" in other.says


def test_one_file_under_two_names_is_one_copy(board: Board, tmp_path: Path) -> None:
    board.files["/usr/lib/librkllmrt.so"] = rkllm("1.3.1")
    board.links |= {"/lib": "usr/lib", "/usr/lib64": "/usr/lib"}
    (used,) = lines_of(board, tmp_path)
    assert [copy["path"] for copy in used.facts["copies"]] == ["/usr/lib/librkllmrt.so"]


def test_the_setting_alone_counts(board: Board, tmp_path: Path) -> None:
    board.files |= {
        "/usr/lib/librkllmrt.so": rkllm("1.3.0"),
        "/data/rk.so": rkllm("1.3.0"),
    }
    (used,) = lines_of(board, tmp_path / "a", setting="/data/rk.so")
    assert (used.status, used.facts["path"]) == ("ok", "/data/rk.so")
    (used,) = lines_of(board, tmp_path / "b", setting="/data/none.so")
    assert (used.status, used.facts["path"]) == ("stop", None)
    assert used.says.startswith("npu.library: there is no file /data/none.so, and no folder")


def test_a_folder_of_several_versions(board: Board, tmp_path: Path) -> None:
    board.files |= {
        "/usr/lib/librkllmrt.so": rkllm("1.2.1"),
        "/data/rk/librkllmrt-1.2.3.so": rkllm("1.2.3"),
        "/data/rk/librkllmrt-1.3.0.so": rkllm("1.3.0"),
        "/data/rk/other.so": rkllm("1.3.1"),
    }
    new, old, elsewhere = lines_of(board, tmp_path / "a", setting="/data/rk/")
    assert [(line.id, line.status) for line in (new, old)] == [("librkllmrt", "ok")] * 2
    assert (new.says, old.says) == (
        "1.3.0 in /data/rk/librkllmrt-1.3.0.so",
        "1.2.3 in /data/rk/librkllmrt-1.2.3.so",
    )
    assert (elsewhere.id, elsewhere.status) == ("librkllmrt.copies", "warn")
    root, here = open_root(board.write(tmp_path / "b"))
    found = libraries.copies(root, RKLLM, here, "/data/rk")
    assert libraries.offered(found) == ("1.3.0", "1.2.3")
    # One that cannot be opened stops the engine at it.
    board.files["/data/rk/librkllmrt-1.3.1.so"] = rkllm("1.3.1", ARM)
    lines = lines_of(board, tmp_path / "c", setting="/data/rk")
    assert [line.status for line in lines] == ["stop", "ok", "ok", "warn"]
    (line, *_) = lines_of(board, tmp_path / "d", setting="/data")
    assert (line.status, line.facts["path"]) == ("stop", None)


@pytest.mark.parametrize(
    ("content", "status", "says"),
    [
        (rkllm("1.3.0", ARM), "stop", "built for armv7l, but this Python for aarch64"),
        (rkllm("1.1.4"), "stop", "supported are 1.2.1"),
        (rkllm("1.3.0")[:10], "stop", "no ELF library, or cut short"),
        (rkllm("none"), "stop", "does not say one version"),
        (rkllm("1.2.1"), "ok", "1.2.1 in /usr/lib"),
    ],
)
def test_what_a_file_can_be(
    board: Board, tmp_path: Path, content: bytes, status: str, says: str
) -> None:
    board.files["/usr/lib/librkllmrt.so"] = content
    (line,) = lines_of(board, tmp_path)
    assert line.status == status
    assert says in line.says
    assert bool(line.todo) == (status != "ok")


def test_layout_overrides_an_unknown_version(board: Board, tmp_path: Path) -> None:
    board.files["/usr/lib/librkllmrt.so"] = rkllm("1.4.0")
    assert lines_of(board, tmp_path / "a", layout="1.3.1")[0].status == "ok"
    (line,) = lines_of(board, tmp_path / "b", layout="9")
    assert (line.status, line.todo) == ("stop", "correct npu.layout, or remove it")


def test_a_needed_library_that_is_missing(board: Board, tmp_path: Path) -> None:
    board.files |= {
        "/usr/lib/librkllmrt.so": rkllm("1.3.0", needed=["libc.so.6", "libomp.so"]),
        "/lib/aarch64-linux-gnu/libc.so.6": "",
    }
    _, line = lines_of(board, tmp_path)
    assert line.says == "librkllmrt.so needs libomp.so, which was not found"


@pytest.mark.parametrize(
    ("needs", "statuses"), [(NEED, ["stop"]), (SPARE, ["warn"]), (PC, [])], ids=str
)
def test_how_bad_an_absent_library_is(
    board: Board, tmp_path: Path, needs: Needs, statuses: list[str]
) -> None:
    assert [line.status for line in lines_of(board, tmp_path, needs)] == statuses


def test_librknnrt_counts_in_usr_lib_alone(board: Board, tmp_path: Path) -> None:
    board.files |= {
        "/opt/mine/librknnrt.so": rknnrt("2.3.2"),
        "/usr/local/lib/librknnrt.so": rknnrt("2.3.2"),
    }
    root, here = open_root(board.write(tmp_path))
    (line,) = libraries.findings(RKNN, libraries.copies(root, RKNN, here), here, NEED)
    assert (line.status, line.engines) == ("stop", ("rknn",))
    assert line.todo == "sudo ln -s /usr/local/lib/librknnrt.so /usr/lib/librknnrt.so"
    os.makedirs(tmp_path / "usr/lib64")
    (tmp_path / "usr/lib64/librknnrt.so").write_bytes(rknnrt("2.3.2"))
    (line,) = libraries.findings(RKNN, libraries.copies(root, RKNN, here), here, NEED)
    assert (line.status, line.facts["version"]) == ("ok", "2.3.2")


# --- packages ----------------------------------------------------------------------------


def package_lines(board: Board, folder: Path, needs: Needs = NEED) -> dict[str, Finding]:
    root, here = open_root(board.write(folder))
    return {line.id: line for line in toolkit.findings(root, here, needs)}


def test_toolkit_is_there(board: Board, tmp_path: Path) -> None:
    board.files[f"{FOLDER}/rknn_toolkit_lite2-2.5.0.dist-info/METADATA"] = ""
    line = package_lines(board, tmp_path)["rknn-toolkit-lite2"]
    assert (line.status, line.facts["version"]) == ("ok", "2.5.0")


@pytest.mark.parametrize(
    ("here", "says", "todo"),
    [
        ({}, "not installed", "rkvlmd[npu]"),
        ({"python": [3, 13]}, "no wheels for Python 3.13", "Python 3.12 or older"),
        ({"machine": "armv7l"}, "this is armv7l", "64-bit system"),
    ],
)
def test_why_the_toolkit_is_not_there(
    board: Board, tmp_path: Path, here: dict[str, object], says: str, todo: str
) -> None:
    board.here |= here
    line = package_lines(board, tmp_path)["rknn-toolkit-lite2"]
    assert line.status == "stop"
    assert says in line.says
    assert todo in line.todo


def test_old_toolkits_want_pkg_resources(board: Board, tmp_path: Path) -> None:
    board.files[f"{FOLDER}/rknn_toolkit_lite2-2.3.2.dist-info/METADATA"] = ""
    assert package_lines(board, tmp_path / "a")["rknn-toolkit-lite2"].status == "stop"
    board.files[f"{FOLDER}/pkg_resources/__init__.py"] = ""
    assert package_lines(board, tmp_path / "b")["rknn-toolkit-lite2"].status == "ok"


def test_onnxruntime(board: Board, tmp_path: Path) -> None:
    need = Needs(frozenset({"onnx"}), board=False)
    lines = package_lines(board, tmp_path / "a", need)
    assert lines.keys() == {"onnxruntime"}
    assert lines["onnxruntime"].status == "stop"
    assert package_lines(board, tmp_path / "b", PC)["onnxruntime"].status == "note"
    board.files[f"{FOLDER}/onnxruntime-1.20.1.dist-info/METADATA"] = ""
    assert package_lines(board, tmp_path / "c", need)["onnxruntime"].facts["version"] == "1.20.1"
