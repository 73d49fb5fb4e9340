"""``rkvlmctl bench``: a standard set against the live daemon, beside what Rockchip publishes."""

from __future__ import annotations

import random
import re
import statistics
import struct
import sys
import zlib
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rkvlmd.board import soc as socs
from rkvlmd.board.root import Root
from rkvlmd.ctl.client import CtlError
from rkvlmd.ctl.published import Published, find

#: Pixels of the pictures that are sent: those of a plain camera.
WIDTH, HEIGHT = 640, 480
#: Words of the prompt whose prefill is measured; the published figures have 128 tokens.
WORDS = 110
_VOCABULARY = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
]
_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB", re.MULTILINE)


class Endpoint(Protocol):
    """What answers requests (``ctl.chat.Chat``)."""

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        """Ask without streaming; return the response object."""
        ...


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: measured here (``None``: could not be), and published."""

    name: str
    unit: str
    here: float | None
    published: float | None = None
    runs: tuple[float, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        ratio = self.here / self.published if self.here is not None and self.published else None
        return {
            "name": self.name,
            "unit": self.unit,
            "here": None if self.here is None else _rounded(self.here),
            "published": self.published,
            "ratio": None if ratio is None else round(ratio, 3),
            "runs": [_rounded(value) for value in self.runs],
        }


def measure(
    endpoint: Endpoint,
    model: dict[str, Any],
    pids: Callable[[], dict[str, int]],
    *,
    repeats: int,
    tokens: int,
    like: str,
    soc: str,
    root: Path = Path("/"),
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Ask the standard set; every request is one that no cache knows.

    Args:
      endpoint: where to ask.
      model: a line of ``rkvlmctl models``.
      pids: returns the pids of the model's children by name.
      repeats, tokens: how often each request is sent; the length of an answer.
      like, soc: whose published figures to show; empty: by the model's name,
        and by the machine.
      root: where the machine's files are.
      tell: hears what is done.

    Raises:
      CtlError: the daemon refused a request.

    """
    name = str(model["name"])
    tell(f"loading {name}")
    _ask(endpoint, name, _text(4), 1)
    plain, seen = [], []
    for number in range(repeats):
        tell(f"text, {number + 1} of {repeats}")
        plain.append(_ask(endpoint, name, _text(WORDS), tokens))
    for number in range(repeats if model.get("image") else 0):
        tell(f"picture, {number + 1} of {repeats}")
        seen.append(_ask(endpoint, name, _picture_turn(), tokens))
    machine = soc or _soc(root)
    known = find(like or name, machine) if machine else None
    peaks = {child: peak for child, pid in pids().items() if (peak := _peak(pid)) is not None}
    return {
        "model": name,
        "soc": machine or None,
        "like": known.model if known else None,
        "source": known.source if known else None,
        "repeats": repeats,
        "answer_tokens": tokens,
        "picture": f"{WIDTH}x{HEIGHT} PNG",
        "figures": [row.as_json() for row in _rows(plain, seen, peaks, known)],
    }


def _rows(
    plain: Sequence[dict[str, Any]],
    seen: Sequence[dict[str, Any]],
    peaks: dict[str, int],
    known: Published | None,
) -> list[Row]:
    rows = []
    if seen:
        encodes = [one["timings"]["encode"] for one in seen]
        side = f" ({known.side} pixels)" if known and known.side else ""
        rows.append(_row(f"encode{side}", "s", encodes, known.encode if known else None))
    prefills = [p for one in plain if (p := _prefill(one)) is not None]
    decodes = [d for one in (*plain, *seen) if (d := _decode(one)) is not None]
    length = f" ({known.prompt} tokens)" if known and known.prompt else ""
    rows.append(_row(f"prefill{length}", "tokens/s", prefills, known.prefill if known else None))
    rows.append(_row("decode", "tokens/s", decodes, known.decode if known else None))
    for what, runs in (("text", plain), ("picture", seen)):
        if runs:
            firsts = [one["timings"]["first_token"] for one in runs]
            totals = [one["timings"]["total"] for one in runs]
            rows.append(_row(f"{what}: first token", "s", firsts, _first(what, known)))
            rows.append(_row(f"{what}: whole answer", "s", totals))
    for child, peak in sorted(peaks.items()):
        published = known.memory_mb if known and child.startswith("decoder") else None
        rows.append(_row(f"peak memory, {child}", "MB", [peak / 1e6], published))
    return rows


