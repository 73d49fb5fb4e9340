"""Chat template and tokenizer of a model folder: a conversation to token ids."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import Tokenizer

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
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")

T = TypeVar("T")
#: (start, count, picture, view)
Span = tuple[int, int, int, int]


class TemplateRefusalError(Exception):
    """The template called ``raise_exception``: it does not like the conversation."""


def render(
    folder: str,
    manifest: Manifest,
    turns: Sequence[dict[str, Any]],
    pictures: Sequence[Laid],
) -> tuple[list[int], list[Span]]:
    """Return the prompt's token ids and where each view's rows go.

    ``turns`` and ``pictures`` as in ``wire.child.Render``; spans are (start,
    count, picture, view).

    Raises:
      RkvlmdError: ``invalid_model`` for the model's own files,
        ``invalid_request`` for a conversation that the template refuses.

    """
    layouts, places = _order(turns, pictures)
    words, template = _words(folder, manifest), _template(folder, manifest)
    try:
        rendered = template.render(turns, words.specials, len(pictures))
        tokens = prompt.tokenise(
            prompt.place_pictures(rendered, template.place, manifest.image, layouts),
            words.encode,
            words.encode_plain,
            words.ids,
        )
        return prompt.expand(tokens, words.content, places)
    except prompt.PromptError as exc:
        raise RkvlmdError("invalid_model", f"The model's files do not agree: {exc}.") from exc


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


class Rendered(NamedTuple):
    """A prompt for RKLLM; ``most`` is the number of tokens, or an estimate that is not too small."""

    text: str
    tokens: list[int]
    spans: list[Span]
    most: int


def render_text(
    folder: str,
    manifest: Manifest,
    turns: Sequence[dict[str, Any]],
    pictures: Sequence[Laid],
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
    rendered = template.render(turns, prompt.Specials(strings), len(pictures))
    # The library takes a string of C: it would end at the first NUL.
    rendered = rendered.replace(prompt.BREAK, prompt.ZERO_WIDTH).replace("\0", "")
    try:
        films = [at for at, i in enumerate(prompt.picture_order(turns)) if pictures[i].video]
        text = prompt.mark_pictures(rendered, template.place, tags, layouts, films)
        if words is None:
            count = sum(tokens for _, _, tokens in places) + 2 * len(places)
            spans = [(0, tokens, index, view) for index, view, tokens in places]
            return Rendered(text, [], spans, estimate.most_tokens(text) + count)
        shown = prompt.place_pictures(rendered, template.place, tags, layouts)
        tokens, spans = prompt.expand(words.encode(shown), words.content, places)
    except prompt.PromptError as exc:
        raise RkvlmdError("invalid_model", f"The model's files do not agree: {exc}.") from exc
    return Rendered(text, tokens, spans, len(tokens))


# --- the tokenizer -------------------------------------------------------------------


class Words:
    """A tokenizer and the special strings of its model."""

    def __init__(self, tokenizer: Any, manifest: Manifest) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        tags = [manifest.image.content] if manifest.image else []
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
            self._compiled = _environment().from_string(source)
        except jinja2.TemplateError as exc:
            raise RkvlmdError("invalid_model", "The model's template cannot be read.") from exc
        self._named = named
        self._lists = self._takes_lists(manifest)
        #: What stands at a picture's place in a rendered prompt.
        self.place = manifest.marker if self._lists else prompt.PICTURE

    def render(
        self, turns: Sequence[dict[str, Any]], specials: prompt.Specials, pictures: int
    ) -> str:
        """Return the prompt, broken special strings still broken.

        Raises:
          RkvlmdError: see ``render.render``.

        """
        shape = prompt.as_parts if self._lists else prompt.as_strings
        try:
            return self._run(shape(turns, specials))
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

    def _run(self, messages: list[dict[str, Any]]) -> str:
        return self._compiled.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._named
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


# --- Jinja ---------------------------------------------------------------------------


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``, which training scripts use to find answers; here plain content."""

    tags = {"generation"}  # noqa: RUF012 - the base class says so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return what stands between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Return the environment in which the published templates are written to run."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
        autoescape=False,  # a prompt is no HTML
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise TemplateRefusalError(message)
