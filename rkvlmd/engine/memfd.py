"""Sealed memory files: how pixels, embeddings and pictures cross between processes."""

from __future__ import annotations

import errno
import fcntl
import math
import mmap
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rkvlmd.wire.child import Tensor, View

if TYPE_CHECKING:
    from rkvlmd.models import views

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
#: From Linux 5.1 (fcntl(2)): what is mapped already may be written, nothing else.
_SEAL_FUTURE_WRITE = 0x10
#: numpy names that a tensor may have.
DTYPES = frozenset({"uint8", "int32", "int64", "float16", "float32"})


class MemoryFileError(ValueError):
    """A descriptor is not what the frame says; the peer has a bug."""


def create(data: bytes | memoryview, name: str = "rkvlmd") -> int:
    """Return the descriptor of a new sealed memory file that holds ``data``."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(data).cast("B")
        while view:
            view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def from_array(array: npt.NDArray[Any], name: str = "rkvlmd") -> tuple[int, Tensor]:
    """Return a sealed memory file with the array in C order, and what it holds."""
    array = np.ascontiguousarray(array)
    tensor = Tensor(shape=tuple(array.shape), dtype=array.dtype.name)
    return create(array.reshape(-1).view(np.uint8).data, name), tensor


def from_view(view: views.View, array: npt.NDArray[Any]) -> tuple[int, View]:
    """Return a sealed memory file with an encoder's input, and what a frame says of it."""
    fd, tensor = from_array(array, "rkvlmd-pixels")
    return fd, View(
        encoder=view.encoder,
        tensor=tensor,
        tokens=view.tokens,
        patches=view.patches,
        grid=view.grid,
    )


def writable(size: int, name: str = "rkvlmd-rows") -> tuple[int, mmap.mmap]:
    """Return a new memory file of ``size`` bytes and a mapping of it, to be sealed once filled.

    Raises:
      OSError: there is no memory for all of it.

    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, size)
        return fd, mmap.mmap(fd, size)
    except BaseException:
        os.close(fd)
        raise


def seal(fd: int, mapped: mmap.mmap) -> None:
    """Seal a file of ``writable``; the caller does not write to its mapping any more.

    Taking a large mapping apart takes as long as filling it, so it stays until
    the file is on its way; kernels before 5.1 want it closed first.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS & ~fcntl.F_SEAL_WRITE | _SEAL_FUTURE_WRITE)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        mapped.close()
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)


def checked_size(fd: int) -> int:
    """Return the size in bytes of a memory file that cannot shrink any more.

    Raises:
      MemoryFileError: it is no sealed memory file, so reading a mapping of it
        could end the process with SIGBUS.

    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as exc:
        raise MemoryFileError("descriptor is no memory file") from exc
    if not seals & fcntl.F_SEAL_SHRINK:
        raise MemoryFileError("memory file is not sealed against shrinking")
    return os.fstat(fd).st_size


def read(fd: int) -> bytes:
    """Return a copy of the whole file; the descriptor stays open."""
    size, parts, at = checked_size(fd), [], 0
    while at < size:
        part = os.pread(fd, size - at, at)
        if not part:
            raise MemoryFileError("memory file is shorter than its size")
        parts.append(part)
        at += len(part)
    return b"".join(parts) if len(parts) != 1 else parts[0]


def map_array(fd: int, tensor: Tensor, *, own: bool = False) -> npt.NDArray[Any]:
    """Map a memory file read-only as the array that ``tensor`` describes.

    The mapping lives as long as the array; the descriptor may be closed. With
    ``own`` it may be written: pages that are become copies, the file stays.

    Raises:
      MemoryFileError: unknown dtype, or the size is not exactly right.

    """
    if tensor.dtype not in DTYPES:
        raise MemoryFileError(f"unknown dtype {tensor.dtype!r}")
    if any(n < 1 for n in tensor.shape):
        raise MemoryFileError(f"shape {tensor.shape} has no elements")
    dtype = np.dtype(tensor.dtype)
    size = checked_size(fd)
    if size != math.prod(tensor.shape) * dtype.itemsize:
        raise MemoryFileError(f"{size} bytes for shape {tensor.shape} of {tensor.dtype}")
    # Private, because Linux before 6.7 refuses a shared mapping of a write-sealed file even
    # when it is read-only.
    prot = mmap.PROT_READ | (mmap.PROT_WRITE if own else 0)
    mapped = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=prot)
    return np.frombuffer(mapped, dtype).reshape(tensor.shape)
