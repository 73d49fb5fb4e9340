"""Draws strings with many fonts and tells where each character is."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from demoworld import colours
from demoworld.scene import CHARS, RGB, Scene

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Corners = list[tuple[float, float]]
DEFAULT_FOLDER = Path("/usr/share/fonts")
# Families that are clean and have upper-case letters; the pattern is a file name's start.
FAMILIES = (
    "DejaVuSans",
    "DejaVuSerif",
    "DejaVuSansMono",
    "LiberationSans",
    "LiberationSerif",
    "LiberationMono",
    "FreeSans",
    "FreeSerif",
    "FreeMono",
    "NotoSans-",
    "NotoSerif-",
    "NotoSansMono-",
    "NotoSansDisplay-",
    "Roboto-",
    "RobotoCondensed-",
    "RobotoSlab-",
    "OpenSans-",
    "Lato-",
    "Cantarell-",
    "Hack-",
    "FiraCode-",
    "Inconsolata",
    "Arimo-",
    "Tinos-",
    "Cousine-",
    "Carlito-",
    "Caladea-",
    "LinLibertine_R",
    "LinBiolinum_R",
    "NimbusSans-",
    "NimbusRoman-",
    "NimbusMonoPS-",
    "C059-",
    "P052-",
    "URWGothic-",
    "URWBookman-",
    "texgyre",
    "Ubuntu",
    "Arial",
    "Verdana",
    "Helvetica",
)
LEFT_OUT = (
    "Italic",
    "Oblique",
    "It.",
    "Thin",
    "ExtraLight",
    "UltraLight",
    "Hairline",
    "Black",
    "chorus",
    "LightIt",
    "Math",
    "math",
    "Ita",
    "_RI",
    "_RBI",
    "_RZ",
    "Light-",
    "FreeMono.",
)


class Fonts:
    """The fonts to draw with: files found in a folder, or Pillow's own when there is none."""

    def __init__(self, folder: Path | None = None, most: int = 120) -> None:
        self.paths: list[str] = []
        found: dict[str, Path] = {}
        root = folder or DEFAULT_FOLDER
        if root.is_dir():
            for path in sorted(root.rglob("*")):
                if path.suffix.lower() not in (".ttf", ".otf"):
                    continue
                name = path.name
                wanted = folder is not None or name.startswith(FAMILIES)
                if wanted and not any(part in name for part in LEFT_OUT):
                    found.setdefault(path.stem, path)
        for path in found.values():
            if len(self.paths) < most and self._usable(str(path)):
                self.paths.append(str(path))

    @staticmethod
    def _usable(path: str) -> bool:
        """Whether the font draws each of our characters differently enough from blank."""
        try:
            font = ImageFont.truetype(path, 20)
            boxes = [font.getbbox(c) for c in CHARS]
        except OSError:
            return False
        return all(b[2] - b[0] >= 2 and 9 <= b[3] - b[1] <= 24 for b in boxes)

    def pick(self, rng: random.Random) -> str:
        """A font's path, or the empty string for Pillow's own."""
        if not self.paths or rng.random() < 0.04:
            return ""
        return rng.choice(self.paths)


@functools.lru_cache(maxsize=3000)
def load(path: str, size: int) -> Font:
    """A font at a size in pixels."""
    if path:
        return ImageFont.truetype(path, size)
    return ImageFont.load_default(size)


def _inks(rng: random.Random, background: RGB) -> RGB:
    for _ in range(30):
        kind = rng.random()
        if kind < 0.45:
            v = rng.randint(0, 40) if sum(background) > 380 else rng.randint(215, 255)
            ink = (v, v, v)
        else:
            ink = colours.from_hsv(rng.uniform(0, 360), rng.random(), rng.random())
        if colours.distance(ink, background) >= 220:
            return ink
    return (0, 0, 0) if sum(background) > 380 else (255, 255, 255)


def _free_spot(
    rng: random.Random, scene: Scene, size: tuple[float, float]
) -> tuple[float, float] | None:
    """A centre (in shares) at which a box of the given size covers no object."""
    hx, hy = size[0] / 2, size[1] / 2
    if hx > 0.49 or hy > 0.49:
        return None
    for _ in range(12):
        x, y = rng.uniform(hx + 0.01, 0.99 - hx), rng.uniform(hy + 0.01, 0.99 - hy)
        if rng.random() < 0.25 and not scene.objects:
            x = y = 0.5
        for o in scene.objects:
            xs, ys = [p[0] for p in o.polygon], [p[1] for p in o.polygon]
            if (
                x - hx < max(xs) + 0.02
                and x + hx > min(xs) - 0.02
                and y - hy < max(ys) + 0.02
                and y + hy > min(ys) - 0.02
            ):
                break
        else:
            return x, y
    return None


