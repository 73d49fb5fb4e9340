"""Packs pictures with many independent conversations into rows of tokens.

A *group* is a shared beginning (usually the picture) followed by segments, each of which
goes on from that beginning as if it were alone: it attends to the beginning and to itself,
and its positions go on from the beginning's end. A row holds one or more groups.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from demoworld.questions import Turn
from demoworld.scene import COLOURS, SHAPES, SIZES, Obj
from demoworld.tokens import END_ID, FAKE_ID, GLOBAL_ID, IMAGE_ID, PAD_ID, START_ID, Encoder
from demoworld.wording import SYSTEMS

IMAGE_TOKENS = 64
# What an answer's token speaks of: name -> number of classes.
ABOUT_HEADS = {
    "about_cell": 9,
    "about_colour": len(COLOURS),
    "about_shape": len(SHAPES),
    "about_size": len(SIZES),
}
Ints = npt.NDArray[np.int64]
LEADS = (
    "Look at this.",
    "Here is a picture.",
    "Look at this picture:",
    "See this image:",
    "I have a question about this picture.",
    "Here:",
    "Look:",
)


@dataclass
class Piece:
    """Some tokens; ``picture`` is the index of the picture that image tokens belong to.

    ``about`` tells for each token of an answer which object it speaks of (see ABOUT_HEADS),
    ``cells`` where all the objects are that the question is about.
    """

    ids: list[int]
    answer: bool = False
    picture: int = -1
    skill: str = ""
    about: list[tuple[int, ...]] = field(default_factory=list)
    cells: tuple[int, ...] | None = None


@dataclass
class Group:
    """A shared beginning and the segments that go on from it."""

    start: list[Piece]
    segments: list[list[Piece]] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(p.ids) for part in (self.start, *self.segments) for p in part)


def picture_pieces(pictures: list[int]) -> list[Piece]:
    """The tokens that stand for the given pictures."""
    pieces = []
    for picture in pictures:
        pieces.append(Piece([FAKE_ID, GLOBAL_ID]))
        pieces.append(Piece([IMAGE_ID] * IMAGE_TOKENS, picture=picture))
        pieces.append(Piece([FAKE_ID]))
    return pieces


def _facts(obj: Obj | None) -> tuple[int, ...]:
    if obj is None:
        return (-100,) * len(ABOUT_HEADS)
    return (
        obj.cell,
        COLOURS.index(obj.colour),
        SHAPES.index(obj.shape),
        SIZES.index(obj.size),
    )


def _about(encode: Encoder, turn: Turn, ids: list[int]) -> list[tuple[int, ...]]:
    """For each token of an answer, the object that it speaks of."""
    if len(turn.parts) < 2:
        return [_facts(turn.parts[0] if turn.parts else turn.topic)] * len(ids)
    breaks = {encode(",")[0], encode(" and")[0]}
    about, part = [], 0
    for token in ids:
        if token in breaks and part + 1 < len(turn.parts):
            part += 1
        about.append(_facts(turn.parts[part]))
    return about


def _answer(encode: Encoder, turn: Turn) -> list[Piece]:
    ids = [*encode(" " + turn.answer), END_ID]
    return [
        Piece([END_ID, *encode("\nAssistant:")]),
        Piece(
            ids, answer=True, skill=turn.skill, about=_about(encode, turn, ids), cells=turn.cells
        ),
    ]


def _later(encode: Encoder, turns: list[Turn]) -> list[Piece]:
    pieces = []
    for turn in turns:
        pieces.append(Piece(encode("\nUser: " + turn.question)))
        pieces += _answer(encode, turn)
    return pieces


def opening(encode: Encoder, system: str) -> list[Piece]:
    """The start of a conversation up to the first user's "User:", which is left out."""
    pieces = [Piece([START_ID])]
    if system:
        pieces.append(Piece([*encode("System: " + system), END_ID]))
    return pieces


