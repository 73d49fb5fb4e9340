"""Held-out questions for the evaluation: pictures, messages and the expected answers.

Every shape scene holds at least one combination of shape, colour, cell and background family
that the training never draws, every string is kept from training on its background family,
and all random seeds differ from the training's. The ``independent`` set is drawn by other
code with plain outlines and standard colours.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from demoworld import independent, questions
from demoworld.draw import draw
from demoworld.pairs import Pair, ask_pair, random_pair
from demoworld.questions import Turn
from demoworld.scene import Scene
from demoworld.shapes import object_scene
from demoworld.stream import both_scene, nothing_scene, text_scene
from demoworld.text import Fonts
from demoworld.wording import SYSTEMS

SEED = 77_000_001
# Skill -> its row in the table.
SKILLS = {
    "caption": "captions of 1 to 4 objects",
    "count": "how many",
    "colour": "which colour",
    "shape": "which shape",
    "where": "where",
    "exists": "is there",
    "at": "what is at a place",
    "size": "how big",
    "read": "reading 1 to 6 characters",
    "which_picture": "two pictures: which has it",
    "different": "two pictures: what is different",
    "nth_picture": "two pictures: one of them",
    "follow_up": "follow-up questions",
    "nothing": "nothing known",
    "both": "shapes and text",
    "no_picture": "no picture",
}
MUST = ("caption", "count", "colour", "shape", "where", "exists")


@dataclass
class Case:
    """One question; ``history`` holds the true answers of earlier turns."""

    skill: str
    pictures: list[Image.Image]
    messages: list[dict[str, Any]]
    expected: str
    scene: str = ""  # a caption, for people


Maker = Callable[[random.Random, Scene | Pair], Image.Image]


def messages_for(
    rng: random.Random, turns: list[Turn], pictures: int, plain: bool = False
) -> list[dict[str, Any]]:
    """The conversation up to the last question, with picture places in the first message."""
    shown: list[dict[str, Any]] = [{"type": "image"}] * pictures
    asked: list[dict[str, Any]] = [{"type": "text", "text": turns[0].question}]
    first = shown + asked if plain or rng.random() < 0.8 else asked + shown
    messages: list[dict[str, Any]] = []
    if not plain and rng.random() < 0.2:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    messages.append({"role": "user", "content": first})
    for before, turn in itertools.pairwise(turns):
        messages.append({"role": "assistant", "content": before.answer})
        messages.append({"role": "user", "content": turn.question})
    return messages


def _single(rng: random.Random, skill: str, held_out: bool) -> tuple[list[Scene], list[Turn]]:
    """A scene and the turns that ask for the skill."""
    if skill == "read":
        scene = text_scene(rng, 6, held_out)
        return [scene], [questions.ask(rng, scene, "read")]
    if skill == "nothing":
        scene = nothing_scene(rng)
        return [scene], [questions.ask(rng, scene, "caption")]
    if skill == "both":
        scene = both_scene(rng, 4, held_out)
        return [scene], [questions.ask(rng, scene, rng.choice(("caption", "read")))]
    if skill == "no_picture":
        return [], [questions.no_picture(rng)]
    scene = object_scene(rng, rng.randint(1, 4), held_out)
    if skill == "follow_up":
        while True:
            kind = rng.choice(("caption", "shape", "where", "colour", "exists", "at"))
            turn = questions.ask(rng, scene, kind)
            if turn.topic is not None:
                more = questions.follow_up(rng, scene, turn.topic, turn.answer)
                return [scene], [turn, more]
            if rng.random() < 0.1:
                scene = object_scene(rng, rng.randint(1, 4), held_out)
    return [scene], [questions.ask(rng, scene, skill)]


def _two(rng: random.Random, skill: str, held_out: bool) -> tuple[list[Scene], list[Turn]]:
    """A pair of scenes and the turn that asks for the skill."""
    while True:
        pair = random_pair(rng, 4, held_out)
        turn = ask_pair(rng, pair, "one" if skill == "nth_picture" else skill)
        if turn is not None:
            return [pair.first, pair.second], [turn]


def cases(
    skill: str, count: int, fonts: Fonts, drawing: str = "world", held_out: bool = True
) -> Iterator[Case]:
    """``count`` questions of a skill; the same arguments always give the same ones.

    ``drawing`` is "world" for the training's routines (with held-out combinations) or
    "independent" for the plain ones.
    """
    plain = drawing == "independent"
    rng = random.Random(SEED + zlib.crc32(f"{skill} {drawing}".encode()))
    two = skill in ("which_picture", "different", "nth_picture")
    for _ in range(count):
        while True:
            scenes, turns = (_two if two else _single)(rng, skill, held_out)
            if not plain or all(independent.possible(s) for s in scenes):
                break
        if plain:
            pictures = independent.draw_all(rng, scenes)
        else:
            pictures = [draw(s, fonts).image for s in scenes]
        messages = messages_for(rng, turns, len(scenes))
        about = " / ".join(questions.caption(s) for s in scenes)
        yield Case(skill, pictures, messages, turns[-1].answer, about)
