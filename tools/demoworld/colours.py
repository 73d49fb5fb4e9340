"""Colours of the demo world: standard values, jitter and contrast."""

from __future__ import annotations

import colorsys
import random

from demoworld.scene import RGB

# Standard values: CSS names, matplotlib, material design and common palettes.
NAMED: dict[str, tuple[RGB, ...]] = {
    "red": (
        (255, 0, 0),
        (255, 0, 0),
        (255, 0, 0),
        (220, 20, 60),
        (214, 39, 40),
        (244, 67, 54),
        (229, 57, 53),
        (200, 0, 0),
        (178, 34, 34),
        (231, 76, 60),
        (211, 47, 47),
        (220, 30, 30),
        (204, 0, 0),
        (217, 30, 24),
        (230, 25, 75),
        (139, 0, 0),
        (255, 59, 48),
        (239, 68, 68),
    ),
    "orange": (
        (255, 165, 0),
        (255, 165, 0),
        (255, 165, 0),
        (255, 140, 0),
        (255, 127, 14),
        (255, 152, 0),
        (251, 140, 0),
        (245, 124, 0),
        (230, 126, 34),
        (243, 156, 18),
        (255, 128, 0),
        (255, 149, 0),
        (249, 115, 22),
        (245, 130, 48),
    ),
    "yellow": (
        (255, 255, 0),
        (255, 255, 0),
        (255, 255, 0),
        (255, 235, 59),
        (253, 216, 53),
        (255, 221, 0),
        (241, 212, 15),
        (240, 228, 66),
        (255, 225, 25),
        (255, 230, 0),
        (250, 220, 20),
        (255, 215, 0),
        (255, 204, 0),
        (234, 220, 8),
    ),
    "green": (
        (0, 128, 0),
        (0, 128, 0),
        (0, 255, 0),
        (0, 255, 0),
        (34, 139, 34),
        (50, 205, 50),
        (44, 160, 44),
        (76, 175, 80),
        (67, 160, 71),
        (46, 204, 113),
        (39, 174, 96),
        (0, 100, 0),
        (0, 160, 0),
        (60, 180, 75),
        (0, 200, 0),
        (46, 139, 87),
        (34, 197, 94),
    ),
    "blue": (
        (0, 0, 255),
        (0, 0, 255),
        (0, 0, 255),
        (31, 119, 180),
        (33, 150, 243),
        (30, 144, 255),
        (65, 105, 225),
        (0, 0, 139),
        (0, 0, 205),
        (52, 152, 219),
        (25, 118, 210),
        (0, 114, 178),
        (0, 80, 200),
        (0, 130, 200),
        (0, 122, 255),
        (59, 130, 246),
    ),
    "purple": (
        (128, 0, 128),
        (128, 0, 128),
        (128, 0, 128),
        (148, 103, 189),
        (156, 39, 176),
        (138, 43, 226),
        (123, 31, 162),
        (142, 68, 173),
        (155, 89, 182),
        (148, 0, 211),
        (145, 30, 180),
        (153, 50, 204),
        (110, 20, 150),
        (75, 0, 130),
        (168, 85, 247),
    ),
    "black": (
        (0, 0, 0),
        (0, 0, 0),
        (0, 0, 0),
        (17, 17, 17),
        (33, 33, 33),
        (20, 20, 20),
        (10, 10, 20),
    ),
    "grey": (
        (128, 128, 128),
        (128, 128, 128),
        (128, 128, 128),
        (127, 127, 127),
        (158, 158, 158),
        (105, 105, 105),
        (169, 169, 169),
        (117, 117, 117),
        (140, 140, 145),
        (149, 155, 156),
        (100, 100, 100),
    ),
}
# Ranges of hue (degrees), saturation and value for jittered colours.
RANGES: dict[str, tuple[float, float, float, float, float, float]] = {
    "red": (-10, 8, 0.7, 1.0, 0.6, 1.0),
    "orange": (23, 39, 0.8, 1.0, 0.88, 1.0),
    "yellow": (50, 62, 0.6, 1.0, 0.86, 1.0),
    "green": (88, 152, 0.5, 1.0, 0.38, 1.0),
    "blue": (204, 244, 0.6, 1.0, 0.5, 1.0),
    "purple": (266, 300, 0.45, 1.0, 0.4, 0.95),
    "black": (0, 360, 0.0, 0.3, 0.0, 0.13),
    "grey": (0, 360, 0.0, 0.06, 0.4, 0.66),
}


def from_hsv(hue: float, saturation: float, value: float) -> RGB:
    """Hue in degrees, the others 0 to 1."""
    r, g, b = colorsys.hsv_to_rgb((hue % 360) / 360, saturation, value)
    return round(r * 255), round(g * 255), round(b * 255)


def sample(rng: random.Random, name: str) -> RGB:
    """A value of the named colour: half the time a standard one."""
    if rng.random() < 0.5:
        return rng.choice(NAMED[name])
    h0, h1, s0, s1, v0, v1 = RANGES[name]
    return from_hsv(rng.uniform(h0, h1), rng.uniform(s0, s1), rng.uniform(v0, v1))


def background(rng: random.Random, family: str) -> RGB:
    """A background of the given family."""
    if family == "white":
        if rng.random() < 0.6:
            return 255, 255, 255
        v = rng.randint(244, 255)
        return v, v, v - rng.randint(0, 3)
    if family == "light":
        if rng.random() < 0.35:
            v = rng.randint(205, 243)
            return v, v, v
        return from_hsv(rng.uniform(0, 360), rng.uniform(0.03, 0.25), rng.uniform(0.84, 1.0))
    if family == "dark":
        if rng.random() < 0.35:
            v = rng.choice((0, 0, 10, 20, 30, 40))
            return v, v, v
        return from_hsv(rng.uniform(0, 360), rng.uniform(0.0, 0.7), rng.uniform(0.05, 0.25))
    return from_hsv(rng.uniform(0, 360), rng.uniform(0.2, 0.7), rng.uniform(0.35, 0.92))


def distance(a: RGB, b: RGB) -> float:
    """A cheap perceptual distance ("redmean"), 0 to about 765."""
    mean = (a[0] + b[0]) / 2
    dr, dg, db = a[0] - b[0], a[1] - b[1], a[2] - b[2]
    return float(
        ((2 + mean / 256) * dr * dr + 4 * dg * dg + (2 + (255 - mean) / 256) * db * db) ** 0.5
    )


def contrast(a: RGB, b: RGB) -> bool:
    """Whether an object of colour ``a`` stands out on ``b``."""
    return distance(a, b) >= 150
