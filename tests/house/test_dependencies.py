"""What is imported is declared, and what is declared is imported."""

from __future__ import annotations

import re
import sys
import tomllib

from tests.house.tree import ROOT, imports, python_files

#: Where a distribution has another name than what it is imported as.
IMPORTED_AS = {
    "pillow": "PIL",
    "rknn-toolkit-lite2": "rknnlite",
    "pytest-trio": "pytest",
    "opencv-python-headless": "cv2",
}
#: Programs that are run and never imported.
RUN = {"ruff", "mypy", "hatchling", "ziglang"}
#: What tools/bench prints beside its own figures where somebody has installed it, and what
#: tools/emulated/toolkit.py finds in the environment that tools/emulated_board makes for it.
BESIDE = {"onnxruntime_genai", "llama_cpp", "gguf", "rknn"}

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared(requirements: list[str]) -> set[str]:
    names = {re.split(r"[\s\[<>=;!~]", requirement)[0] for requirement in requirements}
    return {IMPORTED_AS.get(name, name) for name in names} - {"rkvlmd"}


BASE = declared(PROJECT["dependencies"])
EXTRAS = {name: declared(value) for name, value in PROJECT["optional-dependencies"].items()}


def imported(*folders: str) -> set[str]:
    tops = {dotted.split(".")[0] for p in python_files(*folders) for _, dotted in imports(p)}
    local = {p.parts[-2] for p in python_files(*folders)} | {p.stem for p in python_files(*folders)}
    return tops - set(sys.stdlib_module_names) - {"rkvlmd", "tests", "tools"} - local


def test_the_package_imports_what_it_declares() -> None:
    found = imported("rkvlmd")
    offered = BASE | EXTRAS["cpu"] | EXTRAS["npu"] | EXTRAS["video"]
    assert found == offered


def test_tests_and_tools_import_what_the_extra_declares() -> None:
    found = imported("tests", "tools") - BESIDE
    assert found <= BASE | EXTRAS["cpu"] | EXTRAS["video"] | EXTRAS["test"]
    assert EXTRAS["test"] - RUN <= found | BASE


def test_the_npu_s_package_is_asked_for_where_there_is_one() -> None:
    # rknn-toolkit-lite2 has wheels for aarch64, up to Python 3.12.
    (requirement,) = PROJECT["optional-dependencies"]["npu"]
    _, _, marker = requirement.partition(";")
    wanted = {"platform_machine == 'aarch64'", "python_version < '3.13'"}
    assert {part.strip() for part in marker.split(" and ")} == wanted
