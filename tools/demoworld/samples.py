"""The sample pictures that come with ``rkvlmd demo``, with a question or two for each."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE = 448
Point = tuple[float, float]


@dataclass(frozen=True)
class Sample:
    """Picture files, the questions to ask in turn, and the right answers."""

    files: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]


SAMPLES = (
    Sample(
        ("shapes.png",),
        ("What is in this picture?",),
        (
            "A large red circle in the top left corner, a small blue star in the middle and "
            "a small green cross on the right.",
        ),
    ),
    Sample(
        ("circles.png",),
        ("How many circles are there?", "Is there a red square?"),
        ("There are three circles.", "No, there is no red square."),
    ),
    Sample(("sign.jpg",), ("What does it say?",), ("It says HELLO.",)),
    Sample(
        ("night.png",),
        ("Which shape is yellow?", "And where is it?", "How big is it?"),
        ("The star is yellow.", "It is in the top right corner.", "It is large."),
    ),
    Sample(
        ("before.png", "after.png"),
        ("What is different?", "Which picture has the green triangle?"),
        (
            "The first picture has a green triangle and the second picture has an orange triangle.",
            "The first picture has the green triangle.",
        ),
    ),
)


def _star(x: float, y: float, r: float) -> list[Point]:
    return [
        (
            x + r * s * math.cos(math.pi * i / 5 - math.pi / 2),
            y + r * s * math.sin(math.pi * i / 5 - math.pi / 2),
        )
        for i in range(10)
        for s in ((1.0, 0.42)[i % 2],)
    ]


def _cross(x: float, y: float, r: float, t: float) -> list[Point]:
    return [
        (x - t, y - r),
        (x + t, y - r),
        (x + t, y - t),
        (x + r, y - t),
        (x + r, y + t),
        (x + t, y + t),
        (x + t, y + r),
        (x - t, y + r),
        (x - t, y + t),
        (x - r, y + t),
        (x - r, y - t),
        (x - t, y - t),
    ]


def _sheet(colour: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (SIDE * 2, SIDE * 2), colour)
    return image, ImageDraw.Draw(image)


def _disc(pen: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: str) -> None:
    pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)


def pictures() -> dict[str, Image.Image]:
    """File name to picture, SIDE x SIDE; drawn at twice the size for smooth edges."""
    out: dict[str, Image.Image] = {}
    image, pen = _sheet("white")
    _disc(pen, 180, 180, 130, "#e53935")
    pen.polygon(_star(448, 450, 68), fill="#1e66d0")
    pen.polygon(_cross(745, 450, 56, 20), fill="#2e9e3f")
    out["shapes.png"] = image
    image, pen = _sheet("#f3efe4")
    _disc(pen, 150, 150, 58, "#7b1fa2")
    _disc(pen, 740, 448, 125, "#fb8c00")
    _disc(pen, 180, 740, 118, "#1976d2")
    pen.polygon([(448, 640), (570, 850), (326, 850)], fill="#2e7d32")
    pen.rectangle((395, 90, 500, 195), fill="#424242")
    out["circles.png"] = image
    image, pen = _sheet("#0d47a1")
    font = ImageFont.load_default(210)
    x0, y0, x1, y1 = pen.textbbox((0, 0), "HELLO", font=font)
    pen.text((SIDE - (x0 + x1) / 2, SIDE - (y0 + y1) / 2), "HELLO", fill="white", font=font)
    out["sign.jpg"] = image
    image, pen = _sheet("#151b2e")
    pen.polygon(_star(700, 190, 145), fill="#fdd835")
    pen.rectangle((95, 660, 330, 880), fill="#d32f2f")
    _disc(pen, 448, 448, 60, "#43a047")
    out["night.png"] = image
    for name, colour in (("before.png", "#2e9e3f"), ("after.png", "#fb8c00")):
        image, pen = _sheet("#fafafa")
        pen.rectangle((60, 330, 300, 570), fill="#1e66d0")
        pen.polygon([(740, 640), (870, 860), (610, 860)], fill=colour)
        _disc(pen, 448, 130, 56, "#757575")
        out[name] = image
    return {k: v.resize((SIDE, SIDE), Image.Resampling.LANCZOS) for k, v in out.items()}


def write_samples(folder: Path) -> list[Sample]:
    """Writes the pictures, each below 60 kB, and returns the samples."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in pictures().items():
        if name.endswith(".jpg"):
            image.save(folder / name, quality=85)
        else:
            image.save(folder / name, optimize=True)
    return list(SAMPLES)


def random_demo(seed: int, folder: Path) -> tuple[Path, str]:
    """One more picture of the world, for trying things out; returns it and its caption."""
    from demoworld.draw import draw
    from demoworld.questions import caption
    from demoworld.shapes import object_scene
    from demoworld.text import Fonts

    scene = object_scene(random.Random(seed), 3)
    path = folder / f"random-{seed}.png"
    draw(scene, Fonts()).image.save(path)
    return path, caption(scene)
