"""The command line of ``tools/export_onnx``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import smolvlm
from .weights import CheckpointError, read_json


def main(argv: list[str] | None = None) -> int:
    """Export one checkpoint; return the exit status (0 done, 1 failed, 2 usage)."""
    parser = argparse.ArgumentParser(
        prog="export_onnx",
        description="Turn a Hugging Face checkpoint folder into a model folder of ONNX files.",
    )
    parser.add_argument("model", type=Path, help="checkpoint folder (config.json, safetensors)")
    parser.add_argument("out", type=Path, help="model folder to write")
    parser.add_argument("--family", default="auto", choices=["auto", smolvlm.FAMILY])
    parser.add_argument(
        "--attention",
        default="gqa",
        choices=["plain", "gqa"],
        help="standard operators, or ONNX Runtime's fused ones (faster; default)",
    )
    parser.add_argument(
        "--quantize",
        default="none",
        choices=["none", "half", "int8", "int4"],
        help="float32 (default), float16 in the file alone, 8 bits, or 4 bits in blocks of 32",
    )
    parser.add_argument("--name", default="", help="name of the model (default: OUT's name)")
    parser.add_argument("--description", default="", help="one line about the model")
    args = parser.parse_args(argv)
    try:
        kind = read_json(args.model, "config.json").get("model_type")
        if args.family == "auto" and kind not in smolvlm.TYPES:
            raise CheckpointError(f"config.json: model_type {kind!r} is not known")
        smolvlm.export(
            args.model,
            args.out,
            name=args.name or args.out.resolve().name,
            attention=args.attention,
            precision=args.quantize,
            description=args.description,
        )
    except CheckpointError as exc:
        print(f"export_onnx: {exc}", file=sys.stderr)
        return 1
    total = 0
    for path in sorted(args.out.iterdir()):
        total += path.stat().st_size
        print(f"{path.stat().st_size:>12,} bytes  {path.name}")
    print(f"{total:>12,} bytes  in all")
    return 0
