"""Writes the manifest of an imported model, and brings its files to where the daemon looks."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkvlmd.ctl.client import CtlError
from rkvlmd.ctl.render import ProgressLine, size

if TYPE_CHECKING:
    from rkvlmd.models.building import Note
    from rkvlmd.models.manifest import Manifest

#: What a chat template that stood inside a JSON file is written as.
TEMPLATE = "chat_template.jinja"
#: Small files that the daemon reads beside those of the manifest.
BESIDE = ("tokenizer_config.json",)
#: What a model may be called.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CHUNK = 1 << 20
#: What a system says where somebody may not write.
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class CannotPlaceError(CtlError):
    """The model's folder cannot be written."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model goes. ``own``: the folder that was named lies there already."""

    name: str
    folder: Path
    own: bool
    replace: bool

    def ready(self, files: Iterable[str], source: Path) -> None:
        """Check that there is room and that nothing is overwritten.

        Raises:
          CannotPlaceError: with what to do.

        """
        if (self.folder / "rkvlm.json").exists() and not self.replace:
            message = f"{self.folder} has an rkvlm.json; --replace writes a new one"
            raise CannotPlaceError(message, code="exists", param="--replace")
        if self.own:
            return
        for file in files:
            there = self.folder / file
            if there.exists() and (source / file).exists() and not _same(there, source / file):
                message = f"{there} is another file than {source / file}; take another --as NAME"
                raise CannotPlaceError(message, code="exists", param="--as")
        above = next(p for p in (self.folder, *self.folder.parents) if p.is_dir())
        needed = sum((source / f).stat().st_size for f in files if (source / f).exists())
        if _links(source, above):
            return
        free = shutil.disk_usage(above).free
        if needed > free:
            message = f"{above} has {size(free)} free, the files need {size(needed)}"
            raise CannotPlaceError(message, code="no_space", param="--models")

    def above(self) -> Path:
        """Return the folder nearest to the model's that is there already."""
        return next(p for p in (self.folder.parent, *self.folder.parents) if p.is_dir())

    def write(
        self,
        tree: dict[str, Any],
        source: Path,
        files: Iterable[str],
        texts: Mapping[str, str | Path],
    ) -> str:
        """Bring the files, write the manifest ``tree`` last; return how the files got there.

        ``texts`` are the files that ``source`` has not, with their content, or
        where it was made.

        Raises:
          CannotPlaceError: a file cannot be written.

        """
        ways: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for file in files:
                target = self.folder / file
                made = texts.get(file)
                if isinstance(made, Path):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(made, target)
                elif made is not None:
                    _written(target, made)
                elif not self.own:
                    ways.add(_brought(source / file, target))
            if not self.own:
                for file in BESIDE:
                    if (source / file).is_file():
                        _brought(source / file, self.folder / file)
            _written(self.folder / "rkvlm.json", _text(tree))
        except OSError as exc:
            message = f"{self.folder}: cannot be written ({exc.strerror})"
            if exc.errno in _FORBIDDEN:
                message += (
                    "; run it as a user who may write there (sudo), or take another folder of"
                    " models with --models, which the daemon must then be told of"
                )
            raise CannotPlaceError(message, code="failed") from None
        if self.own:
            return "the files stay where they are"
        return "files copied" if "copied" in ways else "files hard-linked, so they take no room"


def plan(source: Path, models: Path, name: str | None, model: str, *, replace: bool) -> Place:
    """Return where a model goes: its own folder if that is a model folder, else a new one.

    Raises:
      CannotPlaceError: the name cannot be one.

    """
    own = source.resolve().parent == models.resolve()
    chosen = name or (source.resolve().name if own else model)
    if not NAME.fullmatch(chosen):
        message = (
            f"{chosen!r} cannot be a model's name (letters, digits, dot, dash, underscore, at"
            " most 64); give one with --as NAME"
        )
        raise CannotPlaceError(message, code="usage", param="--as")
    return Place(chosen, source.resolve() if own else models / chosen, own, replace)


