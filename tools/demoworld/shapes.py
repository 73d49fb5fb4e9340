"""Outlines of the five shapes and random placement of objects in a scene."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from demoworld import colours
from demoworld.scene import (
    BACKGROUNDS,
    COLOURS,
    LARGE_RANGE,
    SHAPES,
    SINGLE_LARGE_MAX,
    SIZES,
    SMALL_RANGE,
    Obj,
    Scene,
    object_held_out,
)

Point = tuple[float, float]
CELL_MARGIN = 0.06  # how far a centre stays from the border of its cell


def _turned(points: list[Point], degrees: float) -> list[Point]:
    a = math.radians(degrees)
    c, s = math.cos(a), math.sin(a)
    return [(x * c - y * s, x * s + y * c) for x, y in points]


def _ring(n: int, radius: float = 1.0, start: float = -90.0) -> list[Point]:
    step = 360.0 / n
    return [
        (
            radius * math.cos(math.radians(start + i * step)),
            radius * math.sin(math.radians(start + i * step)),
        )
        for i in range(n)
    ]


def outline(rng: random.Random, shape: str) -> list[Point]:
    """A polygon of the shape around (0, 0), in any of its variants, of no given size."""
    if shape == "circle":
        return _ring(40)
    if shape == "square":
        kind = rng.random()
        turn = 0.0 if kind < 0.6 else rng.uniform(-20, 20) if kind < 0.85 else 45.0
        return _turned([(-1, -1), (1, -1), (1, 1), (-1, 1)], turn)
    if shape == "triangle":
        kind = rng.random()
        turn = 0.0
        if kind < 0.55:
            points = _ring(3)
        else:
            w, skew = rng.uniform(0.8, 1.3), 0.0 if rng.random() < 0.7 else rng.uniform(-1, 1)
            points = [(skew * w, -1.0), (w, 1.0), (-w, 1.0)]
        which = rng.random()
        if which > 0.5:
            turn = rng.choice((180, 90, -90)) if which < 0.75 else rng.uniform(-180, 180)
        return _turned(points, turn)
    if shape == "star":
        kind = rng.random()
        n = 5 if kind < 0.76 else 4 if kind < 0.86 else 6
        inner = {
            5: rng.choice((0.382, 0.4, 0.45, 0.5, rng.uniform(0.33, 0.55))),
            4: rng.uniform(0.28, 0.42),
            6: rng.uniform(0.45, 0.6),
        }[n]
        points = []
        for a, b in zip(_ring(n), _ring(n, inner, -90 + 180 / n), strict=True):
            points += [a, b]
        return _turned(points, 0.0 if rng.random() < 0.6 else rng.uniform(-36, 36))
    t = rng.choice((0.2, 0.25, 0.3, 1 / 3, rng.uniform(0.14, 0.46)))
    points = [
        (-t, -1),
        (t, -1),
        (t, -t),
        (1, -t),
        (1, t),
        (t, t),
        (t, 1),
        (-t, 1),
        (-t, t),
        (-1, t),
        (-1, -t),
        (-t, -t),
    ]
    kind = rng.random()
    turn = 0.0 if kind < 0.55 else 45.0 if kind < 0.82 else rng.uniform(-45, 45)
    return _turned(points, turn)


def place(rng: random.Random, obj: Obj, aspect: float, alone: bool) -> Obj | None:
    """Gives the object its extent, centre and polygon, or None when it does not fit.

    ``aspect`` is width / height of the picture; shapes are regular in the picture as it is
    drawn and get stretched with it.
    """
    points = outline(rng, obj.shape)
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    w, h = max(xs) - min(xs), max(ys) - min(ys)
    cx, cy = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    low, high = SMALL_RANGE if obj.size == "small" else LARGE_RANGE
    if alone and obj.size == "large" and rng.random() < 0.5:
        low, high = LARGE_RANGE[1], SINGLE_LARGE_MAX
    extent = rng.uniform(low, high)
    unit = extent / math.sqrt(w * h)
    sx, sy = unit / math.sqrt(aspect), unit * math.sqrt(aspect)
    hx, hy = w * sx / 2, h * sy / 2
    if hx > 0.49 or hy > 0.49:
        return None
    row, col = divmod(obj.cell, 3)
    x0, x1 = max(col / 3 + CELL_MARGIN, hx + 0.01), min((col + 1) / 3 - CELL_MARGIN, 0.99 - hx)
    y0, y1 = max(row / 3 + CELL_MARGIN, hy + 0.01), min((row + 1) / 3 - CELL_MARGIN, 0.99 - hy)
    if x0 > x1 or y0 > y1:
        return None
    x, y = rng.uniform(x0, x1), rng.uniform(y0, y1)
    polygon = tuple((x + (px - cx) * sx, y + (py - cy) * sy) for px, py in points)
    return replace(obj, x=x, y=y, extent=extent, polygon=polygon)


def box(obj: Obj) -> tuple[float, float, float, float]:
    """The bounding box in shares of the picture."""
    xs, ys = [p[0] for p in obj.polygon], [p[1] for p in obj.polygon]
    return min(xs), min(ys), max(xs), max(ys)


def clashes(obj: Obj, others: list[Obj]) -> bool:
    """Whether the boxes come closer than a small gap."""
    gap = 0.012
    a = box(obj)
    for other in others:
        b = box(other)
        if a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap:
            return True
    return False


def random_aspect(rng: random.Random) -> float:
    """Width / height of a picture: mostly square, 4:3 or 16:9."""
    kind = rng.random()
    if kind < 0.5:
        return 1.0
    if kind < 0.68:
        return 4 / 3
    if kind < 0.8:
        return 16 / 9
    if kind < 0.88:
        return 3 / 4
    return math.exp(rng.uniform(math.log(0.5), math.log(2.0)))


def random_background(rng: random.Random) -> str:
    """A background family."""
    return rng.choices(BACKGROUNDS, (0.4, 0.22, 0.18, 0.2))[0]


def random_object(
    rng: random.Random,
    scene: Scene,
    others: list[Obj],
    alone: bool = False,
    want_held_out: bool | None = False,
    like: Obj | None = None,
    fixed: dict[str, str | int] | None = None,
) -> Obj | None:
    """A new object for the scene, or None when none was found in a few tries.

    ``want_held_out`` False keeps to combinations that training may see, True to the others
    and None takes any. ``like`` makes a hard negative likely: some attributes are repeated.
    """
    taken = {o.cell for o in others}
    free = [c for c in range(9) if c not in taken]
    for _ in range(24):
        facts: dict[str, str | int] = {
            "shape": rng.choice(SHAPES),
            "colour": rng.choice(COLOURS),
            "size": rng.choice(SIZES),
            "cell": 4 if alone and rng.random() < 0.3 else rng.choice(free),
        }
        if like is not None:
            key = rng.choice(("shape", "colour"))
            facts[key] = getattr(like, key)
        facts.update(fixed or {})
        obj = Obj(str(facts["shape"]), str(facts["colour"]), str(facts["size"]), int(facts["cell"]))
        if want_held_out is not None and object_held_out(obj, scene.background) != want_held_out:
            continue
        rgb = colours.sample(rng, obj.colour)
        if not colours.contrast(rgb, scene.rgb):
            continue
        placed = place(rng, replace(obj, rgb=rgb), scene.aspect, alone)
        if placed is not None and not clashes(placed, others):
            return placed
    return None


def object_scene(
    rng: random.Random, count: int, want_held_out: bool = False, like_share: float = 0.35
) -> Scene:
    """A scene of about ``count`` objects; held-out scenes have at least one held-out object."""
    family = random_background(rng)
    scene = Scene(family, colours.background(rng, family), random_aspect(rng))
    scene = replace(scene, seed=rng.getrandbits(31))
    objects: list[Obj] = []
    for i in range(count):
        like = rng.choice(objects) if objects and rng.random() < like_share else None
        wanted = (True if i == 0 else None) if want_held_out else False
        obj = random_object(rng, scene, objects, count == 1, wanted, like)
        if obj is not None:
            objects.append(obj)
    if not objects or (want_held_out and not object_held_out(objects[0], family)):
        return object_scene(rng, count, want_held_out, like_share)
    return scene.with_objects(objects)


def moved(rng: random.Random, scene: Scene) -> Scene:
    """The same things anew: other spots in the same cells, other variants of the shapes."""
    objects: list[Obj] = []
    for i, old in enumerate(scene.objects):
        others = [*objects, *scene.objects[i + 1 :]]
        new = place(rng, old, scene.aspect, False)
        objects.append(new if new is not None and not clashes(new, others) else old)
    return scene.with_objects(objects)
