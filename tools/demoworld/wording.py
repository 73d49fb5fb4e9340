"""How questions are worded: many templates for each, and small variations of all."""

from __future__ import annotations

import random

from demoworld.templates import TEMPLATES

SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "Answer briefly.",
    "Answer briefly.",
    "You are a helpful vision assistant.",
    "Be concise.",
    "You are a helpful AI assistant.",
    "Answer in one sentence.",
    "You describe pictures.",
    "You are an assistant that looks at pictures.",
    "Answer the question about the image.",
    "Be brief and precise.",
    "You are a camera assistant.",
    "Keep your answers short.",
)
TAILS = (
    " Answer in one sentence.",
    " Answer briefly.",
    " Please answer.",
    " Be brief.",
    " Answer with a short sentence.",
    " Keep it short.",
    " Thanks.",
    " Look carefully.",
)
INS = ("in this {pic}", "in the {pic}", "in this {pic}", "in the {pic}", "here")
PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
    "shape": "shapes",
}


def plural(noun: str) -> str:
    """The plural of a noun of this world."""
    return PLURALS.get(noun, noun + "s")


def article(phrase: str) -> str:
    """The phrase with "a" or "an"."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def word(rng: random.Random, key: str, inside: str = "", plain: bool = False, **slots: str) -> str:
    """A question of the kind ``key``.

    ``inside`` forces the words for {in} (such as "in the second picture"); ``plain`` leaves
    out the variations that do not belong to the template.
    """
    text = rng.choice(TEMPLATES[key])
    if "{in}" in text:
        words = inside or (rng.choice(INS) if rng.random() < 0.3 else "")
        text = text.replace("{in}", " " + words if words else "")
    pic = rng.choices(("picture", "image", "photo"), (0.5, 0.35, 0.15))[0]
    text = text.replace("{pic}", pic)
    for name, value in slots.items():
        text = text.replace("{" + name + "}", value)
    if rng.random() < 0.45:
        text = text.replace("colour", "color")
    if rng.random() < 0.45:
        text = text.replace("grey", "gray")
    if plain:
        return text
    kind = rng.random()
    if kind < 0.05:
        text = "Please " + text[0].lower() + text[1:] if text[-1] == "." else text
    elif kind < 0.1:
        text = text[:-1] + ", please" + text[-1] if text[-1] in "?." else text
    elif kind < 0.16:
        text = text.rstrip("?.")
    elif kind < 0.26:
        text = text[0].lower() + text[1:]
        if rng.random() < 0.4:
            text = text.rstrip("?.")
    elif kind < 0.29 and key not in ("hello", "read"):
        text = text.upper() if rng.random() < 0.15 else text.lower()
    elif kind < 0.36 and key != "hello":
        text += rng.choice(TAILS)
    return text


def asked_inside(rng: random.Random, nth: str) -> str:
    """Words such as "in the second picture"."""
    return f"in the {nth} {rng.choice(('picture', 'picture', 'image', 'photo'))}"
