"""Plain drawing with ImageDraw on a large sheet, sharing no routine with the training's.

It draws what a person would with a few lines of code: whole shapes in standard colours.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

from PIL import Image, ImageColor, ImageDraw, ImageFont

from demoworld.scene import RGB, Obj, Scene

PLAIN: dict[str, tuple[str, ...]] = {
    "red": ("red", "#e02020", "#cc0000", "crimson"),
    "orange": ("orange", "darkorange", "#ff9900", "#f58220"),
    "yellow": ("yellow", "gold", "#ffee00", "#ffe119"),
    "green": ("green", "lime", "forestgreen", "#2ca02c", "limegreen"),
    "blue": ("blue", "royalblue", "#1f77b4", "dodgerblue", "mediumblue"),
    "purple": ("purple", "darkviolet", "#9467bd", "rebeccapurple", "blueviolet"),
    "black": ("black", "#111111"),
    "grey": ("grey", "#808080", "darkgrey", "#999999"),
}
SHEETS: dict[str, tuple[str, ...]] = {
    "white": ("white", "#fafafa"),
    "light": ("lightyellow", "aliceblue", "lavender", "honeydew", "beige", "#eeeeee"),
    "colour": ("skyblue", "khaki", "darkseagreen", "tan", "plum", "steelblue"),
    "dark": ("#101010", "#202030", "midnightblue", "#222222"),
}
SIDE = 448


def possible(scene: Scene) -> bool:
    """Whether this module can draw the scene: no unknown things, not too wide."""
    return not scene.clutter and 0.6 <= scene.aspect <= 1.7


def _far(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return sum(abs(x - y) for x, y in zip(a[:3], b[:3], strict=True)) > 150


def _ink(rng: random.Random, names: tuple[str, ...], sheet: tuple[int, ...]) -> str | None:
    good = [n for n in names if _far(ImageColor.getrgb(n), sheet)]
    return rng.choice(good) if good else None


def _star(x: float, y: float, rx: float, ry: float, inner: float) -> list[tuple[float, float]]:
    points = []
    for i in range(10):
        r = 1.0 if i % 2 == 0 else inner
        a = math.pi * i / 5 - math.pi / 2
        points.append((x + rx * r * math.cos(a), y + ry * r * math.sin(a)))
    return points


def _shape(
    pen: ImageDraw.ImageDraw, rng: random.Random, obj: Obj, w: int, h: int, ink: str
) -> None:
    """One shape of the object's extent at its centre, kept inside the sheet."""
    side = min(obj.extent, 0.62) * math.sqrt(w * h) / 2
    x = min(max(obj.x * w, side + 2), w - side - 2)
    y = min(max(obj.y * h, side + 2), h - side - 2)
    if obj.shape == "circle":
        pen.ellipse((x - side, y - side, x + side, y + side), fill=ink)
    elif obj.shape == "square":
        pen.rectangle((x - side, y - side, x + side, y + side), fill=ink)
    elif obj.shape == "triangle":
        tip = -side if rng.random() < 0.8 else side
        pen.polygon([(x, y + tip), (x + side, y - tip), (x - side, y - tip)], fill=ink)
    elif obj.shape == "star":
        pen.polygon(_star(x, y, side, side, rng.choice((0.38, 0.4, 0.5))), fill=ink)
    else:
        width = max(3, round(side * rng.choice((0.4, 0.5, 0.66))))
        if rng.random() < 0.7:
            pen.line((x - side, y, x + side, y), fill=ink, width=width)
            pen.line((x, y - side, x, y + side), fill=ink, width=width)
        else:
            d = side * 0.9
            pen.line((x - d, y - d, x + d, y + d), fill=ink, width=width)
            pen.line((x - d, y + d, x + d, y - d), fill=ink, width=width)


def draw_all(rng: random.Random, scenes: list[Scene]) -> list[Image.Image]:
    """Pictures of the scenes of one question; objects they share keep their colours."""
    sheet = rng.choice(SHEETS[scenes[0].background]) if scenes else "white"
    rgb = ImageColor.getrgb(sheet)
    inks: dict[str, str] = {}
    pictures = []
    for scene in scenes:
        w = SIDE if scene.aspect <= 1 else round(SIDE * scene.aspect)
        h = SIDE if scene.aspect >= 1 else round(SIDE / scene.aspect)
        image = Image.new("RGB", (w, h), sheet)
        for obj in scene.objects:
            if obj.colour not in inks:
                ink = _ink(rng, PLAIN[obj.colour], rgb)
                if ink is None:  # does not stand out: use a white sheet for all
                    return draw_all(rng, [_on_white(s) for s in scenes])
                inks[obj.colour] = ink
            _shape(ImageDraw.Draw(image), rng, obj, w, h, inks[obj.colour])
        if scene.text:
            _write(rng, image, scene, rgb)
        pictures.append(image)
    return pictures


def _on_white(scene: Scene) -> Scene:
    return replace(scene, background="white")


def _write(rng: random.Random, image: Image.Image, scene: Scene, sheet: tuple[int, ...]) -> None:
    pen = ImageDraw.Draw(image)
    w, h = image.size
    ink: RGB = (0, 0, 0) if sum(sheet[:3]) > 380 else (255, 255, 255)
    size = round(h * rng.uniform(0.16, 0.5))
    while True:
        font = ImageFont.load_default(size)
        x0, y0, x1, y1 = pen.textbbox((0, 0), scene.text, font=font)
        if x1 - x0 <= 0.9 * w or size < 30:
            break
        size = round(size * 0.9)
    x = rng.uniform(0.04 * w, 0.96 * w - (x1 - x0)) - x0
    if not scene.objects:
        y = rng.uniform(0.05 * h, 0.95 * h - (y1 - y0)) - y0
    else:  # the half that is freer
        top = sum(o.y for o in scene.objects) / len(scene.objects) > 0.5
        y = (0.04 * h if top else 0.96 * h - (y1 - y0)) - y0
    pen.text((x, y), scene.text, fill=ink, font=font)
