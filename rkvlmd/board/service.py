"""The service as systemd's files describe it, and users and groups as /etc does."""

from __future__ import annotations

from dataclasses import dataclass

from rkvlmd.board.root import Here, Root

UNIT = "rkvlmd.service"
#: Where units lie, the strongest first (systemd.unit(5)).
FOLDERS = ("/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system",
           "/lib/systemd/system")  # fmt: skip
USER = "rkvlmd"


@dataclass(frozen=True, slots=True)
class Person:
    """A user with all their groups."""

    name: str
    uid: int
    gids: frozenset[int]


@dataclass(frozen=True, slots=True)
class Service:
    """``daemon``: as whom it runs, ``descriptors``: its LimitNOFILE (``None``: not said)."""

    installed: bool
    daemon: Person
    descriptors: int | None


def read(root: Root, here: Here) -> Service:
    """Return the service; without one, the daemon runs as the one who asks."""
    me = Person(here.user, here.uid, here.gids)
    texts = _texts(root)
    if not texts:
        return Service(False, person(root, USER) or me, None)
    user, limit = "root", ""
    extra: list[str] = []
    for key, value in _options(texts):
        if key == "User":
            user = value or "root"
        elif key == "LimitNOFILE":
            limit = value.partition(":")[0]
        elif key == "SupplementaryGroups":
            extra = [*extra, *value.split()] if value else []
    daemon = person(root, user, extra) or Person(user, -1, frozenset())
    if limit == "infinity":
        return Service(True, daemon, 1 << 30)
    return Service(True, daemon, int(limit) if limit.isdecimal() else None)


def _texts(root: Root) -> list[str]:
    """Return the unit and its drop-ins."""
    unit = next((t for f in FOLDERS if (t := root.text(f"{f}/{UNIT}")) is not None), None)
    if unit is None:
        return []
    texts = [unit]
    for folder in reversed(FOLDERS):
        names = root.names(f"{folder}/{UNIT}.d")
        texts += [
            root.text(f"{folder}/{UNIT}.d/{name}") or "" for name in names if name[-5:] == ".conf"
        ]
    return texts


def _options(texts: list[str]) -> list[tuple[str, str]]:
    lines = [line.strip() for text in texts for line in text.splitlines()]
    pairs = [line.partition("=") for line in lines if "=" in line and line[0] not in "#;["]
    return [(key.strip(), value.strip()) for key, _, value in pairs]


def person(root: Root, name: str, groups: list[str] | None = None) -> Person | None:
    """Return a user of /etc/passwd with the groups of /etc/group; root always exists."""
    entry = next((e for e in _table(root, "passwd") if e[0] == name and len(e) > 3), None)
    if entry is None:
        return Person("root", 0, frozenset({0})) if name == "root" else None
    if not (entry[2].isdecimal() and entry[3].isdecimal()):
        return None
    gids = {int(entry[3])}
    for group in _table(root, "group"):
        if len(group) < 4 or not group[2].isdecimal():
            continue
        if name in group[3].split(",") or group[0] in (groups or ()):
            gids.add(int(group[2]))
    return Person(name, int(entry[2]), frozenset(gids))


def group_name(root: Root, gid: int) -> str:
    """Return a group's name, its number where it has none."""
    for group in _table(root, "group"):
        if len(group) > 2 and group[2] == str(gid):
            return group[0]
    return str(gid)


def _table(root: Root, name: str) -> list[list[str]]:
    text = root.text(f"/etc/{name}", 1 << 20) or ""
    return [line.split(":") for line in text.splitlines()]
