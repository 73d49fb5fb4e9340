"""Which models are installed, and whether their files are what the manifests say.

Blocking code: it reads folders, manifests and, in ``verify``, whole model
files. The daemon calls it in threads.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import rkvlmd
from rkvlmd.errors import ManifestError
from rkvlmd.models import families, manifest
from rkvlmd.models.manifest import Manifest

#: Most model folders that are looked at.
MAX_FOLDERS = 256
#: The folder of the model that comes with the package; absent in a bare tree.
DEMO = Path(rkvlmd.__file__).parent / "demo_model"

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """One installed model.

    ``digest`` changes with anything the manifest says, ``created`` is the time
    of the manifest (seconds since 1970), ``bytes`` the size of all files.
    """

    name: str
    folder: Path
    manifest: Manifest
    digest: str
    created: int
    bytes: int


def scan(
    folder: Path,
    *,
    demo: bool,
    known_families: Container[str] | None = None,
    demo_folder: Path = DEMO,
) -> tuple[dict[str, Entry], list[ManifestError]]:
    """Read the manifest of each sub-folder of ``folder``; with ``demo`` the package's model too.

    A folder without ``rkvlm.json`` is none of ours. A model is called what its
    manifest says. Of two with one name the one is taken whose folder has that
    name too; without such a folder neither, because nobody could say which of
    them answers. The demo model gives way to an installed one.

    Returns:
      The good models by name, in order of names, and what is wrong with the
      others. No file is hashed here (``verify``).

    """
    known = families.known() if known_families is None else known_families
    errors: list[ManifestError] = []
    found: dict[str, list[Entry]] = {}
    for sub in _folders(folder, errors):
        try:
            entry = _read(sub, known)
        except ManifestError as exc:
            errors.append(exc)
        else:
            found.setdefault(entry.name, []).append(entry)
    entries: dict[str, Entry] = {}
    for name, group in found.items():
        if len(group) == 1:
            entries[name] = group[0]
            continue
        for entry in group:
            if entry.folder.name == name:
                entries[name] = entry
        names = ", ".join(entry.folder.name for entry in group)
        errors.append(ManifestError(name, [f"name: used by more than one folder: {names}"]))
    if demo and (demo_folder / manifest.FILE).exists():
        try:
            entry = _read(demo_folder, known)
        except ManifestError as exc:
            errors.append(exc)
        else:
            if entry.name not in found:
                entries[entry.name] = entry
    return dict(sorted(entries.items())), errors


def open_folder(folder: Path, known_families: Container[str] | None = None) -> Entry:
    """Read one model folder, wherever it lies.

    Raises:
      ManifestError: with every problem of the manifest, or of the files it names.

    """
    return _read(folder, families.known() if known_families is None else known_families)


def _folders(folder: Path, errors: list[ManifestError]) -> list[Path]:
    """Return the sub-folders with a manifest, by name; links to folders count."""
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError:
        errors.append(ManifestError(folder.name, ["the models folder cannot be read"]))
        return []
    subs = []
    for sub in (folder / name for name in names):
        try:
            (sub / manifest.FILE).stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            errors.append(ManifestError(sub.name, ["the folder cannot be read"]))
            continue
        subs.append(sub)
    for sub in subs[MAX_FOLDERS:]:
        problem = f"more than {MAX_FOLDERS} model folders; this one is not looked at"
        errors.append(ManifestError(sub.name, [problem]))
    return subs[:MAX_FOLDERS]


def _read(folder: Path, known: Container[str]) -> Entry:
    """Read one folder.

    Raises:
      ManifestError: with every problem of the manifest, or of the files it names.

    """
    path = folder / manifest.FILE
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise ManifestError(folder.name, [f"{manifest.FILE}: is not a file"])
        with path.open("rb") as file:
            data = file.read(manifest.MAX_BYTES + 1)
        parsed = manifest.parse(data, folder.name)
        problems = manifest.file_problems(parsed, folder)
        if parsed.family not in known:
            problems.insert(0, f"family: {parsed.family} is not known")
        if problems:
            raise ManifestError(parsed.name, problems)
        size = sum((folder / name).stat().st_size for name in _names(parsed))
    except OSError:
        raise ManifestError(folder.name, ["a file of the model cannot be read"]) from None
    return Entry(
        name=parsed.name,
        folder=folder,
        manifest=parsed,
        digest=manifest.digest(parsed),
        created=int(status.st_mtime),
        bytes=size,
    )


def _names(parsed: Manifest) -> list[str]:
    """Return the names of the files, each once."""
    return sorted({entry.file for entry in manifest.files(parsed).values()})


def verify(
    entry: Entry, remembered: Mapping[str, str], progress: Callable[[float], None]
) -> tuple[list[str], dict[str, str]]:
    """Compare the files of a model with the hashes of its manifest.

    ``remembered`` maps ``DEVICE:INODE:SIZE:MTIME_NS`` to a SHA-256 (hex) that
    was found before; a file with such a key is not read again. ``progress`` is
    called with 0..1, at least once a mebibyte; what it raises ends the check.

    Returns:
      The problems, each with its key, and the hashes to remember for this model.

    """
    total = max(1, entry.bytes)
    hashes: dict[str, str] = {}
    found: dict[str, str] = {}
    wrong: dict[str, str] = {}
    before = 0
    for name in _names(entry.manifest):

        def step(count: int, before: int = before) -> None:
            progress(min(1.0, (before + count) / total))

        step(0)
        path = entry.folder / name
        try:
            key, digest = _hash(path, remembered, step)
        except _WrongFileError as exc:
            wrong[name] = str(exc)
        else:
            found[name] = hashes[key] = digest
            before += int(key.split(":")[2])
    progress(1.0)
    problems = []
    for field, named in manifest.files(entry.manifest).items():
        if named.file in wrong:
            problems.append(f"{field}.file: {named.file} {wrong[named.file]}")
        elif found[named.file] != named.sha256:
            problems.append(f"{field}.sha256: {named.file} has the hash {found[named.file]}")
    return problems, hashes


class _WrongFileError(Exception):
    """A file has no hash; the text says why."""


def _hash(
    path: Path, remembered: Mapping[str, str], step: Callable[[int], None]
) -> tuple[str, str]:
    """Return the key of a file and its SHA-256; read it only if that is not remembered."""
    # What ``step`` raises is the caller's, an OSError too: only the file's own are caught.
    try:
        file = path.open("rb", buffering=0)
    except OSError:
        raise _WrongFileError("cannot be read") from None
    with file:
        key = _key(file)
        if key in remembered:
            return key, remembered[key]
        sha256 = hashlib.sha256()
        buffer = memoryview(bytearray(_CHUNK))
        done = 0
        while count := _read_into(file, buffer):
            sha256.update(buffer[:count])
            done += count
            step(done)
        if _key(file) != key:
            raise _WrongFileError("changed while it was read")
    return key, sha256.hexdigest()


def _key(file: FileIO) -> str:
    status = os.fstat(file.fileno())
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


def _read_into(file: FileIO, buffer: memoryview) -> int:
    try:
        return file.readinto(buffer)
    except OSError:
        raise _WrongFileError("cannot be read") from None
