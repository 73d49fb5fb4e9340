"""Pairs of pictures: how the second differs from the first, and questions about both."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from demoworld.questions import (
    Filter,
    Turn,
    ask,
    describe,
    join,
    sentence,
)
from demoworld.scene import COLOURS, SHAPES, SIZES, Obj, Scene
from demoworld.shapes import moved, object_scene, random_object
from demoworld.wording import article, asked_inside, word

NTH = ("first", "second")


@dataclass(frozen=True)
class Pair:
    """Two scenes; ``difference`` is the answer to "What is different?", or empty."""

    first: Scene
    second: Scene
    difference: str = ""

    @property
    def same(self) -> bool:
        """Whether both show the same things."""
        return self.difference == SAME


SAME = "The pictures are the same."


def _name(obj: Obj) -> str:
    return f"{obj.colour} {obj.shape}"


def _sides(a: str, b: str) -> str:
    return sentence(f"the first picture has {a} and the second picture has {b}")


def _changed(rng: random.Random, first: Scene, held_out: bool | None) -> Pair | None:
    """A pair that differs by one object, named without ambiguity."""
    names = [_name(o) for o in first.objects]
    single = [o for o in first.objects if names.count(_name(o)) == 1]
    if not single:
        return None
    old = rng.choice(single)
    rest = [o for o in first.objects if o is not old]
    fixed: dict[str, str | int] = {
        "shape": old.shape,
        "colour": old.colour,
        "size": old.size,
        "cell": old.cell,
    }
    kind = rng.choices(("colour", "shape", "size", "place", "gone", "both"), (3, 3, 2, 3, 3, 1))[0]
    if kind in ("colour", "both"):
        fixed["colour"] = rng.choice([c for c in COLOURS if c != old.colour])
    if kind in ("shape", "both"):
        fixed["shape"] = rng.choice([s for s in SHAPES if s != old.shape])
    if kind == "size":
        fixed["size"] = next(s for s in SIZES if s != old.size)
    if kind == "place":
        taken = {o.cell for o in rest}
        fixed["cell"] = rng.choice([c for c in range(9) if c not in taken and c != old.cell])
    if kind == "gone":
        scenes = [first, first.with_objects(rest)]
        swap = rng.random() < 0.5
        answer = f"Only the {NTH[swap]} picture has {article(_name(old))}."
        if swap:
            scenes.reverse()
        return Pair(scenes[0], scenes[1], answer)
    new = random_object(rng, first, rest, False, held_out, None, fixed)
    if new is None or _name(new) in [_name(o) for o in rest]:
        return None
    said = [_name(old), _name(new)]
    if kind == "size":
        said = [f"{old.size} {said[0]}", f"{new.size} {said[1]}"]
    phrases = [article(s) for s in said]
    if kind == "place":
        phrases = [f"{phrases[0]} {old.place}", f"{phrases[1]} {new.place}"]
    return Pair(first, first.with_objects([*rest, new]), _sides(phrases[0], phrases[1]))


def random_pair(rng: random.Random, most: int = 4, held_out: bool = False) -> Pair:
    """Two related pictures, or two independent ones."""
    first = object_scene(rng, rng.randint(1, most), held_out)
    kind = rng.random()
    pair: Pair | None = None
    if kind < 0.1:
        pair = Pair(first, first, SAME)
    elif kind < 0.7:
        pair = _changed(rng, first, None if held_out else False)
    if pair is None:
        count = rng.randint(1, most) if rng.random() < 0.7 else 1
        second = object_scene(rng, count, held_out)
        answer = ""
        if len(first.objects) == 1 == len(second.objects):
            a, b = first.objects[0], second.objects[0]
            if _name(a) != _name(b):
                answer = _sides(article(_name(a)), article(_name(b)))
        return Pair(first, second, answer)
    second = replace(pair.second, seed=rng.getrandbits(31))
    if rng.random() < 0.35:
        second = moved(rng, second)
    return Pair(pair.first, second, pair.difference)


def _which(rng: random.Random, pair: Pair) -> Turn:
    source = rng.choice([s for s in (pair.first, pair.second) if s.objects] or [pair.first])
    base = rng.choice(source.objects)
    parts = rng.choices(("s", "c", "sc"), (0.25, 0.2, 0.55))[0]
    f = Filter(base.shape if "s" in parts else "", base.colour if "c" in parts else "")
    if rng.random() < 0.12:
        f = Filter(rng.choice(SHAPES), rng.choice(COLOURS) if "c" in parts else "")
    noun = f.noun()
    thing = article(noun) if rng.random() < 0.35 else f"the {noun}"
    has = [bool(f.among(s.objects)) for s in (pair.first, pair.second)]
    if all(has):
        answer = f"Both pictures have {thing}."
    elif any(has):
        answer = f"The {NTH[has.index(True)]} picture has {thing}."
    else:
        answer = f"Neither picture has {thing}."
    return Turn(word(rng, "which_picture", the_thing=thing), answer, "which_picture")


def ask_pair(rng: random.Random, pair: Pair, skill: str = "") -> Turn | None:
    """One question about a pair, or None when the skill does not fit it."""
    skill = (
        skill
        or rng.choices(
            ("which_picture", "different", "same", "both", "one"), (0.36, 0.3, 0.05, 0.05, 0.3)
        )[0]
    )
    if skill == "which_picture":
        return _which(rng, pair)
    if skill == "different":
        if not pair.difference:
            return None
        return Turn(word(rng, "different"), pair.difference, "different")
    if skill == "same":
        question = word(rng, "same")
        words = "the same" if pair.same else "different"
        if "ifferen" in question:
            answer = f"{'No' if pair.same else 'Yes'}, the pictures are {words}."
        else:
            answer = f"{'Yes' if pair.same else 'No'}, the pictures are {words}."
        return Turn(question, answer, "same")
    if skill == "both":
        if len(pair.first.objects) + len(pair.second.objects) > 4:
            return None
        sides = [describe(s) or "nothing I know" for s in (pair.first, pair.second)]
        answer = f"The first picture shows {sides[0]}. The second picture shows {sides[1]}."
        return Turn(word(rng, "both"), answer, "both")
    i = rng.randrange(2)
    scene = (pair.first, pair.second)[i]
    kind = rng.choice(("caption", "caption", "count", "exists", "colour", "where", "shape"))
    turn = ask(rng, scene, kind, asked_inside(rng, NTH[i]), NTH[i])
    if kind != "caption" and f"in the {NTH[i]}" not in turn.question.lower():
        return None
    return replace(turn, skill="nth_picture")


__all__ = ["SAME", "Pair", "ask_pair", "join", "random_pair"]
