"""Reading below one root folder, ELF files, and users of a recorded tree."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rkvlmd.board import elf, service
from rkvlmd.board.root import RECORD, Here, Node, Root, open_root
from tests.fakes.boards.maker import ARM, Board, library
from tests.fakes.boards.trees import RENDER, VIDEO, rk3588


def tree(folder: Path, **files: str) -> Root:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return Root(folder)


def test_links_stay_below_the_root(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("outside")
    top = tmp_path / "top"
    root = tree(top, **{"sys/base/compatible": "inside", "outside": "inside"})
    os.symlink("/sys/base", top / "proc")
    os.symlink("../../../../outside", top / "up")
    os.symlink(tmp_path / "outside", top / "absolute")
    assert root.text("/proc/compatible") == "inside"
    assert root.text("/up") == "inside"
    assert root.text("/absolute") is None
    assert root.text("/../../outside") == "inside"


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    os.symlink("b", tmp_path / "a")
    os.symlink("a", tmp_path / "b")
    root = Root(tmp_path)
    assert root.text("/a") is None
    assert not root.exists("/a/x")
    assert root.link("/a") == "b"


def test_what_is_no_file_has_no_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    root = tree(tmp_path, **{"folder/file": "x"})
    assert root.text("/pipe") is None  # and does not wait for a writer
    assert root.text("/folder") is None
    assert root.text("/missing") is None
    assert root.names("/folder/file") == []


def test_reads_are_bounded(tmp_path: Path) -> None:
    root = tree(tmp_path, long="x" * 100, **{f"many/{i}": "" for i in range(20)})
    assert root.text("/long", 10) == "x" * 10
    assert len(root.names("/many", 5)) == 5


@pytest.mark.parametrize(
    ("text", "value"), [("12\n", 12), ("-3", -3), ("", None), ("max", None), ("1" * 30, None)]
)
def test_numbers(tmp_path: Path, text: str, value: int | None) -> None:
    assert tree(tmp_path, file=text).number("/file") == value


@pytest.mark.parametrize(
    ("uid", "gids", "mode", "opens"),
    [
        (0, {0}, 0o000, True),
        (7, {9}, 0o600, True),
        (7, {5}, 0o460, False),  # the owner's bits count, not the group's
        (8, {5}, 0o660, True),
        (8, {5}, 0o640, False),
        (8, {9}, 0o660, False),
        (8, {9}, 0o666, True),
    ],
)
def test_who_opens_a_node(uid: int, gids: set[int], mode: int, opens: bool) -> None:
    node = Node("/dev/x", device=True, mode=mode, uid=7, gid=5)
    assert node.opens_for(uid, frozenset(gids)) is opens


def test_a_recorded_tree_says_who_asked(tmp_path: Path) -> None:
    root, here = open_root(rk3588().write(tmp_path))
    assert (here.user, here.machine, here.python) == ("user", "aarch64", (3, 11))
    assert root.names("/dev/dri") == ["by-path", "card0", "card1", "renderD129"]
    node = root.node("/dev/dri/renderD129")
    assert node is not None
    assert (node.gid, node.mode, node.device) == (RENDER, 0o660, True)


def test_another_folder_is_looked_at_by_this_process(tmp_path: Path) -> None:
    root, here = open_root(tmp_path)
    assert here == Here.now()
    assert here.uid == os.geteuid()
    assert not root.live


@pytest.mark.parametrize("text", ["{", "[]", '{"here": {}}', json.dumps({"nodes": {"/x": 1}})])
def test_a_bad_record_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(ValueError, match=r"recorded\.json"):
        open_root(tmp_path)


# --- ELF ---------------------------------------------------------------------------------


def test_elf_says_machine_and_needs(tmp_path: Path) -> None:
    file = tmp_path / "lib.so"
    file.write_bytes(library("text", needed=["libomp.so", "libc.so.6"]))
    assert elf.read(file) == elf.Elf("aarch64", ("libomp.so", "libc.so.6"))
    file.write_bytes(library("text", ARM))
    assert elf.read(file) == elf.Elf("armv7l")


def test_elf_of_this_python() -> None:
    own = elf.read(Path("/proc/self/exe"))
    assert own is not None
    assert own.machine == os.uname().machine
    assert own.needed == () or any(name.startswith("libc.") for name in own.needed)


def test_elf_cut_anywhere_is_no_exception(tmp_path: Path) -> None:
    whole = library("text", needed=["libomp.so"])[:600]
    file = tmp_path / "lib.so"
    for size in range(0, 400, 3):
        file.write_bytes(whole[:size])
        found = elf.read(file)
        assert found is None or found.machine == "aarch64"
    assert elf.read(tmp_path / "missing") is None
    assert elf.read(tmp_path) is None


# --- users and the service ----------------------------------------------------------------


def bare() -> Board:
    return Board(
        here={
            "user": "me", "uid": 1000, "gids": [1000], "machine": "aarch64", "python": [3, 11],
            "folders": [], "library_path": [],
        }
    )  # fmt: skip


def test_without_a_unit_the_daemon_is_the_one_who_asks(tmp_path: Path) -> None:
    found = service.read(*open_root(bare().write(tmp_path)))
    assert (found.installed, found.daemon.name, found.descriptors) == (False, "me", None)


def test_the_unit_and_its_drop_ins(tmp_path: Path) -> None:
    board = bare()
    board.files |= {
        "/usr/lib/systemd/system/rkvlmd.service": "[Service]\n# User=x\nUser=a\nLimitNOFILE=9:10\n",
        "/etc/systemd/system/rkvlmd.service.d/a.conf": "[Service]\nUser=b\n",
        "/etc/systemd/system/rkvlmd.service.d/b.conf": "SupplementaryGroups=video\n",
        "/etc/systemd/system/rkvlmd.service.d/ignored": "User=c\n",
        "/etc/passwd": "b:x:5:6::/:/bin/sh\nbroken\n",
        "/etc/group": f"render:x:{RENDER}:a,b\nvideo:x:{VIDEO}:\nbroken:x\n",
    }
    found = service.read(*open_root(board.write(tmp_path)))
    assert found.installed
    assert found.descriptors == 9
    assert found.daemon == service.Person("b", 5, frozenset({6, RENDER, VIDEO}))


def test_a_unit_without_user_is_root(tmp_path: Path) -> None:
    board = bare()
    board.files["/etc/systemd/system/rkvlmd.service"] = "[Service]\nLimitNOFILE=infinity\n"
    found = service.read(*open_root(board.write(tmp_path)))
    assert found.daemon.uid == 0
    assert found.descriptors == 1 << 30
