"""The commands about model folders, which need no daemon: ``import``, ``check`` and ``show``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

COMMANDS = ("import", "check", "show")
_MAX_SIDE = 1 << 14


def add(command: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the commands; ``command`` makes the parser of one."""
    take = command("import", "make a model of a folder of published files; no daemon")
    take.add_argument("folder", metavar="DIR", type=Path)
    take.add_argument("--as", dest="name", metavar="NAME", help="what the model is called")
    kind = take.add_mutually_exclusive_group()
    kind.add_argument("--model", metavar="MODEL", help="which model of the catalogue it is")
    kind.add_argument("--family", metavar="FAMILY", help="of which kind it is")
    take.add_argument(
        "--context", type=_count, metavar="TOKENS", help="for which context it was converted"
    )
    take.add_argument(
        "--size", type=_size, metavar="WIDTHxHEIGHT",
        help="pixels that the encoder takes, where its file does not say",
    )  # fmt: skip
    take.add_argument(
        "--variant", metavar="PRECISION",
        help="which of several ONNX files of one part: full, fp16, int8, q4, ...",
    )  # fmt: skip
    take.add_argument(
        "--decoder", metavar="FILE", help="which of several .rkllm files of the folder"
    )
    take.add_argument("--replace", action="store_true", help="write over an rkvlm.json")
    check = command("check", "compare a model's manifest with its files; no daemon")
    check.add_argument("name", metavar="NAME")
    check.add_argument(
        "--quick", action="store_true", help="do not read the files for their hashes"
    )
    show = command("show", "say what clients may expect of a model; no daemon")
    show.add_argument("name", metavar="NAME", nargs="?", help="default: list the catalogue")
    for one in (take, check, show):
        one.add_argument("--config", type=Path, metavar="FILE", help="the settings of the daemon")
        one.add_argument("--models", type=Path, metavar="DIR", help="the folder of model folders")


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1 << 24:
        raise argparse.ArgumentTypeError("must be a number above 0")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    size = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(1 <= side <= _MAX_SIDE for side in size):
        raise argparse.ArgumentTypeError("must be like 448x448, in pixels")
    return size


def run(args: argparse.Namespace) -> int:
    """Run one of them; return the exit status."""
    if args.command == "import":
        from rkvlmd.ctl import importing

        wishes = importing.Wishes(
            path=args.folder, name=args.name, family=args.family, model=args.model,
            size=args.size, context=args.context, variant=args.variant, decoder=args.decoder, models=args.models,
            config=args.config, replace=args.replace,
        )  # fmt: skip
        return importing.run(wishes, as_json=args.json)
    if args.command == "check":
        from rkvlmd.ctl import checking

        return checking.run(
            args.name, args.config, args.models, quick=args.quick, as_json=args.json
        )
    from rkvlmd.ctl import showing

    return showing.run(args.name, args.config, args.models, as_json=args.json)
