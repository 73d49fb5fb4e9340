"""Chat template and tokenizer of a model folder: a conversation to token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import jinja2
import jinja2.meta
from tokenizers import Tokenizer

from rkvlmd.engine.jinja import TemplateRefusalError, environment
from rkvlmd.errors import RkvlmdError
from rkvlmd.models import estimate, families, prompt
from rkvlmd.models.manifest import Manifest, digest
from rkvlmd.wire.child import Laid

#: Models whose files stay open in one child; each tokenizer takes some 10 MB.
_KEPT = 2
#: Largest template and configuration file that is read, bytes.
_MOST_BYTES = 1 << 20
_MOST_MESSAGE = 200
_PROBE = "rkvlmd probes this template"
#: The variable by which the published templates turn thinking on and off.
_SWITCH = "enable_thinking"
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")

T = TypeVar("T")
#: (start, count, picture, view)
Span = tuple[int, int, int, int]


def render(
    folder: str,
    manifest: Manifest,
    turns: Sequence[dict[str, Any]],
    pictures: Sequence[Laid],
    thinking: bool | None = None,
) -> Rendered:
    """Return the prompt's token ids and where each view's rows go.

    ``turns``, ``pictures`` and ``thinking`` as in ``wire.child.Render``.

    Raises:
      RkvlmdError: ``invalid_model`` for the model's own files,
        ``invalid_request`` for a conversation that the template refuses.

    """
    layouts, places = _order(turns, pictures)
    words, template = _words(folder, manifest), _template(folder, manifest)
    films = _films(turns, pictures)
    film = manifest.video.content if films and manifest.video is not None else ""
    try:
        rendered = template.render(turns, words.specials, len(pictures), thinking)
        tokens = prompt.tokenise(
            prompt.place_pictures(rendered, template.place, manifest.image, layouts, films, film),
            words.encode,
            words.encode_plain,
            words.ids,
        )
        if film and film not in words.ids:
            raise prompt.PromptError("video.content is no token of the tokenizer")
        tokens, spans = prompt.expand(tokens, words.content, places, words.ids.get(film, -1))
    except prompt.PromptError as exc:
        raise RkvlmdError("invalid_model", f"The model's files do not agree: {exc}.") from exc
    return Rendered("", tokens, spans, len(tokens), *template.thoughts(rendered, thinking))


def _order(
    turns: Sequence[dict[str, Any]], pictures: Sequence[Laid]
) -> tuple[list[list[str | int]], list[tuple[int, int, int]]]:
    """Return the layouts, and (picture, view, image tokens) of each view, as they come."""
    order = prompt.picture_order(turns)
    if sorted(order) != list(range(len(pictures))):
        raise ValueError(f"places {order} for {len(pictures)} pictures")
    layouts = [pictures[index].layout for index in order]
    places = [
        (index, view, pictures[index].tokens[view])
        for index in order
        for view in pictures[index].layout
        if isinstance(view, int)
    ]
    return layouts, places


def _films(turns: Sequence[dict[str, Any]], pictures: Sequence[Laid]) -> list[int]:
    """Return which of the places, as they come, are those of videos."""
    return [at for at, i in enumerate(prompt.picture_order(turns)) if pictures[i].video]


class Rendered(NamedTuple):
    """A prompt, with ``text`` for RKLLM; spans are (start, count, picture, view).

    ``most`` is the number of tokens, or an estimate that is not too small.
    ``thinks`` and ``switched`` as in ``wire.child.RenderDone``.
    """

    text: str
    tokens: list[int]
    spans: list[Span]
    most: int
    thinks: bool = False
    switched: bool = True


def render_text(
    folder: str,
    manifest: Manifest,
    turns: Sequence[dict[str, Any]],
    pictures: Sequence[Laid],
    thinking: bool | None = None,
) -> Rendered:
    """Return the prompt as text, ``<image>`` at each picture's place; arguments as for ``render``.

    Clients' special strings are broken with a zero width space, since the
    library tokenises by itself. Tokens are counted where the model has a
    tokenizer, else estimated.

    Raises:
      RkvlmdError: see ``render``.

    """
    layouts, places = _order(turns, pictures)
    words = _words(folder, manifest) if manifest.tokenizer is not None else None
    tags = manifest.image
    strings = {*prompt.RKLLM_PLACES, *manifest.special_strings, manifest.marker}
    strings |= {tags.start, tags.content, tags.end} if tags is not None else set()
    strings |= words.specials.strings if words is not None else set()
    template = _template(folder, manifest)
    rendered = template.render(turns, prompt.Specials(strings), len(pictures), thinking)
    thoughts = template.thoughts(rendered, thinking)
    # The library takes a string of C: it would end at the first NUL.
    rendered = rendered.replace(prompt.BREAK, prompt.ZERO_WIDTH).replace("\0", "")
    try:
        films = _films(turns, pictures)
        shown = manifest.decoder.input == "text"
        text = prompt.mark_pictures(rendered, template.place, tags, layouts, films, shown=shown)
        if words is None:
            count = sum(tokens for _, _, tokens in places) + 2 * len(places)
            spans = [(0, tokens, index, view) for index, view, tokens in places]
            return Rendered(text, [], spans, estimate.most_tokens(text) + count, *thoughts)
        whole = prompt.place_pictures(rendered, template.place, tags, layouts)
        tokens, spans = prompt.expand(words.encode(whole), words.content, places)
    except prompt.PromptError as exc:
        raise RkvlmdError("invalid_model", f"The model's files do not agree: {exc}.") from exc
    return Rendered(text, tokens, spans, len(tokens), *thoughts)


# --- the tokenizer -------------------------------------------------------------------


class Words:
    """A tokenizer and the special strings of its model."""

    def __init__(self, tokenizer: Any, manifest: Manifest) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        tags = [manifest.image.content] if manifest.image else []
        tags += [manifest.video.content] if manifest.video else []
        strings = {token.content for token in added.values() if token.special}
        strings |= {*manifest.special_strings, *tags, manifest.marker}
        self.specials = prompt.Specials(strings)
        #: Special strings that are one token; the others are only broken.
        self.ids = {t.content: i for i, t in added.items() if t.content in self.specials.strings}
        self.content = -1
        if manifest.image is not None:
            if manifest.image.content not in self.ids:
                raise RkvlmdError(
                    "invalid_model", "The model's image.content is no token of its tokenizer."
                )
            self.content = self.ids[manifest.image.content]

    def encode(self, text: str) -> list[int]:
        """Return token ids, special tokens included."""
        return self._encode(text, plain=False)

    def encode_plain(self, text: str) -> list[int]:
        """Return token ids, special tokens taken for text."""
        return self._encode(text, plain=True)

    def _encode(self, text: str, *, plain: bool) -> list[int]:
        self._tokenizer.encode_special_tokens = plain
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _words(folder: str, manifest: Manifest) -> Words:
    if manifest.tokenizer is None:
        raise RkvlmdError("invalid_model", "The model has no tokenizer.")

    def load(path: Path) -> Words:
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as exc:  # the library raises Exception itself
            raise RkvlmdError(
                "invalid_model", "The model's tokenizer file cannot be read."
            ) from exc
        return Words(tokenizer, manifest)

    return _from_file(load, folder, manifest.tokenizer.file, manifest)


# --- the template --------------------------------------------------------------------


class Template:
    """A compiled template, and in which form it wants a message's content.

    Most templates of vision models iterate over a list of parts and write the
    manifest's marker for a picture. Others only take a string: those get a
    private mark at each picture's place.
    """

    def __init__(self, source: str, named: dict[str, str], manifest: Manifest) -> None:
        try:
            self._compiled = environment().from_string(source)
        except jinja2.TemplateError as exc:
            raise RkvlmdError("invalid_model", "The model's template cannot be read.") from exc
        self._named = named
        self._tags = manifest.thinking
        #: Whether it asks if the model shall think.
        self.switches = _SWITCH in jinja2.meta.find_undeclared_variables(
            environment().parse(source)
        )
        self._lists = self._takes_lists(manifest)
        #: What stands at a picture's place in a rendered prompt.
        self.place = manifest.marker if self._lists else prompt.PICTURE

    def thoughts(self, rendered: str, thinking: bool | None) -> tuple[bool, bool]:
        """Return whether a prompt ends inside thoughts, and whether ``thinking`` was followed."""
        tags = self._tags
        opened = tags is not None and rendered.rstrip().endswith(tags.start)
        able = self.switches or (tags is None and not thinking) or bool(tags and tags.system)
        return opened, thinking is None or able

    def render(
        self,
        turns: Sequence[dict[str, Any]],
        specials: prompt.Specials,
        pictures: int,
        thinking: bool | None = None,
    ) -> str:
        """Return the prompt, broken special strings still broken.

        ``thinking`` is what the template knows as ``enable_thinking``, or not at all.

        Raises:
          RkvlmdError: see ``render.render``.

        """
        shape = prompt.as_parts if self._lists else prompt.as_strings
        if self._tags is not None:
            turns = prompt.without_thoughts(turns, self._tags.end)
            if thinking and self._tags.system:
                turns = prompt.told(turns, self._tags.system)
        named = {} if thinking is None else {_SWITCH: thinking}
        try:
            return self._run(shape(turns, specials), named)
        except TemplateRefusalError as exc:
            said = "".join(c for c in str(exc) if c.isprintable())[:_MOST_MESSAGE]
            raise RkvlmdError(
                "invalid_request",
                f"The model's chat template refuses this conversation: {said}",
                param="messages",
            ) from exc
        except (MemoryError, RkvlmdError):
            raise
        except Exception as exc:  # a template may call anything in any way
            raise RkvlmdError(
                "invalid_model", "The model's template failed on this conversation."
            ) from exc

    def _run(self, messages: list[dict[str, Any]], more: Mapping[str, Any] = _NOTHING) -> str:
        return self._compiled.render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **self._named,
            **more,
        )

    def _takes_lists(self, manifest: Manifest) -> bool:
        text = {"type": "text", "text": _PROBE}
        content = [{"type": "image"}, text] if manifest.image is not None else [text]
        try:
            shown = self._run([{"role": "user", "content": content}])
        except Exception:  # noqa: BLE001 - whatever it was, the other form is left
            return False
        places = shown.count(manifest.marker) if manifest.image is not None else 0
        # A template for strings writes the list as Python shows it.
        listed = "'type'" in shown or '"type"' in shown
        return _PROBE in shown and not listed and places == len(content) - 1


def _template(folder: str, manifest: Manifest) -> Template:
    if manifest.template is None:
        source = families.get(manifest.family).template
        if not source:
            raise RkvlmdError("invalid_model", "The model has no chat template.")
        return _kept(
            ("family", folder, digest(manifest)),
            lambda: Template(source, _named(Path(folder)), manifest),
        )

    def load(path: Path) -> Template:
        return Template(_read(path, "template"), _named(Path(folder)), manifest)

    return _from_file(load, folder, manifest.template.file, manifest)


def _named(folder: Path) -> dict[str, str]:
    """Return the tokens that templates call by name, where the folder says them.

    The published place for them is ``tokenizer_config.json``; each is a string
    or an object with ``content``.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        said = json.loads(_read(path, "tokenizer configuration"))
    except (ValueError, RecursionError) as exc:
        raise RkvlmdError(
            "invalid_model", "The model's tokenizer configuration is no JSON."
        ) from exc
    named = {}
    for name in _NAMED if isinstance(said, dict) else ():
        value = said.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            named[name] = value
    return named


def _read(path: Path, what: str) -> str:
    if path.stat().st_size > _MOST_BYTES:
        raise RkvlmdError(
            "invalid_model", f"The model's {what} is larger than {_MOST_BYTES} bytes."
        )
    return path.read_text(encoding="utf-8")


# --- files that stay open ------------------------------------------------------------

_made: dict[tuple[Any, ...], Any] = {}


def _from_file(load: Callable[[Path], T], folder: str, name: str, manifest: Manifest) -> T:
    """Return what ``load`` makes of a file; again only when the file or the manifest changes."""
    path = Path(folder) / name
    try:
        stat = path.stat()
        key = (load.__qualname__, str(path), stat.st_mtime_ns, stat.st_size, digest(manifest))
        return _kept(key, lambda: load(path))
    except (OSError, UnicodeDecodeError) as exc:
        raise RkvlmdError("invalid_model", f"The model's file {name!r} cannot be read.") from exc


def _kept(key: tuple[Any, ...], make: Callable[[], T]) -> T:
    """Return what was made for ``key``; the least recently used goes when there are too many."""
    made: T | None = _made.pop(key, None)
    made = make() if made is None else made
    _made[key] = made
    while len(_made) > 2 * _KEPT:
        del _made[next(iter(_made))]
    return made
