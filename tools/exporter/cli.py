"""The command line of ``tools/export_onnx``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import clip
from .families import FAMILIES
from .folder import export
from .weights import CheckpointError


def main(argv: list[str] | None = None) -> int:
    """Export one checkpoint; return the exit status (0 done, 1 failed, 2 usage)."""
    parser = argparse.ArgumentParser(
        prog="export_onnx",
        description="Turn a Hugging Face checkpoint folder into a model folder of ONNX files.",
        epilog="Known (model_type of config.json): "
        + ", ".join(sorted([*FAMILIES, clip.KIND]))
        + ".",
    )
    parser.add_argument("model", type=Path, help="checkpoint folder (config.json, safetensors)")
    parser.add_argument(
        "out", type=Path, nargs="?", help="model folder to write (default: MODEL-onnx beside it)"
    )
    parser.add_argument(
        "--attention",
        default="gqa",
        choices=["plain", "gqa"],
        help="standard operators (always for Gemma), or ONNX Runtime's fused ones (faster;"
        " default)",
    )
    parser.add_argument(
        "--quantize",
        default="none",
        choices=["none", "half", "int8", "int4"],
        help="float32 (default), float16 in the file alone, 8 bits, or 4 bits in blocks of 32",
    )
    parser.add_argument("--name", default="", help="name of the model (default: OUT's name)")
    parser.add_argument(
        "--context", type=int, default=0, help="longest context, tokens (default: the checkpoint's)"
    )
    parser.add_argument(
        "--hidden", action="store_true", help="with the hidden states that embeddings are made of"
    )
    parser.add_argument("--description", default="", help="one line about the model")
    parser.add_argument(
        "--size",
        type=_size,
        help="WIDTHxHEIGHT: a vision encoder of this size alone, for converters that need one",
    )
    args = parser.parse_args(argv)
    folder: Path = args.model.resolve()
    out: Path = args.out or folder.with_name(f"{folder.name}-onnx")
    try:
        export(
            args.model,
            out,
            name=args.name or out.resolve().name,
            attention=args.attention,
            precision=args.quantize,
            description=args.description,
            hidden=args.hidden,
            context=args.context,
            size=args.size,
        )
    except CheckpointError as exc:
        print(f"export_onnx: {exc}", file=sys.stderr)
        return 1
    total = 0
    for path in sorted(out.iterdir()):
        total += path.stat().st_size
        print(f"{path.stat().st_size:>12,} bytes  {path.name}")
    print(f"{total:>12,} bytes  in all")
    return 0


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height)