def check(tree: dict[str, Any]) -> Manifest:
    """Return the manifest that ``tree`` is.

    Raises:
      CannotPlaceError: it would not be one; this names every key at fault.

    """
    from rkvlmd.errors import ManifestError
    from rkvlmd.models import families, manifest

    try:
        made = manifest.parse(json.dumps(tree).encode(), tree["name"])
    except ManifestError as exc:
        raise CannotPlaceError("; ".join(exc.problems), code="invalid_model") from None
    if made.family not in families.known():
        message = f"family: {made.family} is not known to this version of rkvlmd"
        raise CannotPlaceError(message, code="unknown_family", param="family")
    return made


def files_of(tree: dict[str, Any]) -> list[str]:
    """Return the files that a manifest names, each once."""
    from rkvlmd.models import manifest

    return sorted({f.file for f in manifest.files(manifest.from_builtins(tree)).values()})


def hashes(
    source: Path,
    files: Iterable[str],
    texts: Mapping[str, str | Path],
    line: ProgressLine,
    name: str,
) -> dict[str, str]:
    """Return the SHA-256 (hex) of each file; reads them all, but those in ``texts``.

    Raises:
      CannotPlaceError: a file cannot be read.

    """
    names = list(files)
    total = sum((source / f).stat().st_size for f in names if (source / f).exists()) or 1
    done, found = 0, {}
    for file in names:
        digest = hashlib.sha256()
        made = texts.get(file)
        if isinstance(made, str):
            digest.update(made.encode())
        else:
            try:
                with (made or source / file).open("rb") as opened:
                    while data := opened.read(_CHUNK):
                        digest.update(data)
                        done += len(data)
                        line.show(name, "reading", done / total, file)
            except OSError as exc:
                raise CannotPlaceError(f"{file}: cannot be read ({exc.strerror})") from None
        found[file] = digest.hexdigest()
    return found


def unreadable(source: Path, files: Iterable[str]) -> list[Note]:
    """Return a note if the daemon's user may not read a file."""
    from rkvlmd.models.building import Note

    closed = [
        f for f in files if (source / f).exists() and not (source / f).stat().st_mode & stat.S_IROTH
    ]
    if not closed:
        return []
    says = f"only their owner may read {', '.join(closed)}; the service has a user of its own"
    return [Note("files", says, f"chmod o+r {' '.join(closed)}")]


def _text(tree: dict[str, Any]) -> str:
    """Return the file; what is empty is left out."""
    kept = {k: v for k, v in tree.items() if v not in (None, "", [], {}, ())}
    return json.dumps(kept, indent=2, ensure_ascii=False) + "\n"


def _written(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # A service of another user reads it; mkstemp lets nobody.
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def _brought(source: Path, target: Path) -> str:
    """Link a file, or copy it where that cannot be; the source stays as it is."""
    if target.exists() and _same(source, target):
        return "linked"
    target.parent.mkdir(parents=True, exist_ok=True)
    real = source.resolve()  # the link of a link would break when its aim moves
    try:
        os.link(real, target)
    except OSError:
        part = target.with_name(f".{target.name}.part")
        try:
            shutil.copyfile(real, part)
            os.replace(part, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise
        return "copied"
    return "linked"


def _same(one: Path, other: Path) -> bool:
    try:
        if os.path.samefile(one, other):
            return True
        if one.stat().st_size != other.stat().st_size:
            return False
        with one.open("rb") as a, other.open("rb") as b:
            return hashlib.file_digest(a, "sha256").digest() == (
                hashlib.file_digest(b, "sha256").digest()
            )
    except OSError:
        return False


def _links(source: Path, target: Path) -> bool:
    """Whether both lie on one file system, so that files need no room."""
    return source.stat().st_dev == target.stat().st_dev