def build_group(
    rng: random.Random,
    encode: Encoder,
    pictures: list[int],
    conversations: list[list[Turn]],
    layout: str = "first",
) -> Group:
    """A group of conversations about the same pictures.

    Layouts: "first" (pictures, then text), "last" (text, then pictures), "around" (text on
    both sides) and "none" (no picture at all).
    """
    system = rng.choice(SYSTEMS) if rng.random() < 0.25 else ""
    user = "\nUser:" if system else "User:"
    start = opening(encode, system)
    shown = picture_pieces(pictures)
    if layout == "first":
        start += [Piece(encode(user)), *shown]
    group = Group(start)
    for turns in conversations:
        first = turns[0]
        if layout == "first":
            pieces = [Piece(encode(first.question))]
        elif layout == "around":
            lead = rng.choice(LEADS)
            pieces = [Piece(encode(f"{user} {lead}")), *shown, Piece(encode(first.question))]
        else:
            pieces = [Piece(encode(f"{user} {first.question}"))]
            if layout == "last":
                pieces += shown
        group.segments.append([*pieces, *_answer(encode, first), *_later(encode, turns[1:])])
    return group


@dataclass
class Rows:
    """Packed rows, each array of shape (rows, length)."""

    ids: Ints
    targets: Ints  # the next token where the loss counts, else -100
    positions: Ints
    group: Ints  # -1 for padding
    segment: Ints  # 0 for a group's shared beginning
    picture: Ints  # -1 where there is no picture
    patch: Ints  # which of the picture's image tokens
    turn: Ints  # which answer a target belongs to, -1 where there is no target
    skills: list[str]  # of the answers
    about: Ints  # (rows, length, heads): what a target speaks of, else -100
    cells: Ints  # (rows, length, 9): where the objects in question are, else -1

    def mask(self) -> npt.NDArray[np.bool_]:
        """Who attends to whom, of shape (rows, 1, length, length)."""
        same = self.group[:, :, None] == self.group[:, None, :]
        own = self.segment[:, :, None] == self.segment[:, None, :]
        shared = self.segment[:, None, :] == 0
        length = self.ids.shape[1]
        causal = np.tril(np.ones((length, length), bool))
        allowed: npt.NDArray[np.bool_] = (same & (own | shared) & causal)[:, None]
        return allowed


def lay_out(groups: list[Group], length: int) -> tuple[Rows, int]:
    """Puts groups into rows, first fit; returns the rows and how many tokens are used."""
    bins: list[list[Group]] = []
    room: list[int] = []
    for group in sorted(groups, key=len, reverse=True):
        need = len(group)
        if need > length:
            raise ValueError(f"a group of {need} tokens does not fit a row of {length}")
        for i, free in enumerate(room):
            if need <= free:
                bins[i].append(group)
                room[i] -= need
                break
        else:
            bins.append([group])
            room.append(length - need)
    shape = (len(bins), length)
    full = [np.full(shape, v, np.int64) for v in (PAD_ID, -100, 0, -1, 0, -1, 0, -1)]
    about = np.full((*shape, len(ABOUT_HEADS)), -100, np.int64)
    cells = np.full((*shape, 9), -1, np.int64)
    rows = Rows(
        full[0], full[1], full[2], full[3], full[4], full[5], full[6], full[7], [], about, cells
    )
    for r, groups_of_row in enumerate(bins):
        at = 0
        for g, group in enumerate(groups_of_row):
            begin = sum(len(p.ids) for p in group.start)
            for s, pieces in enumerate([group.start, *group.segments]):
                position = 0 if s == 0 else begin
                for piece in pieces:
                    n = len(piece.ids)
                    span = slice(at, at + n)
                    rows.ids[r, span] = piece.ids
                    rows.positions[r, span] = np.arange(position, position + n)
                    rows.group[r, span] = g
                    rows.segment[r, span] = s
                    if piece.picture >= 0:
                        rows.picture[r, span] = piece.picture
                        rows.patch[r, span] = np.arange(n)
                    if piece.answer:  # never the first piece of a segment
                        rows.targets[r, at - 1 : at + n - 1] = piece.ids
                        rows.turn[r, at - 1 : at + n - 1] = len(rows.skills)
                        rows.skills.append(piece.skill)
                        rows.about[r, at - 1 : at + n - 1] = piece.about
                        if piece.cells is not None:
                            rows.cells[r, at - 1 : at + n - 1] = 0
                            rows.cells[r, at - 1 : at + n - 1, list(piece.cells)] = 1
                    at += n
                    position += n
    return rows, sum(len(g) for g in groups)