def draw_text(
    rng: random.Random, image: Image.Image, scene: Scene, fonts: Fonts
) -> tuple[Image.Image, list[Corners], Image.Image]:
    """Writes the scene's text into the picture; returns it, each character's corners, the mask.

    Falls back to smaller letters until they fit; the height of a capital starts from a
    tenth of the picture's.
    """
    w, h = image.size
    text = scene.text
    path = fonts.pick(rng)
    gap = rng.uniform(0, 0.25) if rng.random() < 0.3 else 0.0
    # Widths are measured once at 100 pixels and scaled.
    ruler = load(path, 100)
    advances = [ruler.getlength(text[: i + 1]) / 100 + gap * (i + 1) for i in range(len(text))]
    starts = [0.0, *advances[:-1]]
    top, bottom = ruler.getbbox("H")[1] / 100, ruler.getbbox("H")[3] / 100
    cap = bottom - top
    most_w = 0.96 * w / max(advances[-1] - gap, 0.1)
    low = 0.105 * h / cap
    least_char = 6.8 / 128 * w / (advances[-1] / len(text))  # a character's narrowest width
    low = max(low, least_char)
    high = min(most_w, (0.8 if len(text) < 3 else 0.6) * h / cap)
    angle = rng.uniform(-9, 9) if rng.random() < 0.3 else 0.0
    spot = None
    size = 0.0
    for attempt in range(8):
        bias = rng.random() ** (1.0 + 0.6 * attempt)
        size = max(8.0, low + (max(high, low) - low) * bias)
        if attempt >= 6:
            size = min(low, most_w)
            angle = 0.0
        tw, th = size * (advances[-1] - gap), size * cap
        a = math.radians(abs(angle))
        bw = (tw * math.cos(a) + th * math.sin(a)) / w
        bh = (th * math.cos(a) + tw * math.sin(a)) / h
        spot = _free_spot(rng, scene, (bw, bh))
        if spot is not None:
            break
    if spot is None:
        spot = (0.5, 0.5)
        size = min(size, 0.94 * w / max(advances[-1] - gap, 0.1))
        angle = 0.0
    pixels = max(6, round(size))
    font = load(path, pixels)
    smooth = 1
    mask = Image.new("L", (w * smooth, h * smooth))
    pen = ImageDraw.Draw(mask)
    if rng.random() < 0.12:
        pen.fontmode = "1"  # aliased
    x0 = spot[0] * w - pixels * (advances[-1] - gap) / 2
    y0 = spot[1] * h - pixels * (top + bottom) / 2
    if gap:
        for c, s in zip(text, starts, strict=True):
            pen.text((x0 + s * pixels, y0), c, fill=255, font=font)
    else:
        pen.text((x0, y0), text, fill=255, font=font)
    centre = (spot[0] * w, spot[1] * h)
    if angle:
        mask = mask.rotate(angle, Image.Resampling.BICUBIC, center=centre)
    ink = _inks(rng, scene.rgb)
    image = image.copy()
    if rng.random() < 0.06:  # a shadow below
        shade = tuple(round(c * 0.6) for c in scene.rgb)
        image.paste(shade, (max(1, pixels // 20), max(1, pixels // 20)), mask)
    image.paste(ink, (0, 0), mask)
    turn = -math.radians(angle)
    boxes = []
    for i, s in enumerate(starts):
        e = (starts[i + 1] if i + 1 < len(starts) else advances[-1]) - gap
        corners = []
        for x, y in ((s, top), (e, top), (e, bottom), (s, bottom)):
            dx, dy = x0 + x * pixels - centre[0], y0 + y * pixels - centre[1]
            corners.append(
                (
                    (centre[0] + dx * math.cos(turn) - dy * math.sin(turn)) / w,
                    (centre[1] + dx * math.sin(turn) + dy * math.cos(turn)) / h,
                )
            )
        boxes.append(corners)
    return image, boxes, mask


def families(fonts: Fonts) -> Sequence[str]:
    """The file names, for the log."""
    return [Path(p).stem for p in fonts.paths]
