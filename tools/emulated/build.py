"""Builds the emulated board, each part once: toolkit, userland, wheels, libraries, model."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.npusim import models

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
DEMO = REPOSITORY / "rkvlmd" / "demo_model"

#: Debian packages of this machine, and a program of each.
PACKAGES = {
    "qemu-user-static": "qemu-aarch64-static",
    "binfmt-support": "update-binfmts",
    "debootstrap": "debootstrap",
    "g++-aarch64-linux-gnu": "aarch64-linux-gnu-g++",
    "libc6-dev-arm64-cross": "",
}
BINFMT = Path("/proc/sys/fs/binfmt_misc")
SUITE, PYTHON = "bookworm", "3.11"
LITE, TOOLKIT = "rknn-toolkit-lite2==2.5.0", "rknn-toolkit2==2.5.0"
#: What rknn-toolkit2 2.5.0 was seen to run with; its own pins would bring several GB of CUDA.
#: setuptools comes last: from 81 on it lacks pkg_resources.
TOOLKIT_NEEDS = (
    ("numpy==1.26.4", "onnx==1.18.0", "protobuf==4.25.4", "onnxruntime", "psutil", "ruamel.yaml",
     "scipy", "tqdm", "opencv-python-headless<4.12", "fast-histogram", "pillow"),
    ("--no-deps", TOOLKIT),
    ("torch==2.13.0",),
    ("setuptools<81",),
)  # fmt: skip
PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_17_aarch64", "manylinux_2_28_aarch64")
CROSS = "aarch64-linux-gnu-g++"
#: No library of the board's own is needed for C++.
STATIC = ("-static-libstdc++", "-static-libgcc")


class BoardError(Exception):
    """What is missing or failed, with what to do."""


class Workshop:
    """The folder in which a board is built; ``say`` prints a line."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.root = folder / "root"
        self.log = folder / "log"
        folder.mkdir(parents=True, exist_ok=True)

    # --- running --------------------------------------------------------------------------

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Time one step and say what it is."""
        begin = time.monotonic()
        yield
        self.say(f"{time.monotonic() - begin:7.1f} s  {what}")

    def run(self, *command: str | Path, env: dict[str, str] | None = None) -> None:
        """Run a command; its output goes to the log.

        Raises:
          BoardError: it failed, with the end of what it printed.

        """
        with self.log.open("ab") as log:
            done = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=env, check=False
            )
        if done.returncode != 0:
            tail = self.log.read_text(errors="replace")[-2000:]
            raise BoardError(f"{command[0]} ended with {done.returncode}; {self.log} ends:\n{tail}")

    def once(self, name: str, what: str, content: str, make: Callable[[], None]) -> None:
        """Do a step unless it was done before with the same content."""
        stamp = self.folder / f"{name}.done"
        digest = hashlib.sha256(content.encode()).hexdigest()
        if stamp.is_file() and stamp.read_text() == digest:
            self.say(f"      old  {what}")
            return
        with self.step(what):
            make()
        stamp.write_text(digest)

    # --- this machine ---------------------------------------------------------------------

    def check(self) -> None:
        """Check what this machine must have.

        Raises:
          BoardError: with the commands that would bring it.

        """
        if platform.machine() != "x86_64" or not (3, 10) <= sys.version_info[:2] <= (3, 12):
            raise BoardError("rknn-toolkit2 needs x86-64 and Python 3.10 to 3.12.")
        if os.geteuid() != 0:
            raise BoardError("Building and entering the board needs root: mounts and chroot.")
        missing = [p for p, program in PACKAGES.items() if program and not shutil.which(program)]
        if missing:
            names = " ".join(PACKAGES)
            raise BoardError(
                f"Missing: {', '.join(missing)}. --set-up installs what is needed, or:\n"
                f"  apt-get install --no-install-recommends {names}"
            )
        if not self._registered():
            raise BoardError(
                "The kernel does not start aarch64 programs with qemu. --set-up does that, or:\n"
                f"  mount -t binfmt_misc binfmt_misc {BINFMT}\n"
                "  update-binfmts --enable qemu-aarch64"
            )

    @staticmethod
    def _registered() -> bool:
        entry = BINFMT / "qemu-aarch64"
        # F: the interpreter is opened now, so that it is found from inside another root.
        return entry.is_file() and "flags: " in (text := entry.read_text()) and "F" in (
            text.split("flags: ")[1].splitlines()[0]
        )  # fmt: skip

    def set_up(self) -> None:
        """Install the Debian packages and register qemu: changes this machine."""
        with self.step(f"apt-get install {' '.join(PACKAGES)}"):
            quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            self.run("apt-get", "update", env=quiet)
            self.run(
                "apt-get", "install", "-y", "--no-install-recommends", *PACKAGES, env=quiet
            )  # fmt: skip
        if not (BINFMT / "register").exists():
            self.run("mount", "-t", "binfmt_misc", "binfmt_misc", BINFMT)
        if not self._registered():
            self.run("update-binfmts", "--enable", "qemu-aarch64")

    # --- parts ----------------------------------------------------------------------------

    def toolkit(self) -> Path:
        """Return a Python with rknn-toolkit2, in an environment of its own."""
        where = self.folder / "toolkit"

        def make() -> None:
            shutil.rmtree(where, ignore_errors=True)
            self.run(sys.executable, "-m", "venv", where)
            for packages in TOOLKIT_NEEDS:
                self.run(where / "bin" / "pip", "install", "--quiet", *packages)

        self.once("toolkit", f"{TOOLKIT} on this machine", repr(TOOLKIT_NEEDS), make)
        return where / "bin" / "python"

    def userland(self, mirror: str) -> None:
        """Unpack a Debian for arm64; nothing of it is run."""

        def make() -> None:
            shutil.rmtree(self.root, ignore_errors=True)
            self.run(
                "debootstrap", "--foreign", "--arch=arm64", "--variant=minbase",
                "--include=python3", SUITE, self.root, *([mirror] if mirror else []),
            )  # fmt: skip
            # In some containers debootstrap makes links into the machine's own folders of them.
            for name in ("proc", "dev", "sys"):
                if (self.root / name).is_symlink():
                    (self.root / name).unlink()
                (self.root / name).mkdir(exist_ok=True)
            for package in sorted((self.root / "var/cache/apt/archives").glob("*.deb")):
                with subprocess.Popen(
                    ["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE
                ) as unpacked:
                    subprocess.run(
                        ["tar", "-x", "--keep-directory-symlink", "-C", self.root],
                        stdin=unpacked.stdout, check=True,
                    )  # fmt: skip

        self.once("userland", f"Debian {SUITE} for arm64", f"{SUITE} python3 3", make)

    def wheels(self) -> None:
        """Install what the daemon needs on a board, and the daemon itself."""
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
        needs = [LITE, "setuptools<81", *project["dependencies"]]
        site = self.root / "site"

        def make() -> None:
            shutil.rmtree(site, ignore_errors=True)
            platforms = [part for name in PLATFORMS for part in ("--platform", name)]
            self.run(
                sys.executable, "-m", "pip", "install", "--quiet", *platforms,
                "--implementation", "cp", "--python-version", PYTHON, "--only-binary=:all:",
                "--target", site, *needs,
            )  # fmt: skip

        self.once("wheels", f"{LITE} and the daemon's wheels for aarch64", repr(needs), make)
        with self.step("the daemon, from this repository"):
            shutil.rmtree(site / "rkvlmd", ignore_errors=True)
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPOSITORY / "rkvlmd", site / "rkvlmd", ignore=ignore)
            shutil.copytree(REPOSITORY / "etc", site / "rkvlmd" / "etc", ignore=ignore)

    def libraries(self) -> None:
        """Compile both libraries for aarch64 and put them where a board has them."""
        with self.step("librknnrt.so (stand-in) and librkllmrt.so (simulated) for aarch64"):
            lib = self.root / "usr" / "lib"
            self.run(
                CROSS, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared",
                "-fvisibility=hidden", *STATIC, "-o", lib / "librknnrt.so", HERE / "librknnrt.cpp",
            )  # fmt: skip
            built = subprocess.run(
                [sys.executable, "-c",
                 "from tests.npusim import compiler; print(compiler.library('1.3.0'))"],
                env={**os.environ, "CXX": " ".join((CROSS, *STATIC))},
                cwd=REPOSITORY, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if built.returncode != 0:
                raise BoardError(built.stderr[-2000:])
            shutil.copy(built.stdout.strip(), lib / "librkllmrt.so")

    def sizes(self) -> dict[str, int]:
        """Return the bytes on disk of all that was built, largest first, after ``in all``.

        ``torch`` with the libraries of CUDA that an index may add is told apart from ``toolkit``,
        ``packages``, the Debian packages as downloaded, from ``root``.
        """
        found = {path.name: disk_bytes(path) for path in self.folder.iterdir() if path.is_dir()}
        site = self.folder.glob("toolkit/lib/python*/site-packages/*")
        inside = {
            "torch": ("toolkit", [p for p in site if p.name in {"torch", "nvidia", "triton"}]),
            "packages": ("root", [self.root / "var" / "cache" / "apt" / "archives"]),
        }
        whole = disk_bytes(self.folder)
        for name, (outer, paths) in inside.items():
            found[name] = sum(disk_bytes(path) for path in paths)
            found[outer] = found.get(outer, 0) - found[name]
        ordered = sorted(found.items(), key=lambda item: -item[1])
        return {"in all": whole, **{name: size for name, size in ordered if size > 0}}

    def model(self, name: str, rknn: Path) -> None:
        """Write the demo model's folder for the board: its vision tower as ``.rknn``."""
        folder = self.root / "models" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        tree = json.loads((DEMO / "rkvlm.json").read_text())
        for file in ("tokenizer.json", "chat_template.jinja"):
            shutil.copy(DEMO / file, folder / file)
        shutil.copy(rknn, folder / "vision.rknn")
        decoder = tree["decoder"]
        language = models.rkllm(
            folder / "language.rkllm", embed=decoder["embedding"],
            specials=tree["special_strings"],
        )  # fmt: skip
        tree["name"] = name
        tree["encoders"][0] |= {
            "engine": "rknn", "lease": "npu", "baked": True, "layout": "nhwc",
            **_entry(folder / "vision.rknn"),
        }  # fmt: skip
        tree["decoder"] = {
            "engine": "rkllm", "files": {"model": _entry(language)}, "lease": "npu",
            "context": decoder["context"], "embedding": decoder["embedding"],
        }  # fmt: skip
        (folder / "rkvlm.json").write_text(json.dumps(tree, indent=1))

    def order(self) -> dict[str, Any]:
        """Return what ``toolkit.py`` is to do: the demo's vision tower, mean and deviation baked in."""
        encoder = json.loads((DEMO / "rkvlm.json").read_text())["encoders"][0]
        return {
            "onnx": str(DEMO / encoder["file"]), "rknn": str(self.folder / "vision.rknn"),
            "socket": str(self.root / "run" / "emulated-rknn.sock"),
            "log": str(self.folder / "npu.jsonl"), "platform": "rk3588",
            "width": encoder["width"], "height": encoder["height"],
            "mean": [255 * value for value in encoder["mean"]],
            "std": [255 * value for value in encoder["std"]],
        }  # fmt: skip


