"""Draws a scene as a picture, with several independent routines, and its label maps.

The label maps (128 x 128, which object or character covers a pixel) feed the auxiliary
losses of the training; nothing else needs them.
"""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from demoworld import colours, text
from demoworld.scene import RGB, Obj, Scene

SIDE = 128  # the model's picture
Pixels = list[tuple[float, float]]
Mask = npt.NDArray[np.float32]


@dataclass
class Drawn:
    """A picture and where its objects (1..) and characters (1..) are, on SIDE x SIDE."""

    image: Image.Image
    objects: npt.NDArray[np.uint8]
    chars: npt.NDArray[np.uint8]
    ink: npt.NDArray[np.bool_]  # where a shape or a stroke of a character is


def stretch(image: Image.Image) -> Image.Image:
    """The model's only resize rule: any picture becomes SIDE x SIDE."""
    image = image.convert("RGB")
    if image.size == (SIDE, SIDE):
        return image
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _backdrop(rng: random.Random, scene: Scene, w: int, h: int) -> Image.Image:
    if rng.random() < 0.8:
        return Image.new("RGB", (w, h), scene.rgb)
    amount = rng.uniform(4, 22)
    kind = rng.random()
    if kind < 0.6:  # a soft gradient in any direction
        a = rng.uniform(0, 2 * math.pi)
        gx = np.linspace(-1, 1, w, dtype=np.float32) * math.cos(a)
        gy = np.linspace(-1, 1, h, dtype=np.float32) * math.sin(a)
        ramp = (gx[None, :] + gy[:, None]) * amount
    elif kind < 0.85:  # soft blotches
        small = np.random.default_rng(rng.getrandbits(32)).normal(0, amount / 2, (6, 6))
        blotch = Image.fromarray(small.astype(np.float32))
        ramp = np.asarray(blotch.resize((w, h), Image.Resampling.BICUBIC))
    else:  # faint lines
        step = rng.randint(6, 24)
        ramp = np.zeros((h, w), np.float32)
        if rng.random() < 0.5:
            ramp[::step] = -amount
        else:
            ramp[::step] = ramp[:, ::step] = -amount
    base = np.asarray(scene.rgb, np.float32)
    return Image.fromarray(np.clip(base + ramp[..., None], 0, 255).astype(np.uint8))


def _distance_mask(points: Pixels, w: int, h: int, line: float, soft: float) -> Mask:
    """Coverage of a polygon (or of its outline) from its signed distance, without PIL."""
    px, py = np.meshgrid(np.arange(w) + 0.5, np.arange(h) + 0.5)
    best = np.full((h, w), 1e9)
    inside = np.zeros((h, w), bool)
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
        ex, ey = bx - ax, by - ay
        t = np.clip(((px - ax) * ex + (py - ay) * ey) / max(ex * ex + ey * ey, 1e-9), 0, 1)
        best = np.minimum(best, (px - ax - t * ex) ** 2 + (py - ay - t * ey) ** 2)
        crosses = (ay > py) != (by > py)
        if ay != by:
            inside ^= crosses & (px < (py - ay) / (by - ay) * ex + ax)
    signed = np.where(inside, -np.sqrt(best), np.sqrt(best))
    if line:
        signed = np.maximum(signed, -signed - line)
    out: Mask = np.clip(0.5 - signed / soft, 0, 1).astype(np.float32)
    return out


def _pil_mask(points: Pixels, w: int, h: int, line: float, scale: int) -> Mask:
    """Coverage of a polygon (or of its outline) drawn by PIL, ``scale`` times larger."""
    big = Image.new("L", (w * scale, h * scale))
    pen = ImageDraw.Draw(big)
    corners = [(x * scale, y * scale) for x, y in points]
    if line:
        width = max(1, round(line * scale))
        pen.line([*corners, corners[0], corners[1]], fill=255, width=width, joint="curve")
    else:
        pen.polygon(corners, fill=255)
    if scale > 1:
        big = big.reduce(scale)
    out: Mask = np.asarray(big, np.float32) / np.float32(255)
    return out