def _row(name: str, unit: str, runs: Sequence[float], published: float | None = None) -> Row:
    return Row(name, unit, statistics.median(runs) if runs else None, published, tuple(runs))


def _first(what: str, known: Published | None) -> float | None:
    """The published first token of a picture is its encode and its prefill."""
    if what == "text" or known is None or known.encode is None:
        return None
    if known.prompt is None or known.prefill is None:
        return None
    return round(known.encode + known.prompt / known.prefill, 3)


def _prefill(answer: dict[str, Any]) -> float | None:
    usage, seconds = answer["usage"], answer["timings"]["prefill"]
    computed = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
    return computed / seconds if seconds > 0 and computed > 0 else None


def _decode(answer: dict[str, Any]) -> float | None:
    """Tokens a second from the first token to the last."""
    timings, count = answer["timings"], answer["usage"]["completion_tokens"]
    seconds = timings["total"] - timings["first_token"]
    return (count - 1) / seconds if count > 1 and seconds > 0 else None


def _ask(endpoint: Endpoint, model: str, content: Any, tokens: int) -> dict[str, Any]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0,
    }
    answer = endpoint.whole(body)
    if not isinstance(answer.get("timings"), dict) or not isinstance(answer.get("usage"), dict):
        raise CtlError("the answer has no timings", code="protocol")
    return answer


def _text(words: int) -> str:
    """Return a prompt whose first word nobody has sent before."""
    first = f"{random.SystemRandom().randrange(1 << 48):x}"
    return " ".join([first, *random.choices(_VOCABULARY, k=words), "- tell a long story of it."])


def _picture_turn() -> list[dict[str, Any]]:
    uri = "data:image/png;base64," + b64encode(picture()).decode()
    said = "Describe this picture in every detail."
    return [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": said}]


def picture(width: int = WIDTH, height: int = HEIGHT) -> bytes:
    """Return a PNG of random blocks (PNG specification, third edition)."""
    side = 16
    rows = bytearray()
    for _ in range(-(-height // side)):
        line = b"".join(random.randbytes(3) * side for _ in range(-(-width // side)))
        rows += (b"\0" + line[: 3 * width]) * side
    data = bytes(rows[: height * (3 * width + 1)])
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(data, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def _soc(root: Path) -> str:
    reading = socs.read(Root(root.absolute() if str(root) != "/" else root))
    return reading.soc.platform if reading.soc is not None else ""


def _peak(pid: int) -> int | None:
    """Return the peak of a process's resident memory, bytes (proc(5), ``VmHWM``)."""
    try:
        match = _PEAK.search(Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def screen(report: dict[str, Any]) -> str:
    """Return a report for people."""
    head = ("figure", "here", "published", "ratio")
    table = [head]
    for row in report["figures"]:
        cells = [_cell(row[key], row["unit"]) for key in ("here", "published")]
        table.append((row["name"], *cells, "-" if row["ratio"] is None else f"{row['ratio']:.2f}"))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in table
    ]
    said = [f"{report['model']}: median of {report['repeats']}, answers of at most"
            f" {report['answer_tokens']} tokens"]  # fmt: skip
    if report["source"]:
        said.append(f"published for {report['like']} on {report['soc']}: {report['source']}")
    else:
        said.append(
            "nothing is published for this model and machine; --like and --soc choose others"
        )
    return "\n".join([*lines, "", *said])


def _cell(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:g} {unit}"


def progress(text: str) -> None:
    """Tell what is done, on standard error where that is a terminal."""
    if sys.stderr.isatty():
        print(f"rkvlmctl: {text}", file=sys.stderr)