def disk_bytes(path: Path) -> int:
    """Return the bytes that a file or folder takes on its disk: a file with two names counts once.

    What links and mounts in it lead to is not in it.
    """
    if not os.path.lexists(path):
        return 0
    disk, seen, total = path.lstat().st_dev, set[int](), 0
    waiting = [path]
    while waiting:
        here = waiting.pop()
        about = here.lstat()
        if about.st_dev != disk or about.st_ino in seen:
            continue
        seen.add(about.st_ino)
        total += about.st_blocks * 512  # stat(2): the unit, whatever the file system's is
        if stat.S_ISDIR(about.st_mode):
            waiting += here.iterdir()
    return total


def mirror_of_apt() -> str:
    """Return the Debian archive that apt is set to, empty where it is none."""
    try:
        printed = subprocess.run(
            ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"],
            capture_output=True, text=True, check=False,
        ).stdout.splitlines()  # fmt: skip
    except FileNotFoundError:
        return ""
    return next((u for u in printed if u.rstrip("/").endswith("/debian")), "")


def enter(root: Path, command: Sequence[str]) -> list[str]:
    """Return the command that runs another inside the board, as its process 1."""
    return [
        "unshare", "--mount", "--pid", "--fork", "--kill-child", sys.executable,
        str(HERE / "inside.py"), str(root), *command,
    ]  # fmt: skip


def _entry(file: Path) -> dict[str, str]:
    return {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
