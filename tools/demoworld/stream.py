"""An endless stream of training batches that follows the curriculum."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from demoworld import colours, questions
from demoworld.draw import SIDE, Drawn, draw
from demoworld.pack import Group, Rows, build_group, lay_out
from demoworld.pairs import Pair, ask_pair, random_pair
from demoworld.questions import Turn
from demoworld.scene import (
    CHARS,
    COLOURS,
    SHAPES,
    SIZES,
    Scene,
    random_text,
    text_held_out,
)
from demoworld.shapes import object_scene, random_aspect, random_background
from demoworld.text import Fonts
from demoworld.tokens import Encoder

PATCH = 8
SIDE_PATCHES = SIDE // PATCH
PATCHES = SIDE_PATCHES**2
TOKENS = PATCHES // 4
LONGEST = 6  # characters
LENGTH = 384  # tokens of a row
IGNORE = -100
LISTED = ("colour", "shape", "where", "count", "size")  # skills whose answers may be lists
LOOK = 8  # side of the small mask that shows how an object or character looks
# The auxiliary heads: name -> number of classes (0 is "none" where there is a none).
PATCH_HEADS = {
    "colour": len(COLOURS) + 1,
    "shape": len(SHAPES) + 1,
    "size": len(SIZES) + 1,
    "char": len(CHARS) + 1,
    "order": LONGEST + 1,
}
TOKEN_HEADS = {
    "cell": 10,
    "centre_colour": len(COLOURS),
    "centre_shape": len(SHAPES),
    "centre_size": len(SIZES),
}
# What is in the left and in the right half of an image token.
HALF_HEADS = {
    "left_char": len(CHARS) + 1,
    "right_char": len(CHARS) + 1,
    "left_order": LONGEST + 1,
    "right_order": LONGEST + 1,
}
Bytes = npt.NDArray[np.uint8]
Longs = npt.NDArray[np.int64]


@dataclass
class Batch:
    """Pictures, packed conversations about them and the labels of the auxiliary heads."""

    pixels: Bytes  # (pictures, SIDE, SIDE, 3)
    rows: Rows
    labels: dict[str, Longs]
    used: int  # tokens that are not padding
    ink: npt.NDArray[np.bool_] | None = None  # (pictures, SIDE, SIDE)
    boxes: npt.NDArray[np.float32] | None = None  # (pictures, PATCHES, 4), NaN where none
    looks: npt.NDArray[np.float32] | None = None  # (pictures, PATCHES, LOOK * LOOK)


@dataclass(frozen=True)
class Mix:
    """What the stream holds at one point of the curriculum."""

    objects: tuple[float, ...] = (0.2, 0.22, 0.25, 0.26, 0.05, 0.02)
    text: float = 0.22
    longest: int = LONGEST
    nothing: float = 0.05
    both: float = 0.05  # shapes and text
    pairs: float = 0.11
    room: int = 210  # tokens of conversation about one picture
    talk: float = 1.0  # share of the batches that have conversations
    lists: float = 0.0  # share of the questions that rather ask about several objects
    like: float = 0.35  # how often an object takes after an earlier one


def curriculum(progress: float) -> Mix:
    """The mixture at a point of the training, 0 to 1."""
    if progress < 0.02:
        return Mix((0.6, 0.4), 0.3, 2, 0.04, 0.0, 0.0)
    if progress < 0.08:
        return Mix((0.3, 0.3, 0.25, 0.15), 0.3, 4, 0.04, 0.02, 0.02, 140, 0.6)
    if progress < 0.25:  # seeing is the hard part: fewer questions, more pictures
        return Mix((0.2, 0.25, 0.25, 0.25, 0.05), 0.35, 4, 0.03, 0.03, 0.04, 140, 0.5)
    if progress < 0.38:
        return Mix((0.26, 0.28, 0.24, 0.2, 0.02), 0.22, LONGEST, 0.04, 0.03, 0.07, 180)
    # Lists ("The stars are red and blue") are what is learnt last.
    if progress < 0.8:
        objects = (0.16, 0.24, 0.29, 0.28, 0.03)
        return Mix(objects, 0.2, LONGEST, 0.04, 0.04, 0.08, lists=0.4, like=0.5)
    return Mix((0.18, 0.23, 0.27, 0.28, 0.04), 0.28, pairs=0.15, lists=0.3, like=0.45)


def text_scene(rng: random.Random, longest: int, held_out: bool = False) -> Scene:
    """A scene with a string."""
    family = random_background(rng)
    while True:
        text = random_text(rng, longest)
        if text_held_out(text, family) == held_out:
            break
    rgb = colours.background(rng, family)
    return Scene(family, rgb, random_aspect(rng), (), text, seed=rng.getrandbits(31))


def nothing_scene(rng: random.Random) -> Scene:
    """A scene with nothing known in it."""
    family = random_background(rng)
    rgb = colours.background(rng, family)
    return Scene(family, rgb, random_aspect(rng), clutter=True, seed=rng.getrandbits(31))


def both_scene(rng: random.Random, longest: int, held_out: bool = False) -> Scene:
    """A scene with one or two shapes and a string."""
    scene = object_scene(rng, rng.randint(1, 2), held_out)
    while scene.objects and max(o.extent for o in scene.objects) > 0.4:
        scene = object_scene(rng, rng.randint(1, 2), held_out)
    while True:
        text = random_text(rng, min(longest, 4))
        if not text_held_out(text, scene.background):
            return replace(scene, text=text)


def ask_list(rng: random.Random, scene: Scene, skill: str) -> Turn:
    """A question about several objects, if a few tries find one."""
    turn = questions.ask(rng, scene, skill)
    for _ in range(6):
        if turn.cells is None or len(turn.cells) > 1:
            break
        turn = questions.ask(rng, scene, skill)
    return turn


def single_turns(
    rng: random.Random, scene: Scene, room: int, encode: Encoder, lists: float = 0.0
) -> list[list[Turn]]:
    """Conversations about one picture that take up about ``room`` tokens."""
    conversations: list[list[Turn]] = []
    skills = questions.SINGLE_SKILLS
    if scene.text and not scene.objects:
        plan = ["read", "caption", rng.choice(("read", "any_text", "count", "exists", "where"))]
    elif not scene.objects:
        plan = ["caption", rng.choice(("read", "count")), rng.choice(("exists", "colour", "where"))]
    else:
        plan = ["caption"] if rng.random() < 0.85 else []
        names, weights = list(skills)[1:], list(skills.values())[1:]
        plan += rng.choices(names, weights, k=16)
        if scene.text:
            plan.insert(1, "read")
    used = 0
    for skill in plan:
        several = lists and skill in LISTED and rng.random() < lists
        turn = (ask_list if several else questions.ask)(rng, scene, skill)
        turns = [turn]
        kind = rng.random()
        if turn.topic is not None and kind < 0.3:
            turns.append(questions.follow_up(rng, scene, turn.topic, turn.answer))
            if rng.random() < 0.2:
                topic = turn.topic
                turns.append(questions.follow_up(rng, scene, topic, turns[-1].answer))
        elif kind > 0.9:
            other = rng.choice(list(skills))
            turns.append(questions.ask(rng, scene, other))
        cost = sum(len(encode(t.question)) + len(encode(" " + t.answer)) + 8 for t in turns)
        if used + cost > room:
            if used > room - 40:
                break
            continue
        used += cost
        conversations.append(turns)
    return conversations


def pair_turns(rng: random.Random, pair: Pair, room: int, encode: Encoder) -> list[list[Turn]]:
    """Conversations about two pictures."""
    conversations: list[list[Turn]] = []
    used = 0
    wanted = ["different"] if pair.difference else []
    for skill in [*wanted, "which_picture", *[""] * 12]:
        turn = ask_pair(rng, pair, skill)
        if turn is None:
            continue
        cost = len(encode(turn.question)) + len(encode(" " + turn.answer)) + 8
        if used + cost > room:
            break
        used += cost
        conversations.append([turn])
    return conversations


def object_labels(scene: Scene, drawn: Drawn) -> dict[str, Longs]:
    """The labels of all auxiliary heads for one picture."""
    blocks = (SIDE_PATCHES, PATCH, SIDE_PATCHES, PATCH)
    out = {name: np.zeros(PATCHES, np.int64) for name in PATCH_HEADS}
    out |= {name: np.full(TOKENS, IGNORE, np.int64) for name in TOKEN_HEADS}
    out["cell"][:] = 0
    if scene.objects:
        layers = [(drawn.objects == i + 1) for i in range(len(scene.objects))]
        cover = np.stack([m.reshape(blocks).sum((1, 3)).reshape(-1) for m in layers])
        who, most = cover.argmax(0), cover.max(0)
        table = np.array(
            [
                (COLOURS.index(o.colour) + 1, SHAPES.index(o.shape) + 1, SIZES.index(o.size) + 1)
                for o in scene.objects
            ]
        )
        for k, name in enumerate(("colour", "shape", "size")):
            out[name] = np.where(most >= 8, table[who, k], np.where(most >= 3, IGNORE, 0))
        for o in scene.objects:
            side = SIDE_PATCHES // 2
            at = min(side - 1, int(o.y * side)) * side + min(side - 1, int(o.x * side))
            out["cell"][at] = o.cell + 1
            out["centre_colour"][at] = COLOURS.index(o.colour)
            out["centre_shape"][at] = SHAPES.index(o.shape)
            out["centre_size"][at] = SIZES.index(o.size)
    if scene.text:
        layers = [(drawn.chars == i + 1) for i in range(len(scene.text))]
        cover = np.stack([m.reshape(blocks).sum((1, 3)).reshape(-1) for m in layers])
        who, most = cover.argmax(0), cover.max(0)
        codes = np.array([CHARS.index(c) + 1 for c in scene.text])
        out["char"] = np.where(most >= 20, codes[who], np.where(most >= 4, IGNORE, 0))
        out["order"] = np.where(most >= 20, who + 1, np.where(most >= 4, IGNORE, 0))
    for name in ("char", "order"):
        square = out[name].reshape(SIDE_PATCHES // 2, 2, SIDE_PATCHES)
        label = square.max(1)
        label[(label == 0) & (square == IGNORE).any(1)] = IGNORE
        out[f"left_{name}"] = label[:, 0::2].reshape(-1)
        out[f"right_{name}"] = label[:, 1::2].reshape(-1)
    return out


def part_labels(drawn: Drawn) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """For each patch, box and looks of the object or character that covers most of it.

    A box is the way from the patch to the box's centre and the box's width and height, in
    quarters of the picture (NaN where there is nothing). The looks are the ink within the
    box, LOOK x LOOK.
    """
    boxes = np.full((PATCHES, 4), np.nan, np.float32)
    looks = np.zeros((PATCHES, LOOK * LOOK), np.float32)
    covered = np.zeros(PATCHES, np.int64)
    middle = (np.arange(SIDE_PATCHES) + 0.5) * PATCH
    blocks = (SIDE_PATCHES, PATCH, SIDE_PATCHES, PATCH)
    ink = Image.fromarray(drawn.ink.astype(np.float32))
    for layers, least in ((drawn.objects, 8), (drawn.chars, 20)):
        for index in range(1, int(layers.max()) + 1):
            mask = layers == index
            if not mask.any():
                continue
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            x0, x1, y0, y1 = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
            cover = mask.reshape(blocks).sum((1, 3)).reshape(-1)
            better = (cover >= least) & (cover > covered)
            covered = np.where(better, cover, covered)
            box = np.empty((SIDE_PATCHES, SIDE_PATCHES, 4), np.float32)
            box[..., 0] = (x0 + x1) / 2 - middle[None, :]
            box[..., 1] = (y0 + y1) / 2 - middle[:, None]
            box[..., 2:] = x1 - x0, y1 - y0
            boxes[better] = box.reshape(PATCHES, 4)[better] / (SIDE / 4)
            small = ink.resize((LOOK, LOOK), Image.Resampling.BOX, (x0, y0, x1, y1))
            looks[better] = np.asarray(small).reshape(-1)
    return boxes, looks


def make_batch(
    rng: random.Random,
    encode: Encoder,
    fonts: Fonts,
    mix: Mix,
    pictures: int,
    held_out: bool = False,
) -> Batch:
    """A batch of about ``pictures`` pictures."""
    scenes: list[Scene] = []
    groups: list[Group] = []
    counts = range(1, len(mix.objects) + 1)
    talk = rng.random() < mix.talk
    while len(scenes) < pictures:
        layout = rng.choices(("first", "last", "around"), (0.8, 0.13, 0.07))[0]
        at = len(scenes)
        if talk and mix.pairs and rng.random() < mix.pairs / (1 + mix.pairs) * 1.15:
            pair = random_pair(rng, 4, held_out)
            scenes += [pair.first, pair.second]
            room = LENGTH - 2 * 67 - 36
            turns = pair_turns(rng, pair, room, encode)
            if layout != "first":
                turns = turns[:1]
            groups.append(build_group(rng, encode, [at, at + 1], turns, layout))
            continue
        kind = rng.random()
        if kind < mix.text:
            scene = text_scene(rng, mix.longest, held_out)
        elif kind < mix.text + mix.nothing:
            scene = nothing_scene(rng)
        elif kind < mix.text + mix.nothing + mix.both:
            scene = both_scene(rng, mix.longest, held_out)
        else:
            number = rng.choices(counts, mix.objects)[0]
            scene = object_scene(rng, number, held_out, mix.like)
        scenes.append(scene)
        if not talk:
            continue
        turns = single_turns(rng, scene, mix.room, encode, mix.lists)
        if layout != "first":
            turns = turns[:2]
        groups.append(build_group(rng, encode, [at], turns, layout))
    if talk and rng.random() < 0.5:
        chats = [[questions.no_picture(rng)] for _ in range(4)]
        groups.append(build_group(rng, encode, [], chats, "none"))
    drawn = [draw(scene, fonts) for scene in scenes]
    labels = [object_labels(s, d) for s, d in zip(scenes, drawn, strict=True)]
    rows, used = lay_out([g for g in groups if g.segments], LENGTH)
    return Batch(
        np.stack([np.asarray(d.image, np.uint8) for d in drawn]),
        rows,
        {name: np.stack([one[name] for one in labels]) for name in labels[0]},
        used,
        np.stack([d.ink for d in drawn]),
        *(np.stack(parts) for parts in zip(*map(part_labels, drawn), strict=True)),
    )
