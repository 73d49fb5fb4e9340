"""``python -m rkvlmd.engine ROLE --name NAME --fd N``: the start of every child.

``--script JSON`` gives faults to tests and benchmarks (``rkvlmd.engine.script``); the daemon
never passes it. ``python -m rkvlmd.engine inspect FILE`` prints an ONNX file's shapes as JSON,
``inspect FOLDER`` what prompts of the model in it become; ``cut FILE TARGET OUTPUT`` writes the
part of an ONNX file that computes one output.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import socket
import sys
from typing import NoReturn

ROLES = ("prep", "encoder", "decoder", "scripted")
#: What ``hello`` names for each role, where installed.
LIBRARIES = {
    "prep": ("numpy", "pillow", "tokenizers", "jinja2"),
    "encoder": ("numpy", "onnxruntime"),
    "decoder": ("numpy", "onnxruntime", "tokenizers"),
    "scripted": ("numpy",),
}


def main(argv: list[str]) -> NoReturn:
    """Run a child until its socket ends."""
    if argv[:1] == ["inspect"]:
        sys.exit(_inspect(argv[1:]))
    if argv[:1] == ["cut"]:
        sys.exit(_cut(argv[1:]))
    role, options = _parse(argv)
    # Only the end of the socket means "leave": a terminal's Ctrl-C and a stop of the whole
    # service are the daemon's to handle.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable(sys.stderr)
    if memory := int(options["memory"]):
        _limit_memory(memory)
    run(role, int(options["fd"]), options["script"], options["warm"])


def run(role: str, fd: int, script_text: str, warm: str = "") -> NoReturn:
    """Say ``hello`` and serve; imports only what the role needs.

    ``warm``: modules that a prep child imports before its first order, with
    commas; empty for all.
    """
    from rkvlmd.engine.channel import Channel
    from rkvlmd.engine.loop import Loop
    from rkvlmd.engine.script import Script
    from rkvlmd.wire import child

    script = None
    if script_text:
        import json

        script = Script(json.loads(script_text))
    channel = Channel(socket.socket(fileno=fd))
    if script is not None:
        script.strike("hello")
    channel.send(child.Hello(pid=os.getpid(), role=role, libraries=_versions(role)))
    if role == "prep":
        from rkvlmd.engine.prep import WARM, PrepRole

        Loop(channel, PrepRole(script, warm.split(",") if warm else WARM)).run()
    from rkvlmd.engine.roles import EngineRole

    Loop(channel, EngineRole(role, script)).run()


def _parse(argv: list[str]) -> tuple[str, dict[str, str]]:
    """Return the role and the options; argparse would take 0.4 MB of each child.

    ``--name`` is shown in the process list, ``--fd`` is the number of the socket, ``--memory`` the
    address space in bytes (0: any), ``--warm`` as in ``run``.
    """
    options = {"name": "", "fd": "", "memory": "0", "warm": "", "script": ""}
    role, words = argv[:1], iter(argv[1:])
    for word in words:
        name = word.removeprefix("--")
        value = next(words, None)
        if not word.startswith("--") or name not in options or value is None:
            _wrong(word)
        options[name] = value
    if not role or role[0] not in ROLES:
        _wrong("".join(role))
    for name in ("fd", "memory"):
        if not options[name].isascii() or not options[name].isdigit():
            _wrong(f"--{name}")
    return role[0], options


def _wrong(word: str) -> NoReturn:
    print(f"rkvlmd.engine: what is {word!r}?\n{__doc__}", file=sys.stderr)
    sys.exit(2)


def _inspect(paths: list[str]) -> int:
    import json

    from rkvlmd.engine.inspect import inspect, prompts
    from rkvlmd.errors import RkvlmdError

    if len(paths) != 1:
        print("usage: python -m rkvlmd.engine inspect FILE|FOLDER", file=sys.stderr)
        return 2
    try:
        found = prompts(paths[0]) if os.path.isdir(paths[0]) else inspect(paths[0])
        print(json.dumps(found))
    except RkvlmdError as exc:
        print(exc.message, file=sys.stderr)
        return 1
    return 0


def _cut(words: list[str]) -> int:
    from pathlib import Path

    from rkvlmd.engine.graph_cut import cut
    from rkvlmd.engine.graph_header import NotOnnxError

    if len(words) != 3:
        print("usage: python -m rkvlmd.engine cut FILE TARGET OUTPUT", file=sys.stderr)
        return 2
    try:
        cut(Path(words[0]), Path(words[1]), words[2])
    except NotOnnxError as exc:
        print(f"cannot be taken apart: {exc}", file=sys.stderr)
        return 1
    except OSError as exc:
        print(f"cannot be taken apart ({exc.strerror})", file=sys.stderr)
        return 1
    return 0


def _limit_memory(most: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    # Each thread of these pools would take address space, and one job runs at a time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _versions(role: str) -> dict[str, str]:
    """Return the installed versions by the names of their folders, ``NAME-VERSION.dist-info``.

    ``importlib.metadata`` would say the same and cost each child 2.4 MB.
    """
    versions: dict[str, str] = {}
    for folder in sys.path:
        try:
            names = os.listdir(folder or ".")
        except OSError:
            continue
        for entry in names:
            name, dash, version = entry.removesuffix(".dist-info").partition("-")
            if dash and entry.endswith(".dist-info") and name.lower() in LIBRARIES[role]:
                versions.setdefault(name.lower(), version)
    return versions


if __name__ == "__main__":
    main(sys.argv[1:])
