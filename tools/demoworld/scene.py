"""Random scenes of the demo world: pure data, nothing is drawn here.

A scene says what is in a picture (objects, text or nothing known) and the few facts of
its picture that decide whether it is held out from training (the background family).
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field, replace

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "grey")
SIZES = ("small", "large")
BACKGROUNDS = ("white", "light", "colour", "dark")
CHARS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
# Cells of the 3x3 grid in reading order.
PLACES = (
    "in the top left corner",
    "at the top",
    "in the top right corner",
    "on the left",
    "in the middle",
    "on the right",
    "in the bottom left corner",
    "at the bottom",
    "in the bottom right corner",
)
# A size is the square root of the bounding box's share of the picture.
SMALL_RANGE = (0.09, 0.16)
LARGE_RANGE = (0.24, 0.38)
SINGLE_LARGE_MAX = 0.8
HELD_OUT_SHARE = 10  # one combination in this many is kept for the evaluation

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Obj:
    """One shape; the centre and the extent are shares of the picture's width and height."""

    shape: str
    colour: str
    size: str
    cell: int
    rgb: RGB = (0, 0, 0)
    x: float = 0.5
    y: float = 0.5
    extent: float = 0.3
    polygon: tuple[tuple[float, float], ...] = ()  # in shares of the picture

    @property
    def place(self) -> str:
        """Where it is, as words."""
        return PLACES[self.cell]


@dataclass(frozen=True)
class Scene:
    """What one picture holds. ``objects`` are in reading order of their cells."""

    background: str = "white"
    rgb: RGB = (255, 255, 255)
    aspect: float = 1.0
    objects: tuple[Obj, ...] = ()
    text: str = ""
    clutter: bool = False  # unknown things: noise, squiggles, textures
    seed: int = 0  # seeds the drawing, so that a scene always gives the same picture
    tags: dict[str, float] = field(default_factory=dict, compare=False)

    def with_objects(self, objects: list[Obj]) -> Scene:
        """The same scene with other objects, put into reading order."""
        return replace(self, objects=tuple(sorted(objects, key=lambda o: o.cell)))


def held_out(*facts: object) -> bool:
    """Whether a combination of facts belongs to the evaluation only."""
    digest = hashlib.blake2s("|".join(map(str, facts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def object_held_out(obj: Obj, background: str) -> bool:
    """Shape, colour, cell and background family decide it for an object."""
    return held_out(obj.shape, obj.colour, obj.cell, background)


def text_held_out(text: str, background: str) -> bool:
    """A string is held out on a background family."""
    return held_out("text", text, background)


def scene_held_out(scene: Scene) -> bool:
    """Whether any part of the scene is a combination that training must not see."""
    if any(object_held_out(o, scene.background) for o in scene.objects):
        return True
    return bool(scene.text) and text_held_out(scene.text, scene.background)


def random_text(rng: random.Random, longest: int) -> str:
    """A string of letters and digits, now and then a word-like or a number-like one.

    A lone O, 0, X, I or 1 looks just like a shape or like each other, so it is left out.
    """
    n = rng.randint(1, longest)
    kind = rng.random()
    if n == 1:
        return rng.choice("ABCDEFGHJKLMNPQRSTUVWYZ23456789")
    if kind < 0.4:
        return "".join(rng.choice(CHARS[:26]) for _ in range(n))
    if kind < 0.55:
        return "".join(rng.choice(CHARS[26:]) for _ in range(n))
    if kind < 0.7:
        vowels, others = "AEIOU", "BCDFGHJKLMNPQRSTVWXYZ"
        start = rng.randint(0, 1)
        return "".join(rng.choice(vowels if (i + start) % 2 else others) for i in range(n))
    return "".join(rng.choice(CHARS) for _ in range(n))
