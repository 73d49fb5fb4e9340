"""The file of the control socket: made, claimed, and taken away again."""

from __future__ import annotations

import errno
import grp
import os
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from rkvlmd.errors import SettingsError, StartError
from rkvlmd.wire.control import Peer

#: Longest path that the kernel takes (``sun_path`` of unix(7), less the final zero), bytes.
MAX_PATH = 107
#: Anybody may open the socket; what a caller may do is decided by who it is.
SOCKET_MODE = 0o666
FOLDER_MODE = 0o755
#: ``SO_PEERGROUPS`` of asm-generic/socket.h (Linux 4.13); the socket module has no name for it.
SO_PEERGROUPS = 59
#: Python's getsockopt takes no larger buffer; room for 256 groups.
_GROUPS_BYTES = 1024
_UCRED = struct.Struct("iII")


@contextmanager
def bound(path: Path) -> Iterator[trio.SocketListener]:
    """Listen on ``path`` inside the block; the file is unlinked at its end.

    The socket is bound under another name and moved into place when it
    listens, so nobody meets one that does not answer yet.

    Raises:
      StartError: another daemon listens there, or the place cannot be used.

    """
    _prepare(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        inode = _claim(sock, path)
        try:
            yield trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        finally:
            _remove(path, inode)


def _claim(sock: socket.socket, path: Path) -> int:
    waiting = _waiting(path)
    try:
        waiting.unlink(missing_ok=True)
        try:
            sock.bind(str(waiting))
            waiting.chmod(SOCKET_MODE)
            sock.listen()
            inode = waiting.stat().st_ino
            waiting.rename(path)
        finally:
            waiting.unlink(missing_ok=True)
    except OSError as exc:
        raise StartError(f"control.path: {exc.strerror or 'cannot be used'}: {path}") from exc
    return inode


def _waiting(path: Path) -> Path:
    """Return the name under which the socket is made; short, for paths are."""
    return path.with_name(f".{os.getpid()}")


def _prepare(path: Path) -> None:
    """Make the folder; refuse what is not ours to replace."""
    if not path.name or max(len(os.fsencode(p)) for p in (path, _waiting(path))) > MAX_PATH:
        raise StartError(f"control.path: must be a file name of at most {MAX_PATH} bytes: {path}")
    folder = path.parent
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(FOLDER_MODE)
        owner = folder.stat().st_uid
        kind = path.lstat().st_mode if os.path.lexists(path) else None
    except OSError as exc:
        raise StartError(f"control.path: {exc.strerror}: {path}") from exc
    if owner not in {0, os.geteuid()}:
        # Its owner could put a socket of their own in our place.
        raise StartError(f"control.path: the folder belongs to another user: {folder}")
    if kind is None:
        return
    if not stat.S_ISSOCK(kind):
        raise StartError(f"control.path: there is something that is no socket: {path}")
    if _answers(path):
        raise StartError(f"control.path: another rkvlmd listens on {path}")


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return True  # its backlog is full: somebody is there
        except ConnectionRefusedError:
            return False
        except OSError as exc:
            return exc.errno != errno.ENOENT
        return True


def _remove(path: Path, inode: int) -> None:
    """Unlink ``path`` if it is still our socket; another daemon may have replaced it."""
    try:
        if path.lstat().st_ino == inode:
            path.unlink()
    except OSError:
        return


def peer_of(stream: trio.SocketStream) -> Peer:
    """Return who is at the other end, as it was when it connected.

    Groups that the kernel does not tell (more than 256 of them) give no rights.
    """
    pid, uid, gid = _UCRED.unpack(
        stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    )
    try:
        raw = stream.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, _GROUPS_BYTES)
    except OSError:
        raw = b""
    return Peer(pid, uid, gid, frozenset(struct.unpack(f"{len(raw) // 4}I", raw)))


def operator_gid(name: str) -> int | None:
    """Return the number of the operator group; ``None`` where the setting is empty.

    Raises:
      SettingsError: there is no such group.

    """
    if not name:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise SettingsError([f"control.operator_group: there is no group {name!r}"]) from None


def own_uid() -> int:
    """Return the user that this daemon is."""
    return os.geteuid()
