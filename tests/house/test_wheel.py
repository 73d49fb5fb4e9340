"""What is in the wheel and in the source archive."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from rkvlmd import __version__
from tests.house.tree import PACKAGE, ROOT

#: The demo model may take this much of the wheel, bytes.
DEMO_BYTES = 12_000_000
#: All else in it, bytes.
REST_BYTES = 2_000_000

pytestmark = pytest.mark.process


def build(target: str, folder: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    path = build("wheel", tmp_path_factory.mktemp("wheel"))
    assert path.name == f"rkvlmd-{__version__}-py3-none-any.whl"
    return zipfile.ZipFile(path)


def test_the_wheel_has_the_package_and_its_data(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {"rkvlmd/etc/rkvlmd.toml", "rkvlmd/data/rkvlm.schema.json", "rkvlmd/daemon.py"} <= names
    here = {
        str(p.relative_to(ROOT))
        for p in PACKAGE.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert here <= names
    catalogue = {f"rkvlmd/etc/models.d/{p.name}" for p in (ROOT / "etc" / "models.d").iterdir()}
    assert catalogue <= names
    info = f"rkvlmd-{__version__}.dist-info"
    assert f"{info}/licenses/LICENSE" in names
    assert {n.split("/")[0] for n in names} == {"rkvlmd", info}
    assert wheel.read("rkvlmd/etc/rkvlmd.toml") == (ROOT / "etc/rkvlmd.toml").read_bytes()


def test_the_catalogue_is_found_in_an_installed_wheel(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    wheel.extractall(tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "rkvlmd.ctl", "--json", "show", "--models", str(tmp_path)],
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"},
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    listed = {row["model"] for row in json.loads(done.stdout)["models"]}
    assert listed == {p.stem for p in (ROOT / "etc" / "models.d").iterdir()}


def test_the_wheel_is_small(wheel: zipfile.ZipFile) -> None:
    demo = rest = 0
    for info in wheel.infolist():
        if info.filename.startswith("rkvlmd/demo_model/"):
            demo += info.compress_size
        else:
            rest += info.compress_size
    assert demo <= DEMO_BYTES
    assert rest <= REST_BYTES


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    info = f"rkvlmd-{__version__}.dist-info"
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    for extra in ("cpu", "npu", "test"):
        assert f"Provides-Extra: {extra}" in metadata
    scripts = wheel.read(f"{info}/entry_points.txt").decode()
    assert "rkvlmd = rkvlmd.__main__:main" in scripts
    assert "rkvlmctl = rkvlmd.ctl.__main__:main" in scripts


def test_the_source_archive_has_what_a_build_needs(tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "etc/rkvlmd.toml"}
    assert needed | {"rkvlmd/__init__.py", "tests/conftest.py", "tools/check"} <= names
    tops = {name.split("/")[0] for name in names}
    assert tops <= {
        "pyproject.toml", "PKG-INFO", "README.md", "LICENSE", "CHANGELOG.md", ".gitignore",
        "etc", "rkvlmd", "systemd", "tests", "tools",
    }  # fmt: skip
