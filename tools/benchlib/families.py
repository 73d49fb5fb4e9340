"""Per family: a JPEG to encoder input, beside the family's image processor of ``transformers``.

Each way runs in a process of its own, which has its libraries loaded and has
prepared a small picture before: what counts is the time and the memory of one
more picture. Beside it stands what the fast path costs in pixels against the exact one.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .figures import BenchError, Figure, significant, spread

REPEATS = 5
#: Name, width and height in pixels; those with a target.
SIZES = (("640x480", 640, 480), ("12 megapixels", 4000, 3000), ("40 megapixels", 7304, 5478))
AIMED = ("12 megapixels", "40 megapixels")
LEAST_RATIO, MOST_SHARE = 3.0, 0.5
QUALITY = 90
TOKENS = 1280
LEVELS = "of 255"
#: Longest that one process may take, seconds.
PATIENCE = 600.0
WAYS = ("fast", "exact", "transformers")
#: Not a way to prepare a picture: the pixels of ``fast`` beside those of ``exact``.
PIXELS = "pixels"


def run(
    *,
    repeats: int = REPEATS,
    names: Sequence[str] = (),
    sizes: Sequence[tuple[str, int, int]] = SIZES,
) -> list[Figure]:
    """Measure every family that has an image processor; ``names`` chooses some."""
    from tests.parity.cases import CASES

    figures = []
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for size, width, height in sizes:
            path = Path(folder) / f"{width}x{height}.jpg"
            path.write_bytes(photo(width, height))
            files.append((size, path))
        for case in CASES:
            if names and case.name not in names:
                continue
            for size, path in files:
                found = {way: _measured(case.name, way, path, repeats) for way in (*WAYS, PIXELS)}
                figures += _figures(case.name, size, found)
    return figures


def _figures(family: str, size: str, found: dict[str, dict[str, Any]]) -> list[Figure]:
    fast, other = found["fast"], found["transformers"]
    aimed = size in AIMED
    ratio = other["seconds"]["median"] / fast["seconds"]["median"]
    share = fast["peak_bytes"] / max(1, other["peak_bytes"])
    error = found[PIXELS]
    detail = {**{way: found[way] for way in WAYS}, "views": fast["views"]}
    return [
        Figure(f"{family}, {size}: speed-up over transformers", ratio, "x",
               least=LEAST_RATIO if aimed else None, detail=detail),
        Figure(f"{family}, {size}: memory beside transformers", share, "x",
               most=MOST_SHARE if aimed else None),
        Figure(f"{family}, {size}: error of the fast path, mean", error["mean"], LEVELS,
               detail=error),
        Figure(f"{family}, {size}: error of the fast path, largest", error["largest"], LEVELS),
    ]  # fmt: skip


def table(figures: Sequence[Figure]) -> str:
    """Return what ``run`` found as Markdown: a row a family, three columns a size."""
    rows: dict[str, dict[str, list[Figure]]] = {}
    for figure in figures:
        family, _, rest = figure.name.partition(", ")
        rows.setdefault(family, {}).setdefault(rest.partition(":")[0], []).append(figure)
    sizes = list(next(iter(rows.values()), {}))
    titles = (f"{size}: speed | memory | error" for size in sizes)
    lines = [
        f"Targets at {' and '.join(AIMED)}: {LEAST_RATIO:g} x and {100 * MOST_SHARE:g} %. The"
        " error: levels of 255 between the fast and the exact path, the mean and the largest.",
        "",
        " | ".join(("| family", *titles)) + " |",
        "|---|" + "---:|---:|---:|" * len(sizes),
    ]
    for family, found in rows.items():
        cells = (_cells(*(figure.value for figure in found[size])) for size in sizes)
        lines.append(" | ".join((f"| {family}", *cells)) + " |")
    return "\n".join(lines) + "\n"


def _cells(ratio: float, share: float, mean: float, largest: float) -> str:
    return f"{ratio:.2g} x | {100 * share:.0f} % | {mean:.2f}, {largest:.0f}"


def _measured(family: str, way: str, path: Path, repeats: int) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__, family, way, str(path), str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise BenchError(f"{family}, {way}: {last}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def photo(width: int, height: int) -> bytes:
    """Return a JPEG with soft colours, edges and the noise of a camera: seeded."""
    import numpy as np
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(11)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(60):
        x, y, size = (int(v) for v in rng.integers(0, [width, height, max(2, width // 8)]))
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        draw.ellipse((x, y, x + size + 20, y + size + 20), fill=colour)
    noise = rng.integers(0, 9, (height, width, 1), np.uint8)
    pixels = np.asarray(image)
    pixels = np.maximum(pixels, 4) - 4 + np.minimum(noise, 255 - np.maximum(pixels, 4))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY, subsampling="4:2:0")
    return file.getvalue()


# --- in a process of its own ---------------------------------------------------------------


def _shipped(case: Any) -> Any:
    """Return the case with the largest picture that etc/models.d has: 1280 tokens, on both sides.

    Qwen's checkpoints allow 16 384, more than the context of any of our manifests.
    """
    from dataclasses import replace

    import msgspec

    first = case.encoders[0]
    if first.resize.rule != "aspect":
        return case
    most = TOKENS * first.resize.multiple**2
    resize = msgspec.structs.replace(first.resize, max_pixels=most)
    size = {"shortest_edge": resize.min_pixels, "longest_edge": most}
    return replace(
        case,
        encoders=(msgspec.structs.replace(first, resize=resize, tokens=TOKENS),),
        values={**case.values, "size": size},
    )


def _ours(case: Any, *, exact: bool) -> Any:
    """Return a function from a file's bytes to the ``pictures.Views`` that the encoders get."""
    from rkvlmd.engine import pictures
    from rkvlmd.models import views

    limits = pictures.Limits(1 << 30, 1 << 30, 1, 1 << 30)
    model = case.manifest

    def prepare(data: bytes) -> pictures.Views:
        return pictures.prepare_views(
            data, lambda w, h: views.plan(model, w, h), model.encoders, limits, exact=exact
        )

    return prepare


