"""Questions about a scene and the one right answer to each.

The answers are plain, short and fully determined by the scene and the question, so that an
exact comparison measures the model.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from demoworld.scene import COLOURS, PLACES, SHAPES, SIZES, Obj, Scene
from demoworld.wording import article, plural, word

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NOTHING = "There is nothing I know in this picture."
SEND = "Please send me a picture."
# The skills of a single picture with their share of the training questions.
SINGLE_SKILLS = {
    "caption": 1.0,
    "count": 1.5,
    "exists": 1.5,
    "colour": 1.4,
    "shape": 1.3,
    "at": 0.4,
    "where": 1.0,
    "size": 0.4,
    "read": 0.15,
    "any_text": 0.1,
}


@dataclass(frozen=True)
class Turn:
    """A question, its answer, and what the answer is about (for follow-up questions)."""

    question: str
    answer: str
    skill: str
    topic: Obj | None = None
    parts: tuple[Obj | None, ...] = ()  # what the parts of a list are about, in order
    cells: tuple[int, ...] | None = None  # of all objects that the question is about


def join(parts: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    if len(parts) < 2:
        return "".join(parts)
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def sentence(text: str) -> str:
    """Capitalised and with a full stop."""
    return text[0].upper() + text[1:] + "."


def describe(scene: Scene) -> str:
    """The caption without capital and full stop."""
    parts = [f"{article(f'{o.size} {o.colour} {o.shape}')} {o.place}" for o in scene.objects]
    if scene.text:
        parts.append(f"the text {scene.text}")
    return join(parts)


def caption(scene: Scene) -> str:
    """What is in the picture."""
    text = describe(scene)
    return sentence(text) if text else NOTHING


@dataclass(frozen=True)
class Filter:
    """What a question names: any of shape, colour and size; none of them means any shape."""

    shape: str = ""
    colour: str = ""
    size: str = ""

    def noun(self) -> str:
        """Such as "large red circle" or "red shape"."""
        return " ".join(p for p in (self.size, self.colour, self.shape or "shape") if p)

    def among(self, objects: tuple[Obj, ...]) -> list[Obj]:
        """The objects it fits."""
        return [
            o
            for o in objects
            if self.shape in ("", o.shape)
            and self.colour in ("", o.colour)
            and self.size in ("", o.size)
        ]


def _asked_noun(rng: random.Random, f: Filter) -> str:
    noun = f.noun()
    if not f.shape and rng.random() < 0.4:
        noun = noun.removesuffix("shape") + rng.choice(("object", "one", "thing", "object"))
    if f.size and rng.random() < 0.3:
        noun = noun.replace("large", "big").replace("small", rng.choice(("small", "little")))
    return noun


def random_filter(
    rng: random.Random, scene: Scene, parts: str, present: float, plain_share: float = 0.0
) -> Filter:
    """A filter over the given parts ("s", "c", "z" for shape, colour, size).

    With the chance ``present`` it fits an object of the scene; otherwise it is a hard
    negative: one attribute of an object, the others from elsewhere.
    """
    if rng.random() < plain_share:
        parts = rng.choice(parts)
    base = rng.choice(scene.objects) if scene.objects else None
    wants = rng.random() < present
    values = {
        "s": base.shape if base else rng.choice(SHAPES),
        "c": base.colour if base else rng.choice(COLOURS),
        "z": base.size if base else rng.choice(SIZES),
    }
    if base and not wants:
        for _ in range(8):
            trial = dict(values)
            changed = rng.choice(parts) if rng.random() < 0.75 else parts
            for key in changed:
                pool = {"s": SHAPES, "c": COLOURS, "z": SIZES}[key]
                other = rng.choice(scene.objects)
                trial[key] = rng.choice(pool)
                if rng.random() < 0.5 and len(parts) > 1:
                    trial[key] = {"s": other.shape, "c": other.colour, "z": other.size}[key]
            made = _make_filter(trial, parts)
            values = trial
            if not made.among(scene.objects):
                break
    return _make_filter(values, parts)


def _make_filter(values: dict[str, str], parts: str) -> Filter:
    return Filter(*(values[k] if k in parts else "" for k in "scz"))


def _cells(objects: list[Obj]) -> tuple[int, ...]:
    return tuple(o.cell for o in objects)


def _firsts(objects: list[Obj], key: str) -> tuple[Obj, ...]:
    """The first object of each value of an attribute."""
    found: dict[str, Obj] = {}
    for o in objects:
        found.setdefault(getattr(o, key), o)
    return tuple(found.values())


def distinct(values: list[str]) -> list[str]:
    """Without repetitions, in order."""
    return list(dict.fromkeys(values))


def _count(rng: random.Random, scene: Scene, inside: str) -> Turn:
    kind = rng.random()
    if kind < 0.35:
        f = Filter()
    elif kind < 0.65:
        f = random_filter(rng, scene, "s", 0.8)
    elif kind < 0.85:
        f = random_filter(rng, scene, "c", 0.8)
    else:
        f = random_filter(rng, scene, rng.choice(("sc", "z", "zs")), 0.8)
    fits = f.among(scene.objects)
    n = len(fits)
    noun = f.noun()
    many = plural(noun) if not f.shape else noun.removesuffix(f.shape) + plural(f.shape)
    asked = many
    if not f.shape and rng.random() < 0.35:
        asked = many.removesuffix("shapes") + rng.choice(("objects", "objects", "things"))
    answer = f"There is one {noun}." if n == 1 else f"There are {NUMBERS[n]} {many}."
    question = word(rng, "count", inside, things=asked)
    return Turn(question, answer, "count", cells=_cells(fits))


def _exists(rng: random.Random, scene: Scene, inside: str) -> Turn:
    if rng.random() < 0.22:
        f = random_filter(rng, scene, "c", 0.5)
        fits = f.among(scene.objects)
        answer = "Yes, there is something" if fits else "No, there is nothing"
        question = word(rng, "anything", inside, colour=f.colour)
        return Turn(question, f"{answer} {f.colour}.", "exists", cells=_cells(fits))
    parts = rng.choices(("s", "sc", "zs", "zsc", "c"), (0.35, 0.45, 0.08, 0.07, 0.05))[0]
    f = random_filter(rng, scene, parts, 0.5)
    fits = f.among(scene.objects)
    noun = f.noun()
    asked = noun
    if f.size and rng.random() < 0.3:
        asked = noun.replace("large", "big")
    question = word(
        rng,
        "exists",
        inside,
        a_thing=article(asked),
        thing=asked,
        things=asked.removesuffix(f.shape or "shape") + plural(f.shape or "shape"),
    )
    answer = f"Yes, there is {article(noun)}." if fits else f"No, there is no {noun}."
    topic = fits[0] if len(fits) == 1 else None
    return Turn(question, answer, "exists", topic, tuple(fits[:1]), _cells(fits))


def _place_filter(rng: random.Random, scene: Scene) -> tuple[str, list[Obj]]:
    """A place and the objects in it, in the cell itself or else in its row or column."""
    cell = rng.choice(scene.objects).cell if scene.objects and rng.random() < 0.8 else -1
    if cell < 0:
        cell = rng.randrange(9)
    elif rng.random() < 0.15:  # an edge of which the middle cell may be empty
        cell = rng.choice((1, 3, 5, 7))
    return PLACES[cell], objects_at(scene, cell)


def objects_at(scene: Scene, cell: int) -> list[Obj]:
    """The object in a cell, or for an empty cell at an edge those along that edge."""
    exact = [o for o in scene.objects if o.cell == cell]
    along = {1: (0, 2), 3: (0, 6), 5: (2, 8), 7: (6, 8)}.get(cell, ())
    return exact or [o for o in scene.objects if o.cell in along]


def _colour(rng: random.Random, scene: Scene, inside: str) -> Turn:
    if rng.random() < 0.15:
        cell = rng.choice(scene.objects).cell if scene.objects else rng.randrange(9)
        if rng.random() < 0.15:
            cell = rng.randrange(9)
        exact = [o for o in scene.objects if o.cell == cell]
        if exact or not objects_at(scene, cell):
            noun = rng.choice(("shape", "shape", "object"))
            question = word(rng, "colour", inside, thing=f"{noun} {PLACES[cell]}")
            if not exact:
                return Turn(question, f"There is no shape {PLACES[cell]}.", "colour", cells=())
            answer = f"The shape {PLACES[cell]} is {exact[0].colour}."
            return Turn(question, answer, "colour", exact[0], cells=_cells(exact))
    f = random_filter(rng, scene, rng.choices(("s", "zs", "z"), (0.75, 0.2, 0.05))[0], 0.85)
    fits = f.among(scene.objects)
    question = word(rng, "colour", inside, thing=_asked_noun(rng, f))
    noun = f.noun()
    if not fits:
        return Turn(question, f"There is no {noun}.", "colour", cells=())
    values = join(distinct([o.colour for o in fits]))
    if len(fits) == 1:
        return Turn(question, f"The {noun} is {values}.", "colour", fits[0], cells=_cells(fits))
    parts = _firsts(fits, "colour")
    return Turn(question, f"The {_many(f)} are {values}.", "colour", None, parts, _cells(fits))


def _many(f: Filter) -> str:
    shape = f.shape or "shape"
    return f.noun().removesuffix(shape) + plural(shape)


def _shape(rng: random.Random, scene: Scene, inside: str) -> Turn:
    f = random_filter(rng, scene, "c", 0.85)
    fits = f.among(scene.objects)
    question = word(rng, "shape", inside, colour=f.colour)
    if not fits:
        return Turn(question, f"There is no {f.colour} shape.", "shape", cells=())
    if len(fits) == 1:
        answer = f"The {fits[0].shape} is {f.colour}."
        return Turn(question, answer, "shape", fits[0], cells=_cells(fits))
    shapes = [o.shape for o in fits]
    names = [f"the {s if shapes.count(s) == 1 else plural(s)}" for s in distinct(shapes)]
    answer = sentence(f"{join(names)} are {f.colour}")
    return Turn(question, answer, "shape", None, _firsts(fits, "shape"), _cells(fits))


def _at(rng: random.Random, scene: Scene, inside: str) -> Turn:
    place, found = _place_filter(rng, scene)
    question = word(rng, "at", inside, place=place)
    if not found:
        return Turn(question, f"There is no shape {place}.", "at", cells=())
    parts = [f"{article(f'{o.size} {o.colour} {o.shape}')} is {o.place}" for o in found]
    topic = found[0] if len(found) == 1 else None
    return Turn(question, sentence(join(parts)), "at", topic, tuple(found), _cells(found))


def _where(rng: random.Random, scene: Scene, inside: str) -> Turn:
    f = random_filter(
        rng, scene, rng.choices(("s", "sc", "zsc", "c", "zs"), (40, 40, 5, 8, 7))[0], 0.88
    )
    fits = f.among(scene.objects)
    question = word(rng, "where", inside, thing=_asked_noun(rng, f))
    if not fits:
        return Turn(question, f"There is no {f.noun()}.", "where", cells=())
    places = join([o.place for o in fits])
    if len(fits) == 1:
        answer = f"The {f.noun()} is {places}."
        return Turn(question, answer, "where", fits[0], cells=_cells(fits))
    answer = f"The {_many(f)} are {places}."
    return Turn(question, answer, "where", None, tuple(fits), _cells(fits))


def _size(rng: random.Random, scene: Scene, inside: str) -> Turn:
    f = random_filter(rng, scene, rng.choice(("s", "sc", "c")), 0.88)
    fits = f.among(scene.objects)
    question = word(rng, "size", inside, thing=_asked_noun(rng, f))
    if not fits:
        return Turn(question, f"There is no {f.noun()}.", "size", cells=())
    values = join(distinct([o.size for o in fits]))
    if len(fits) == 1:
        answer = f"The {f.noun()} is {values}."
        return Turn(question, answer, "size", fits[0], cells=_cells(fits))
    answer = f"The {_many(f)} are {values}."
    return Turn(question, answer, "size", None, _firsts(fits, "size"), _cells(fits))


def reading(scene: Scene) -> str:
    """What the text of the picture says."""
    return f"It says {scene.text}." if scene.text else "There is no text."


def ask(rng: random.Random, scene: Scene, skill: str, inside: str = "", nth: str = "") -> Turn:
    """One question of a skill about one picture.

    ``inside`` and ``nth`` name the picture ("in the second picture", "second") when it is
    one of two.
    """
    if skill == "caption":
        topic = scene.objects[0] if len(scene.objects) == 1 and not scene.text else None
        question = word(rng, "caption_nth", nth=nth) if nth else word(rng, "caption")
        parts = (*scene.objects, None) if scene.text else scene.objects
        return Turn(question, caption(scene), "caption", topic, parts)
    if skill == "read":
        return Turn(word(rng, "read", inside), reading(scene), "read")
    if skill == "any_text":
        answer = "Yes, there is text." if scene.text else "No, there is no text."
        return Turn(word(rng, "any_text", inside), answer, "any_text")
    makers = {
        "count": _count,
        "exists": _exists,
        "colour": _colour,
        "shape": _shape,
        "at": _at,
        "where": _where,
        "size": _size,
    }
    return makers[skill](rng, scene, inside)


def follow_up(rng: random.Random, scene: Scene, topic: Obj, told: str) -> Turn:
    """A question about the object that the last answer named."""
    kinds = {
        "it_colour": f"It is {topic.colour}.",
        "it_where": f"It is {topic.place}.",
        "it_size": f"It is {topic.size}.",
        "it_shape": f"It is {article(topic.shape)}.",
    }
    weights = [1.0 if answer[6:-1] not in told else 0.3 for answer in kinds.values()]
    kind = rng.choices((*kinds, "others"), (*weights, 0.6))[0]
    if kind == "others":
        n = len(scene.objects) - 1
        if n == 0:
            answer = "No, there are no other shapes."
        elif n == 1:
            answer = "Yes, there is one other shape."
        else:
            answer = f"Yes, there are {NUMBERS[n]} other shapes."
    else:
        answer = kinds[kind]
    about = [o for o in scene.objects if o.cell != topic.cell]
    cells = _cells(about) if kind == "others" else (topic.cell,)
    return Turn(word(rng, kind), answer, "follow_up", topic, cells=cells)


def no_picture(rng: random.Random) -> Turn:
    """A chat without any picture."""
    if rng.random() < 0.4:
        return Turn(word(rng, "hello"), SEND, "no_picture")
    skill = rng.choice(("caption", "count", "exists", "colour", "where", "shape", "read"))
    blank = Scene()
    return Turn(ask(rng, blank, skill).question, SEND, "no_picture")
