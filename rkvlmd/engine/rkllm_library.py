"""Finds ``librkllmrt.so``, tells its version before it is opened, and opens it with its layout."""

from __future__ import annotations

import ctypes as c
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rkvlmd.board import elf, libraries
from rkvlmd.engine import rkllm_types as types
from rkvlmd.engine.rkllm_abi import VERSIONS, Layout
from rkvlmd.errors import RkvlmdError

NAME = libraries.RKLLM.name
#: Where the library is looked for, after ``LD_LIBRARY_PATH``.
FOLDERS = libraries.RKLLM.folders

#: Bytes given to ``rkllm_createDefaultParam``, which returns a structure by value: the caller's
#: room may be larger than the structure, never smaller.
PARAM_ROOM = 1024


def find(setting: str, environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Return the libraries to choose from, the preferred one first.

    ``setting`` is ``npu.library``: a file, or a folder with files of several
    versions. Without it the first that a search finds is the only one.

    Raises:
      RkvlmdError: ``model_failed``; where it was looked for goes to standard error.

    """
    if setting:
        path = Path(setting)
        if path.is_dir():
            found = sorted(path.glob(libraries.FOLDER_FILES), reverse=True)
            if found:
                return found
            _tell(f"npu.library: {path} has no librkllmrt*.so")
            raise _error(f"npu.library: there is no library in the folder {path.name}.")
        if not path.is_file():
            _tell(f"npu.library: {path} is no file")
            raise _error(f"npu.library: the file {path.name} does not exist.")
        return [path]
    given = [f for f in environ.get("LD_LIBRARY_PATH", "").split(":") if f]
    for folder in (*given, *FOLDERS):
        path = Path(folder) / NAME
        if path.is_file():
            return [path]
    _tell(f"{NAME} was looked for in {', '.join((*given, *FOLDERS))}")
    raise _error(f"{NAME} was not found; install it, or set npu.library to where it is.")


def read_version(path: Path) -> str:
    """Return the version that the file says, such as ``1.3.0`` or ``1.2.1b1``; opens no library.

    Raises:
      RkvlmdError: ``model_failed`` when it says none, several, or cannot be read.

    """
    try:
        found = libraries.versions_of(path)
    except OSError as exc:
        raise _error(f"npu.library: {path.name} cannot be read: {exc.strerror}.") from exc
    if not found:
        raise _error(
            f"npu.library: {path.name} does not say which version of the RKLLM runtime it is;"
            " is it another library?"
        )
    if len(found) > 1:
        raise _error(
            f"npu.library: {path.name} says more than one version: {', '.join(sorted(found))}."
        )
    return found.pop()


def choose(version: str, name: str = NAME, *, override: str = "") -> Layout:
    """Return the layout of a version, or that of the version ``override``.

    Raises:
      RkvlmdError: ``model_failed`` for a version that nobody knows.

    """
    if override:
        if override not in VERSIONS:
            raise _error(f"npu.layout: {override!r} is none of {_supported()}.")
        return VERSIONS[override]
    if version not in VERSIONS:
        raise _error(
            f"npu.library: {name} is version {version}; supported are {_supported()}."
            " Set npu.library to another file, or npu.layout to the version whose layout is to"
            " be assumed."
        )
    return VERSIONS[version]


def check_machine(path: Path) -> None:
    """Check that the file is a library for this machine.

    Raises:
      RkvlmdError: ``model_failed`` that names what it is for.

    """
    theirs, ours = elf.read(path), elf.read(Path("/proc/self/exe"))
    if theirs is None:
        raise _error(f"npu.library: {path.name} is no ELF library, or it is cut short.")
    if ours is not None and theirs.machine != ours.machine:
        raise _error(
            f"npu.library: {path.name} is built for {theirs.machine}, but this Python is built"
            f" for {ours.machine}."
        )


# --- the opened library ------------------------------------------------------------------


class _Room(types.Structure):
    _fields_ = (("bytes", c.c_uint8 * PARAM_ROOM),)


class Library:
    """An opened ``librkllmrt.so``: its functions with argument types, by their C names."""

    def __init__(self, path: Path, version: str, layout: Layout, *, chosen: bool = False) -> None:
        """Open the file; ``chosen``: the owner has named the layout.

        Raises:
          RkvlmdError: ``model_failed`` when it cannot be opened, lacks a name,
            or lays its parameters out in another way than its version does.

        """
        self.path, self.version, self.layout = path, version, layout
        try:
            self._dll = c.CDLL(str(path))
        except OSError as exc:
            _tell(f"npu.library: {exc}")
            raise _error(
                f"npu.library: {path.name} cannot be opened; a library that it needs (on some"
                " systems libomp.so) may be missing."
            ) from exc
        missing = [name for name in FUNCTIONS if not hasattr(self._dll, name)]
        if missing:
            raise _error(f"npu.library: {path.name} lacks {', '.join(missing)}.")
        for name, arguments in FUNCTIONS.items():
            function = getattr(self._dll, name)
            function.argtypes = arguments
            function.restype = c.c_int
        self._dll.rkllm_createDefaultParam.restype = _Room
        self._dll.rkllm_init.argtypes = [
            c.POINTER(c.c_void_p),
            c.c_void_p,
            c.POINTER(types.Callback) if layout.per_run else types.ResultCallback,
        ]
        self._check_layout(chosen=chosen)

    def __getattr__(self, name: str) -> Any:
        if name in FUNCTIONS:
            return getattr(self._dll, name)
        raise AttributeError(name)

    def default_param(self) -> Any:
        """Return the library's default ``RKLLMParam``, with room behind it."""
        return self.layout.param.from_buffer(self._dll.rkllm_createDefaultParam())

    def _check_layout(self, *, chosen: bool) -> None:
        """Compare the defaults with the layout: the bytes of one are nonsense in the other.

        That they can be told by their defaults is an inference: where no known
        layout fits, the owner may choose one.
        """
        room = bytes(self._dll.rkllm_createDefaultParam().bytes)
        if _fits(room, self.layout):
            return
        if chosen and not any(_fits(room, other) for other in VERSIONS.values()):
            _tell(
                f"npu.layout: the defaults of {self.path.name} fit none; {self.layout.name} it is"
            )
            return
        others = sorted({v for v, other in VERSIONS.items() if _fits(room, other)})
        like = f"those of {', '.join(others)}" if others else "none that is known"
        raise _error(
            f"npu.library: {self.path.name} says that it is version {self.version}, but its"
            f" parameters are laid out like {like}; npu.layout can name another layout."
        )


#: The 15 functions of the library and what they take; all return ``int`` but the first.
FUNCTIONS: dict[str, list[Any]] = {
    "rkllm_createDefaultParam": [],
    "rkllm_init": [],  # depends on the version
    "rkllm_load_lora": [c.c_void_p, c.POINTER(types.LoraAdapter)],
    "rkllm_load_prompt_cache": [c.c_void_p, c.c_char_p],
    "rkllm_release_prompt_cache": [c.c_void_p],
    "rkllm_destroy": [c.c_void_p],
    "rkllm_run": [c.c_void_p, c.c_void_p, c.c_void_p, c.c_void_p],
    "rkllm_run_async": [c.c_void_p, c.c_void_p, c.c_void_p, c.c_void_p],
    "rkllm_abort": [c.c_void_p],
    "rkllm_is_running": [c.c_void_p],
    "rkllm_clear_kv_cache": [c.c_void_p, c.c_int, c.POINTER(c.c_int), c.POINTER(c.c_int)],
    "rkllm_get_kv_cache_size": [c.c_void_p, c.POINTER(c.c_int)],
    "rkllm_set_chat_template": [c.c_void_p, c.c_char_p, c.c_char_p, c.c_char_p],
    "rkllm_set_function_tools": [c.c_void_p, c.c_char_p, c.c_char_p, c.c_char_p],
    "rkllm_set_cross_attn_params": [c.c_void_p, c.POINTER(types.CrossAttnParam)],
}


def _fits(room: bytes, layout: Layout) -> bool:
    """Whether default parameters make sense: ``mirostat_tau`` 5.0, one batch, 1 to 8 CPUs."""
    param: Any = layout.param.from_buffer_copy(room)
    extend = param.extend_param
    sane = param.mirostat_tau == 5.0 and extend.n_batch == 1 and 1 <= extend.enabled_cpus_num <= 8
    return bool(sane)


def open_library(setting: str = "", *, override: str = "", wanted: Sequence[str] = ()) -> Library:
    """Find, check and open the library; see the functions above for what can be wrong.

    ``wanted`` are the versions that a model works with, such as ``1.2.3`` or
    ``1.3`` for a series; none means any.

    Raises:
      RkvlmdError: ``model_failed``, also when no library is of a version that is wanted.

    """
    paths = find(setting)
    seen = []
    for path in paths:
        check_machine(path)
        version = read_version(path)
        if wanted and not any(version == v or version.startswith(f"{v}.") for v in wanted):
            seen.append(f"{path.name} is {version}")
            continue
        layout = choose(version, path.name, override=override)
        return Library(path, version, layout, chosen=bool(override))
    raise _error(
        f"decoder.runtime_versions: the model works with {', '.join(wanted)}, but"
        f" {', '.join(seen)}; npu.library can name another file, or a folder of several."
    )


def _supported() -> str:
    return ", ".join(VERSIONS)


def _error(text: str) -> RkvlmdError:
    return RkvlmdError("model_failed", text)


def _tell(text: str) -> None:
    """Write what only the owner may see to standard error."""
    print(text, file=sys.stderr, flush=True)
