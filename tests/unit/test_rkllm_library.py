"""Which ``librkllmrt.so`` a file is: read before it is opened, cross-checked after."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import pytest

from rkvlmd.engine import rkllm_library as lib
from rkvlmd.engine.rkllm_abi import V12, V130, V131, VERSIONS
from rkvlmd.errors import RkvlmdError
from tests.npusim import compiler

#: Libraries are read so much at a time.
CHUNK = 1 << 20
BANNER = b"RKLLM SDK (version: %s | target: Linux | build: f8ca3ae8 2025-04-08 ...)"


def fake(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "librkllmrt.so"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("version", ["1.2.1", "1.3.0", "1.2.1b1", "1.2.0", "10.20.30", "1.3.1b12"])
@pytest.mark.parametrize("before", [0, 1, CHUNK - 30, CHUNK - 21, CHUNK - 1, 5 << 20])
def test_the_version_is_read_from_the_bytes(tmp_path: Path, version: str, before: int) -> None:
    path = fake(tmp_path, bytes(before) + BANNER % version.encode() + bytes(1000))
    assert lib.read_version(path) == version


def test_a_version_at_the_very_end_of_a_chunk(tmp_path: Path) -> None:
    # Cut after "1.2.1": with "b1" in the next chunk it is another version.
    text = b"RKLLM SDK (version: 1.2.1"
    head = bytes(CHUNK - len(text)) + text
    assert lib.read_version(fake(tmp_path, head)) == "1.2.1"
    assert lib.read_version(fake(tmp_path, head + b"b1 |")) == "1.2.1b1"
    assert lib.read_version(fake(tmp_path, head + b"2 |")) == "1.2.12"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"nothing here", "does not say which version"),
        (b"RKLLM SDK (version: %s", "does not say which version"),
        (b"", "does not say which version"),
        (BANNER % b"1.2.3" + BANNER % b"1.3.0", "more than one version: 1.2.3, 1.3.0"),
    ],
)
def test_files_that_say_no_version(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(RkvlmdError, match=says) as caught:
        lib.read_version(fake(tmp_path, content))
    assert "npu.library" in caught.value.message
    assert str(tmp_path) not in caught.value.message


def test_a_very_old_library(tmp_path: Path) -> None:
    path = fake(tmp_path, b"rknn llm lib version: 1.0.1")
    assert lib.read_version(path) == "1.0.1"


def test_a_version_said_twice_is_one(tmp_path: Path) -> None:
    banner = BANNER % b"1.3.1"
    assert lib.read_version(fake(tmp_path, banner + bytes(3 << 20) + banner)) == "1.3.1"


def test_each_version_has_its_layout() -> None:
    assert [lib.choose(v) for v in VERSIONS] == [V12, V12, V12, V130, V131]


@pytest.mark.parametrize(
    "version", ["1.0.1", "1.2.0", "1.2.1b1", "1.3.0b1", "1.3.2", "1.4.0", "2.0.0"]
)
def test_unknown_versions_are_refused(version: str) -> None:
    with pytest.raises(RkvlmdError) as caught:
        lib.choose(version)
    text = caught.value.message
    assert f"version {version};" in text
    assert "npu.library" in text
    assert "npu.layout" in text
    assert "1.2.1, 1.2.2, 1.2.3, 1.3.0, 1.3.1" in text
    # The owner may say which layout to assume.
    assert lib.choose(version, override="1.3.1") is V131


def test_a_wrong_override_names_the_setting() -> None:
    with pytest.raises(RkvlmdError, match=r"npu\.layout: '1\.5' is none of"):
        lib.choose("1.3.0", override="1.5")


def test_where_it_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lib, "FOLDERS", (str(tmp_path / "a"), str(tmp_path / "b")))
    with pytest.raises(RkvlmdError, match=r"set npu\.library") as caught:
        lib.find("", {})
    assert str(tmp_path) not in caught.value.message
    assert str(tmp_path / "b") in capfd.readouterr().err
    for name in ("c", "b", "a"):
        (tmp_path / name).mkdir()
        found = tmp_path / name / "librkllmrt.so"
        found.touch()
        environ = {"LD_LIBRARY_PATH": f":{tmp_path / 'c'}"} if name == "c" else {}
        assert lib.find("", environ) == [found]
    assert lib.find(str(tmp_path / "b/librkllmrt.so"), {}) == [tmp_path / "b/librkllmrt.so"]
    with pytest.raises(RkvlmdError, match=r"npu\.library: the file other\.so does not exist"):
        lib.find(str(tmp_path / "other.so"), {})


def elf(machine: int) -> bytes:
    return (
        b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00" + machine.to_bytes(2, "little") + bytes(80)
    )


def test_a_library_for_another_machine(tmp_path: Path) -> None:
    ours = platform.machine()
    other, name = (62, "x86_64") if ours == "aarch64" else (183, "aarch64")
    with pytest.raises(RkvlmdError, match=f"is built for {name}, but this Python .* {ours}"):
        lib.check_machine(fake(tmp_path, elf(other)))
    with pytest.raises(RkvlmdError, match="machine 9999"):
        lib.check_machine(fake(tmp_path, elf(9999)))
    for content in (b"", b"\x7fELF", b"#!/bin/sh\n" + bytes(100)):
        with pytest.raises(RkvlmdError, match="no ELF library"):
            lib.check_machine(fake(tmp_path, content))


def test_an_elf_file_that_cannot_be_opened(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    machine = int.from_bytes(Path("/proc/self/exe").read_bytes()[18:20], "little")
    path = fake(tmp_path, elf(machine) + BANNER % b"1.3.0")
    with pytest.raises(RkvlmdError, match=r"npu\.library: librkllmrt\.so cannot be opened"):
        lib.open_library(str(path))
    assert str(path) in capfd.readouterr().err  # the loader's own words, for the owner


@pytest.mark.process
@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_opens_with_its_layout(version: str) -> None:
    opened = lib.open_library(str(compiler.library(version)))
    assert (opened.version, opened.layout) == (version, VERSIONS[version])
    param = opened.default_param()
    assert (param.top_k, param.n_keep, param.extend_param.n_batch) == (40, -1, 1)
    assert param.repeat_penalty == pytest.approx(1.1)
    assert ctypes.sizeof(param) < lib.PARAM_ROOM
    with pytest.raises(AttributeError):
        _ = opened.rkllm_unknown


@pytest.mark.process
@pytest.mark.parametrize(
    ("abi", "says", "like"),
    [("1.2.3", "1.3.0", "1.2.1, 1.2.2, 1.2.3"), ("1.3.0", "1.2.3", "1.3.0, 1.3.1")],
)
def test_a_file_that_says_another_version_than_it_is(abi: str, says: str, like: str) -> None:
    path = compiler.library(abi, says=says)
    with pytest.raises(RkvlmdError) as caught:
        lib.open_library(str(path))
    assert f"says that it is version {says}" in caught.value.message
    assert f"laid out like those of {like}" in caught.value.message
    assert "npu.layout" in caught.value.message
    assert lib.open_library(str(path), override=abi).layout is VERSIONS[abi]


@pytest.mark.process
@pytest.mark.parametrize("version", ["1.2.3", "1.3.0"])
def test_other_defaults_than_those_that_are_known(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], version: str
) -> None:
    monkeypatch.setenv("NPUSIM_DEFAULTS", "other")
    path = compiler.library(version)
    with pytest.raises(RkvlmdError, match=r"none that is known; npu\.layout can name"):
        lib.open_library(str(path))
    # The owner has the last word: nobody else can know better.
    assert lib.open_library(str(path), override=version).layout is VERSIONS[version]
    assert "fit none" in capfd.readouterr().err


@pytest.mark.process
def test_a_folder_of_several_versions(tmp_path: Path) -> None:
    for version in ("1.2.3", "1.3.0", "1.3.1"):
        (tmp_path / f"librkllmrt-{version}.so").symlink_to(compiler.library(version))
    for wanted, version in (
        (["1.2"], "1.2.3"), (["1.3.0"], "1.3.0"), ([], "1.3.1"), (["1.2", "1.3"], "1.3.1"),
    ):  # fmt: skip
        assert lib.open_library(str(tmp_path), wanted=wanted).version == version
    with pytest.raises(RkvlmdError) as caught:
        lib.open_library(str(tmp_path), wanted=["1.4"])
    assert "works with 1.4, but librkllmrt-1.3.1.so is 1.3.1, " in caught.value.message
    (tmp_path / "empty").mkdir()
    with pytest.raises(RkvlmdError, match="no library in the folder empty"):
        lib.open_library(str(tmp_path / "empty"))


@pytest.mark.process
def test_a_beta_is_refused_before_it_is_opened() -> None:
    path = compiler.library("1.2.1", says="1.2.1b1")
    with pytest.raises(RkvlmdError, match=r"is version 1\.2\.1b1; supported are"):
        lib.open_library(str(path))
    assert path.name not in Path("/proc/self/maps").read_text()


@pytest.mark.process
def test_a_library_that_lacks_functions(tmp_path: Path) -> None:
    source = 'extern "C" const char banner[] = "RKLLM SDK (version: 1.3.0 |"; int main() {}'
    path = compiler.program("not-rkllm", source, ["-shared"])
    with pytest.raises(RkvlmdError, match=r"lacks rkllm_createDefaultParam, rkllm_init"):
        lib.open_library(str(path))
