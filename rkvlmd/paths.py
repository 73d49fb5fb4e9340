"""Where the control socket is when nobody says: one rule for the daemon and ``rkvlmctl``.

Standard library alone, so that ``rkvlmctl`` can import it and still answer at once.
"""

from __future__ import annotations

import os
from pathlib import Path

#: Where the service of systemd has its control socket.
SYSTEM_CONTROL = Path("/run/rkvlmd/control.sock")


def default_control_path() -> Path:
    """Return the control socket of this user when no setting names one."""
    if folder := os.environ.get("RUNTIME_DIRECTORY"):
        return Path(folder.split(":")[0]) / "control.sock"
    if os.geteuid() == 0:
        return SYSTEM_CONTROL
    if folder := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(folder) / "rkvlmd" / "control.sock"
    return Path(f"/tmp/rkvlmd-{os.geteuid()}") / "control.sock"
