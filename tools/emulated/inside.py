"""Runs a command inside the board: ``unshare --mount --pid --fork python inside.py ROOT COMMAND...``.

Gives the folder the parts of a machine, in this process's own mount namespace: devices, and a
``/proc`` that has a device tree. The kernel's own ``/proc`` cannot be given one, so ``/proc`` is a
folder of links into the real one, which is at ``/.proc``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

#: Processes that can be seen in the board; its process numbers begin at 1.
MOST_PROCESSES = 4096
COMPATIBLE = b"radxa,rock-5b\0rockchip,rk3588\0"


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def main(root: Path, command: list[str]) -> None:
    """Set the mounts up and become the command."""
    mount("--make-rprivate", "/")
    for name in (".proc", "proc", "dev", "tmp"):
        (root / name).mkdir(exist_ok=True)
    mount("-t", "proc", "proc", str(root / ".proc"))
    mount("--rbind", "/dev", str(root / "dev"))
    mount("-t", "tmpfs", "tmpfs", str(root / "tmp"))
    mount("-t", "tmpfs", "tmpfs", str(root / "proc"))
    names = [n for n in os.listdir(root / ".proc") if not n.isdigit() and n != "device-tree"]
    for name in (*names, *map(str, range(1, MOST_PROCESSES))):
        (root / "proc" / name).symlink_to(f"/.proc/{name}")
    tree = root / "proc" / "device-tree"
    tree.mkdir()
    (tree / "compatible").write_bytes(COMPATIBLE)
    os.chroot(root)
    os.chdir("/")
    os.execv(command[0], command)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