def difference(case: Any, data: bytes) -> dict[str, Any]:
    """Return how far the fast path's pixels are from the exact path's, in levels of 255.

    ``mean`` and ``largest`` are absolute differences over all values of all views.

    Raises:
      BenchError: the two make different views, or tensors of different shapes.

    """
    import numpy as np

    fast, exact = (_ours(case, exact=exact)(data) for exact in (False, True))
    if fast.plan != exact.plan:
        raise BenchError("the fast path cuts the picture otherwise than the exact one")
    total, count, largest = 0, 0, 0
    for view, one, other in zip(fast.plan.views, fast.tensors, exact.tensors, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            raise BenchError("the fast path makes a tensor of another layout than the exact one")
        encoder = case.manifest.encoders[view.encoder]
        apart = np.abs(levels(one, encoder) - levels(other, encoder))
        total, count = total + int(apart.sum()), count + apart.size
        largest = max(largest, int(apart.max()))
    return {"mean": significant(total / count), "largest": largest, "views": len(fast.tensors)}


def levels(tensor: Any, encoder: Any) -> Any:
    """Return the pixels that an encoder's input was made of, int16 0..255, in its layout.

    Patches come back as (patches, 3, the rest).
    """
    import numpy as np

    if encoder.patches is not None:
        tensor = tensor.reshape(tensor.shape[0], 3, -1)
    elif encoder.baked:
        return tensor.astype(np.int16)
    shape = [1] * tensor.ndim
    shape[1 if encoder.patches is not None or encoder.layout == "nchw" else -1] = 3
    mean, std = (np.asarray(v, np.float32).reshape(shape) for v in (encoder.mean, encoder.std))
    return np.rint((tensor * std + mean) * 255).astype(np.int16)


def _theirs(case: Any) -> Any:
    from PIL import Image, ImageOps

    processor = case.image_processor()

    def prepare(data: bytes) -> Any:
        Image.MAX_IMAGE_PIXELS = None
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        return processor(images=[image], return_tensors="np")

    return prepare


def _peak() -> int:
    """Return the largest resident size since ``_forget``, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise BenchError("this kernel does not tell the largest resident size")


def _forget() -> None:
    """Make the largest resident size start again from the present one (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def _child(family: str, way: str, path: str, repeats: int) -> None:
    import time

    from tests.parity.cases import CASES

    case = _shipped(next(case for case in CASES if case.name == family))
    if way == PIXELS:
        print(json.dumps(difference(case, Path(path).read_bytes())))
        return
    prepare = _theirs(case) if way == "transformers" else _ours(case, exact=way == "exact")
    prepare(photo(64, 48))
    data = Path(path).read_bytes()
    _forget()
    before = _peak()
    made = prepare(data)
    peak = _peak() - before
    views = {} if way == "transformers" else {"views": len(made.tensors)}
    # The next ones are made in the memory of this one, as in a prep child.
    del made
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        prepare(data)
        seconds.append(time.perf_counter() - began)
    found = {"seconds": spread(seconds), "peak_bytes": peak, "file_bytes": len(data)}
    print(json.dumps(found | views))


if __name__ == "__main__":
    _child(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