def _paint(rng: random.Random, rgb: RGB, w: int, h: int) -> npt.NDArray[np.float32]:
    """The filling: one colour, or a gradient, stripes or grain within that colour."""
    base = np.asarray(rgb, np.float32)
    plain: npt.NDArray[np.float32] = np.broadcast_to(base, (h, w, 3))
    kind = rng.random()
    if kind < 0.72:
        return plain
    strength = rng.uniform(0.06, 0.2) * 255
    strength = min(strength, 22.0) if max(rgb) < 50 or max(rgb) - min(rgb) < 20 else strength
    x = np.linspace(-1, 1, w, dtype=np.float32)[None, :, None]
    y = np.linspace(-1, 1, h, dtype=np.float32)[:, None, None]
    shade: npt.NDArray[Any]
    if kind < 0.86:
        a = rng.uniform(0, 2 * math.pi)
        shade = (x * math.cos(a) + y * math.sin(a)) * strength
        if rng.random() < 0.3:
            shade = (0.5 - np.sqrt(x * x + y * y)) * strength
    elif kind < 0.94:
        a, f = rng.uniform(0, math.pi), rng.uniform(4, 14)
        shade = np.sin((x * math.cos(a) + y * math.sin(a)) * f) * strength * 0.8
    else:
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 0.7, (h, w, 1))
        shade = noise.astype(np.float32) * strength
    scale = np.maximum(base, 40) / 255  # keeps the hue
    return np.clip(plain + shade * scale, 0, 255).astype(np.float32)


def _draw_object(rng: random.Random, canvas: npt.NDArray[np.float32], obj: Obj) -> None:
    height, width = canvas.shape[:2]
    xs, ys = [p[0] * width for p in obj.polygon], [p[1] * height for p in obj.polygon]
    extent = math.sqrt((max(xs) - min(xs)) * (max(ys) - min(ys)))
    pad = math.ceil(extent * 0.16) + 3
    x0, y0 = max(0, math.floor(min(xs)) - pad), max(0, math.floor(min(ys)) - pad)
    x1, y1 = min(width, math.ceil(max(xs)) + pad), min(height, math.ceil(max(ys)) + pad)
    w, h = x1 - x0, y1 - y0
    points = [(x - x0, y - y0) for x, y in zip(xs, ys, strict=True)]
    region = canvas[y0:y1, x0:x1]

    routine = rng.random()
    scale = 1 if routine < 0.25 else 2 if routine < 0.45 else 3
    by_distance = routine > 0.7 and w * h * len(points) < 400_000
    soft = rng.uniform(0.7, 1.6)

    def mask(line: float = 0.0) -> Mask:
        if by_distance:
            return _distance_mask(points, w, h, line, soft)
        return _pil_mask(points, w, h, line, scale)

    style = rng.random()
    thin = 0.16 if obj.shape in ("star", "cross") else 0.28
    pixel = max(width, height) / SIDE
    fill = mask()
    if rng.random() < 0.07:  # a drop shadow
        dx = rng.choice((-1, 1)) * max(1, round(extent * 0.04))
        dy = max(1, round(extent * rng.uniform(0.02, 0.06)))
        shadow = np.roll(fill, (dy, dx), (0, 1))[..., None] * rng.uniform(0.2, 0.5)
        region *= 1 - shadow
    ink: RGB | None = None
    if style < 0.17:  # an outline without a filling
        low = 2.2 * pixel if obj.size == "small" else max(2.4 * pixel, extent * 0.05)
        fill = mask(max(low, rng.uniform(0.05, thin) * extent))
    elif style < 0.32:  # a border around the filling
        ink = (0, 0, 0) if rng.random() < 0.6 else (255, 255, 255)
        if rng.random() < 0.2 or obj.colour in ("black", "grey"):
            ink = tuple(round(c * 0.6) for c in obj.rgb)  # type: ignore[assignment]
    region += (_paint(rng, obj.rgb, w, h) - region) * fill[..., None]
    if ink is not None:
        top = 0.035 if obj.size == "small" else 0.07
        edge = mask(max(1.0 * pixel, rng.uniform(0.015, top) * extent))
        region += (np.asarray(ink, np.float32) - region) * edge[..., None]


