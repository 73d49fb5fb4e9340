"""A daemon whose engines follow a script: ``python -m tools.benchlib.scripted_daemon SCRIPT ...``.

SCRIPT is the decoder's script as JSON (``rkvlmd.engine.scripted``); the other
arguments are those of ``rkvlmd``.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import trio

from rkvlmd import __main__ as entry
from rkvlmd import daemon
from rkvlmd.actors.loading import Loader
from rkvlmd.settings import Settings


def main(argv: list[str]) -> int:
    """Run the daemon until a signal ends it."""
    script = json.loads(argv[0])
    settings = entry.settings_of(entry.parser().parse_args(argv[1:]))
    entry.set_up_log("warning")

    def loader(settings: Settings, state: Path) -> Loader:
        def options(role: str) -> dict[str, Any]:
            return {"backend": "scripted", "script": script if role == "decoder" else {}}

        return Loader(settings, state, options=options)

    def announce(address: str) -> None:
        print(f"scripted rkvlmd listening on {address}", flush=True)

    spares = daemon.Spares(make_loader=loader)
    trio.run(partial(daemon.main, settings, announce=announce, spares=spares))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
