"""The figures that Rockchip publishes, by model and SoC; ``data/published.json`` has them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).parents[1] / "data" / "published.json"


@dataclass(frozen=True, slots=True)
class Published:
    """What is published of one model on one SoC; ``None`` where it is not.

    ``encode`` is seconds of one picture of ``side`` pixels, ``prefill`` tokens
    per second of a prompt of ``prompt`` tokens, ``decode`` tokens per second,
    ``memory_mb`` the decoder's peak, 10^6 bytes.
    """

    model: str
    soc: str
    source: str
    side: int | None = None
    encode: float | None = None
    prompt: int | None = None
    prefill: float | None = None
    decode: float | None = None
    memory_mb: float | None = None


def find(model: str, soc: str) -> Published | None:
    """Return what is published for the model whose name begins most like ``model``'s.

    ``rk3588s`` counts as ``rk3588``. Letters and digits alone are compared, so
    ``Qwen3_VL-2B-instruct`` finds ``qwen3-vl-2b``.
    """
    tree = json.loads(FILE.read_text())
    name, best, row = _plain(model), "", None
    for entry in tree["models"]:
        for known in entry["names"]:
            if name.startswith(_plain(known)) and len(known) > len(best):
                best, row = known, entry
    figures = row["figures"].get(soc.lower().removesuffix("s")) if row is not None else None
    if row is None or figures is None:
        return None
    prompt, seconds = figures["prefill"]
    return Published(
        model=row["names"][0],
        soc=soc.lower().removesuffix("s"),
        source=tree["sources"][row["source"]],
        side=figures.get("side"),
        encode=figures.get("encode"),
        prompt=prompt,
        prefill=round(prompt / seconds, 1),
        decode=figures["decode"],
        memory_mb=figures.get("memory_mb"),
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