def _clutter(rng: random.Random, image: Image.Image) -> Image.Image:
    """Things that have no name in this world: squiggles, lines, grain, blobs, ramps."""
    w, h = image.size
    kind = rng.random()
    pen = ImageDraw.Draw(image)
    if kind < 0.15:
        return image
    if kind < 0.35:
        noise = np.random.default_rng(rng.getrandbits(32))
        size = rng.choice((4, 8, 16, 32, 64, 128))
        grain = noise.integers(0, 256, (size, size, 3), dtype=np.uint8)
        other = Image.fromarray(grain).resize((w, h), rng.choice(list(Image.Resampling)[:4]))
        return Image.blend(image, other, rng.uniform(0.2, 1.0))
    if kind < 0.6:
        for _ in range(rng.randint(1, 6)):
            x, y, a = rng.uniform(0, w), rng.uniform(0, h), rng.uniform(0, 6.3)
            points = [(x, y)]
            for _ in range(rng.randint(1, 40)):
                a += rng.uniform(-0.6, 0.6)
                x, y = x + math.cos(a) * w / 20, y + math.sin(a) * h / 20
                points.append((x, y))
            ink = colours.from_hsv(rng.uniform(0, 360), rng.random(), rng.random())
            pen.line(points, fill=ink, width=max(1, rng.randint(1, 4) * w // 128))
        return image
    if kind < 0.75:
        step, width = rng.randint(8, 30) * w // 128, max(1, rng.randint(1, 8) * w // 128)
        ink = colours.from_hsv(rng.uniform(0, 360), rng.random(), rng.random())
        slope = rng.choice((0, 0, rng.uniform(-1, 1)))
        upright = rng.random() < 0.5
        for at in range(-w, 2 * w, max(2, step)):
            ends = (at, 0, at + slope * h, h) if upright else (0, at, w, at + slope * w)
            pen.line(ends, fill=ink, width=width)
        return image
    if kind < 0.88:
        across = np.linspace(-1, 1, w)[None, :, None]
        down = np.linspace(-1, 1, h)[:, None, None]
        c = [np.array([rng.randint(0, 255) for _ in range(3)]) for _ in range(2)]
        a = rng.uniform(0, 6.3)
        t = np.clip(0.5 + (across * math.cos(a) + down * math.sin(a)) / 2.2, 0, 1)
        return Image.fromarray((c[0] * t + c[1] * (1 - t)).astype(np.uint8))
    for _ in range(rng.randint(1, 4)):  # soft blobs of no clear shape
        cx, cy, r = rng.uniform(0, w), rng.uniform(0, h), rng.uniform(0.08, 0.3) * min(w, h)
        waves = [(rng.uniform(0.1, 0.3), rng.randint(2, 5), rng.uniform(0, 6.3)) for _ in "12"]
        points = []
        for i in range(48):
            a = i * math.pi / 24
            d = r * (1 + sum(s * math.sin(n * a + p) for s, n, p in waves))
            points.append((cx + d * math.cos(a), cy + d * math.sin(a)))
        pen.polygon(points, fill=colours.from_hsv(rng.uniform(0, 360), rng.random(), rng.random()))
    return image


def _camera(rng: random.Random, image: Image.Image) -> Image.Image:
    """Blur, brightness, contrast, noise and JPEG, each now and then."""
    pixel = max(image.size) / SIDE
    if rng.random() < 0.22:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.9) * pixel))
    if rng.random() < 0.2:
        image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.88, 1.1))
    if rng.random() < 0.2:
        image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.8, 1.15))
    if rng.random() < 0.25:
        level = rng.uniform(1, 10) * min(pixel, 2)
        w, h = image.size
        noise = np.random.default_rng(rng.getrandbits(32)).standard_normal((h, w), np.float32)
        grey = (noise * level)[..., None] + np.asarray(image, np.float32)
        image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
    if rng.random() < 0.25:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=rng.randint(30, 95))
        image = Image.open(stream)
        image.load()
    return image


def canvas_size(rng: random.Random, aspect: float) -> tuple[int, int]:
    """The longer side is 96 to 512, mostly small, because small is quick."""
    kind = rng.random()
    long = rng.randint(96, 160) if kind < 0.5 else rng.randint(160, 288)
    if kind > 0.9:
        long = rng.choice((320, 384, 448, 448, 512))
    if kind < 0.12:
        long = 128
    if aspect >= 1:
        return long, max(48, round(long / aspect))
    return max(48, round(long * aspect)), long


def label_map(polygons: list[Pixels]) -> npt.NDArray[np.uint8]:
    """Which polygon (1..) covers each pixel; corners are shares of the picture."""
    image = Image.new("L", (SIDE, SIDE))
    pen = ImageDraw.Draw(image)
    for i, polygon in enumerate(polygons, 1):
        pen.polygon([(x * SIDE, y * SIDE) for x, y in polygon], fill=i)
    return np.asarray(image)


def draw(scene: Scene, fonts: text.Fonts) -> Drawn:
    """The picture of a scene; the same scene always gives the same picture."""
    rng = random.Random(scene.seed)
    w, h = canvas_size(rng, scene.aspect)
    image = _backdrop(rng, scene, w, h)
    if scene.clutter:
        image = _clutter(rng, image)
    if scene.objects:
        canvas = np.array(image, np.float32)
        for obj in scene.objects:
            _draw_object(rng, canvas, obj)
        image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    boxes: list[Pixels] = []
    strokes = image
    if scene.text:
        image, boxes, strokes = text.draw_text(rng, image, scene, fonts)
    image = _camera(rng, image)
    objects = label_map([list(o.polygon) for o in scene.objects])
    ink = objects > 0
    if scene.text:
        ink |= np.asarray(strokes.resize((SIDE, SIDE), Image.Resampling.BOX)) > 100
    return Drawn(stretch(image), objects, label_map(boxes), ink)
