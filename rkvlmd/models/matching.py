"""Which model of the catalogue a folder of published files holds; pure functions over what was found."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import translate
from functools import lru_cache
from typing import Any, Literal

from rkvlmd.models.templates import Template


@dataclass(frozen=True, slots=True)
class Tower:
    """A vision encoder's file, and what it says of itself; ``None`` where it does not.

    ``width`` and ``height`` in pixels; ``embedding`` floats in each of
    ``tokens`` rows of each of ``outputs`` outputs. ``odd``: what it takes
    besides one picture of three channels, empty if nothing. ``platforms`` are
    the SoCs that it was made for, ``toolkit`` the version that made it.
    ``patches``: it takes flattened patches and their grid in place of a picture.
    """

    file: str
    engine: Literal["rknn", "onnx"]
    width: int | None = None
    height: int | None = None
    tokens: int | None = None
    embedding: int | None = None
    outputs: int | None = None
    odd: str = ""
    platforms: tuple[str, ...] = ()
    toolkit: str | None = None
    patches: bool = False

    def says(self) -> str:
        """Return what it says in words, for people."""
        if self.outputs is None and self.width is None and self.tokens is None:
            return "does not say what it takes and gives"
        any_size = "pixels of any size" if self.engine == "onnx" else "pixels of unknown size"
        size = f"{self.width}x{self.height} pixels" if self.width else any_size
        rows = f"{_or(self.tokens)} rows of {_or(self.embedding)} floats"
        size = self.odd or size
        made = f", for {' and '.join(self.platforms)}" if self.platforms else ""
        return f"takes {size}, gives {_or(self.outputs)} output(s) of {rows}{made}"


def _or(value: int | None) -> str:
    return "?" if value is None else str(value)


@dataclass(frozen=True, slots=True)
class Folder:
    """What was found. ``name`` is the folder's; ``config`` is the content of ``config.json``.

    ``hidden`` is the size of a token's embedding there, floats.
    """

    name: str
    towers: tuple[Tower, ...] = ()
    rkllm: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    hidden: int | None = None

    def names(self) -> list[str]:
        """Return the names that hints are looked for in, lower case."""
        files = [*self.rkllm, *(tower.file for tower in self.towers)]
        return [name.rpartition("/")[2].lower() for name in (self.name, *files)]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model of the catalogue held against a folder.

    ``wrong`` says what does not fit, empty if all does, and ``about`` which
    keys of ``match``. ``seen``: the files' own words were compared, and not
    names alone; ``hinted``: a name fits.
    """

    template: Template
    wrong: tuple[str, ...]
    about: frozenset[str]
    seen: bool
    hinted: bool

    @property
    def pattern(self) -> bool:
        """Whether it may be another size of this model: rows are wider or narrower."""
        return "embedding" in self.about and self.about <= {"embedding", "sizes", "tokens"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """``chosen`` fits best, if exactly one does; ``others`` fit as well, or are nearest if none does.

    ``why`` says by what it was chosen; without one, what speaks against that which fits.
    """

    chosen: Candidate | None
    others: tuple[Candidate, ...] = ()
    why: str = ""


@lru_cache(maxsize=512)
def _pattern(glob: str) -> re.Pattern[str]:
    """Return a glob as a pattern whose stars do not cut a number or a word in two.

    ``*qwen3-4b*`` is about ``qwen3-4b_w8a8`` and not about ``qwen3-4bit-14b``,
    ``*vl3*1b*`` not about ``vl3-11b``.
    """
    parts = glob.split("*")
    last = len(parts) - 1
    made = ""
    for i, part in enumerate(parts):
        if i and part[:1].isdigit():
            made += r"(?<!\d)"
        made += translate(part)[:-2]  # less the end
        if i < last:
            made += (r"(?![a-z0-9])" if part[-1:].isalnum() else "") + ".*"
    return re.compile(made, re.DOTALL)


def hints(template: Template, name: str) -> bool:
    """Return whether a name, in lower case, is one that the model's files usually have."""
    return any(_pattern(glob).fullmatch(name) for glob in template.match.names)


def judge(candidate: Template, folder: Folder) -> Candidate:
    """Hold one model against a folder."""
    wrong: list[tuple[str, str]] = []
    seen = False
    match = candidate.match
    if folder.hidden is not None and folder.hidden != match.embedding:
        text = f"embeddings of {match.embedding} floats, config.json says {folder.hidden}"
        wrong.append(("embedding", text))
    if folder.towers and match.tokens is None:
        wrong.append(("tokens", "has no vision encoder"))
    if match.tokens is not None:
        for tower in folder.towers:
            seen = seen or tower.outputs is not None or tower.embedding is not None
            wrong += [(key, f"{tower.file}: {text}") for key, text in _tower(candidate, tower)]
    hinted = any(hints(candidate, name) for name in folder.names())
    about = frozenset(key for key, _ in wrong)
    return Candidate(candidate, tuple(text for _, text in wrong), about, seen, hinted)


def _tower(template: Template, tower: Tower) -> list[tuple[str, str]]:
    """Return what an encoder's file says and the template does not, each with the key."""
    match = template.match
    wrong: list[tuple[str, str]] = []
    assert match.tokens is not None
    if tower.odd:
        wrong.append(("input", f"one picture as input, the file takes {tower.odd}"))
    # One output is taken of an ONNX file that has more (hidden states, say).
    few = tower.engine == "rknn" or (tower.outputs or 0) < match.outputs
    if tower.outputs is not None and tower.outputs != match.outputs and few:
        text = f"{match.outputs} output(s), the file has {tower.outputs}"
        wrong.append(("outputs", text))
    if tower.embedding is not None and tower.embedding != match.embedding:
        text = f"rows of {match.embedding} floats, the file has {tower.embedding}"
        wrong.append(("embedding", text))
    if tower.width is None or tower.height is None:
        return wrong
    size = (tower.width, tower.height)
    free = match.multiple and not (size[0] % match.multiple or size[1] % match.multiple)
    if size not in match.sizes and not free:
        usual = ", ".join(f"{w}x{h}" for w, h in match.sizes)
        more = f" or other multiples of {match.multiple}" if match.multiple else ""
        text = f"pixels {usual}{more}, the file has {size[0]}x{size[1]}"
        wrong.append(("sizes", text))
    elif tower.tokens is not None and tower.tokens != (count := match.tokens.of(*size)):
        text = f"{count} tokens at {size[0]}x{size[1]} pixels, the file has {tower.tokens}"
        wrong.append(("tokens", text))
    return wrong


def choose(
    templates: Iterable[Template],
    folder: Folder,
    *,
    family: str | None = None,
    model: str | None = None,
) -> Verdict:
    """Return the model that a folder of ``.rkllm`` and ``.rknn`` files holds.

    What the files say decides; where that leaves several, or says nothing,
    names do. Names that speak of another model than the files do leave it to
    the owner. ``family`` and ``model`` are the owner's word: with ``model``
    that one is taken even if the files say otherwise (``wrong`` then tells).
    """
    judged = [judge(t, folder) for t in templates if not t.variant_of or t.model == model]
    if model is not None:
        picked = next((c for c in judged if c.template.model == model), None)
        return Verdict(picked, (), "as asked for") if picked else Verdict(None, tuple(judged))
    if family is not None:
        judged = [c for c in judged if c.template.family == family]
    # A model that takes pictures is not meant where there is no encoder, unless a name says so.
    wants, kind = bool(folder.towers), folder.config.get("model_type")
    judged = [
        c
        for c in judged
        if bool(c.template.match.tokens) == wants
        or (not wants and (c.hinted or kind in c.template.match.model_types))
    ]
    fit = _closest([c for c in judged if not c.wrong], folder)
    found = _pick(fit, judged, folder, family)
    if family is None and found.chosen is not None:
        others = _named(judged, found.chosen, folder)
        if others:
            why = (
                f"the files fit {found.chosen.template.title}, but names speak of "
                + " and ".join(c.template.title for c in others)
            )
            return Verdict(None, (found.chosen, *others), why)
    return found


def _named(judged: list[Candidate], chosen: Candidate, folder: Folder) -> list[Candidate]:
    """Return the models that a name of the folder's is about, and not about the chosen one."""
    against = [n for n in folder.names() if not hints(chosen.template, n)]
    return [c for c in judged if c is not chosen and any(hints(c.template, n) for n in against)]


def _pick(
    fit: list[Candidate], judged: list[Candidate], folder: Folder, family: str | None
) -> Verdict:
    """Return the best of those that ``fit``, or those of ``judged`` that come near."""
    kind = folder.config.get("model_type")
    hinted = [c for c in fit if c.hinted]
    if any(c.seen for c in fit):
        if len(fit) == 1:
            return Verdict(fit[0], (), "the encoder's file fits no other")
        if len(hinted) == 1:
            others = tuple(c for c in fit if c is not hinted[0])
            return Verdict(hinted[0], others, "its encoder fits, and names decide between several")
        return Verdict(None, tuple(hinted or fit))
    if len(fit) == 1 and folder.hidden and kind in fit[0].template.match.model_types:
        return Verdict(fit[0], (), f"config.json: {kind}, hidden_size {folder.hidden}")
    if len(hinted) == 1:
        return Verdict(hinted[0], (), "by the names of files alone")
    if family is not None and len(fit) == 1:
        return Verdict(fit[0], (), "the only one of its family")
    sizes = [c for c in judged if c.pattern]
    if family is not None and sizes and not fit:
        return Verdict(sizes[0], (), "another size of its family; files say the sizes")
    return Verdict(None, tuple(hinted or _nearest(judged)))


def _closest(fit: list[Candidate], folder: Folder) -> list[Candidate]:
    """Return those of several that fit which an ONNX encoder or ``config.json`` points at.

    More outputs than a model needs are allowed in an ONNX file, as many are better.
    """
    kind = folder.config.get("model_type")
    counts = [tower.outputs for tower in folder.towers]
    for closer in (
        [c for c in fit if kind in c.template.match.model_types],
        [c for c in fit if counts and all(c.template.match.outputs == n for n in counts)],
    ):
        fit = [c for c in fit if c in closer] or fit
    return fit


def _nearest(judged: list[Candidate]) -> list[Candidate]:
    """Return those with the fewest differences, hinted ones first."""
    fewest = min((len(c.wrong) for c in judged), default=0)
    return sorted(
        (c for c in judged if len(c.wrong) == fewest or c.hinted), key=lambda c: not c.hinted
    )


def by_config(
    templates: Iterable[Template], folder: Folder
) -> tuple[Candidate | None, list[Template]]:
    """Return the model that ``config.json`` names, and those of its kind.

    A checkpoint of a known kind and an unknown size has none of its own; then
    the first of the kind serves as a pattern.
    """
    kind = folder.config.get("model_type")
    alike = [t for t in templates if kind in t.match.model_types and not t.variant_of]
    exact = [t for t in alike if t.match.embedding == folder.hidden]
    judged = [judge(t, folder) for t in exact]
    hinted = [c for c in judged if c.hinted]
    picked = hinted[0] if hinted else (judged[0] if judged else None)
    return picked, alike
