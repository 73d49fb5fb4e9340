"""The settings: one TOML file, parsed into one frozen object.

Every key has a default that is safe, a unit and a sentence; ``etc/rkvlmd.toml``
is rendered from them (``python -m rkvlmd.settings``) and a test holds the two together. All
problems of a file are reported at once, each with its key.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from rkvlmd.errors import SettingsError
from rkvlmd.hosts import client_network, split_allow
from rkvlmd.hosts import is_loopback as is_loopback
from rkvlmd.hosts import split_bind as split_bind
from rkvlmd.live import LIVE
from rkvlmd.paths import default_control_path
from rkvlmd.sections import CacheSettings as CacheSettings
from rkvlmd.sections import ControlSettings as ControlSettings
from rkvlmd.sections import EngineSettings as EngineSettings
from rkvlmd.sections import HttpSettings as HttpSettings
from rkvlmd.sections import LogSettings as LogSettings
from rkvlmd.sections import MediaSettings as MediaSettings
from rkvlmd.sections import MemorySettings as MemorySettings
from rkvlmd.sections import ModelsSettings as ModelsSettings
from rkvlmd.sections import NpuSettings as NpuSettings
from rkvlmd.sections import PrepSettings as PrepSettings
from rkvlmd.sections import QueueSettings as QueueSettings
from rkvlmd.sections import Settings as Settings
from rkvlmd.sections import StateSettings as StateSettings

SECTIONS: dict[str, type] = {f.name: get_type_hints(Settings)[f.name] for f in fields(Settings)}


def parse(text: str) -> Settings:
    """Parse TOML text.

    Raises:
      SettingsError: with every problem, each as ``section.key: what is wrong``.

    """
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise SettingsError([f"not TOML: {exc}"]) from exc
    except (RecursionError, ValueError) as exc:  # of numbers and nesting that nobody means
        raise SettingsError(["not TOML: a number is too long, or the nesting too deep"]) from exc
    problems: list[str] = []
    sections: dict[str, Any] = {}
    for name, value in tree.items():
        if name not in SECTIONS:
            problems.append(f"{name}: no such section")
        elif not isinstance(value, dict):
            problems.append(f"{name}: must be a section")
        else:
            sections[name] = _section(name, SECTIONS[name], value, problems)
    if problems:
        raise SettingsError(problems)
    settings = Settings(**sections)
    problems = check(settings)
    if problems:
        raise SettingsError(problems)
    return settings


def _section(name: str, cls: type, values: dict[str, Any], problems: list[str]) -> Any:
    known = {f.name: f for f in fields(cls)}
    hints = get_type_hints(cls)
    given: dict[str, Any] = {}
    for option, value in values.items():
        path = f"{name}.{option}"
        if option not in known:
            problems.append(f"{path}: no such setting")
            continue
        try:
            converted = msgspec.convert(value, hints[option])
        except msgspec.ValidationError as exc:
            problems.append(f"{path}: {exc}")
            continue
        if isinstance(converted, float) and not math.isfinite(converted):
            problems.append(f"{path}: must be a finite number")
            continue
        least = known[option].metadata["least"]
        if least is not None and not converted >= least:
            unit = known[option].metadata["unit"]
            problems.append(f"{path}: must be at least {least} {unit}".rstrip())
            continue
        given[option] = converted
    return cls(**given)


def check(settings: Settings) -> list[str]:
    """Return what is wrong between the settings, each as ``key: what is wrong``."""
    problems: list[str] = []
    try:
        host, _ = split_bind(settings.http.bind)
    except ValueError as exc:
        problems.append(f"http.bind: {exc}")
    else:
        http = settings.http
        if not is_loopback(host) and not http.api_keys_file and not http.allow_unauthenticated:
            problems.append(
                "http.bind: an address that is not loopback needs http.api_keys_file,"
                " or http.allow_unauthenticated = true"
            )
    for name, entries, parse_one in (
        ("media.allow", settings.media.allow, split_allow),
        ("queue.interactive_clients", settings.queue.interactive_clients, client_network),
        ("queue.batch_clients", settings.queue.batch_clients, client_network),
    ):
        for entry in entries:
            try:
                parse_one(entry)
            except ValueError as exc:
                problems.append(f"{name}: {entry!r}: {exc}")
    if settings.log.level not in {"debug", "info", "warning", "error"}:
        problems.append("log.level: must be debug, info, warning or error")
    if settings.npu.sampling not in {"warn", "reject"}:
        problems.append("npu.sampling: must be warn or reject")
    if settings.engine.heal_max_seconds < settings.engine.heal_seconds:
        problems.append("engine.heal_max_seconds: must not be below engine.heal_seconds")
    if settings.media.max_image_bytes > settings.http.max_body_bytes:
        problems.append("media.max_image_bytes: must not be above http.max_body_bytes")
    if settings.http.max_body_bytes > settings.queue.max_bytes:
        problems.append("http.max_body_bytes: must not be above queue.max_bytes")
    return problems


def state_dir(settings: Settings) -> Path:
    """Where the daemon keeps its state: the setting, systemd's folder, or the user's."""
    if settings.state.dir:
        return Path(settings.state.dir)
    if folder := os.environ.get("STATE_DIRECTORY"):
        return Path(folder.split(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib/rkvlmd")
    home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local/state")
    return Path(home) / "rkvlmd"


def models_dir(settings: Settings) -> Path:
    """Where the model folders lie."""
    return Path(settings.models.dir) if settings.models.dir else state_dir(settings) / "models"


def control_path(settings: Settings) -> Path:
    """Where the control socket is; ``rkvlmctl`` uses the same rule."""
    return Path(settings.control.path) if settings.control.path else default_control_path()


def render() -> str:
    """Return the commented file with every key at its default (``etc/rkvlmd.toml``)."""
    lines = [
        "# Settings of rkvlmd. Every key is shown with its default; remove the # to change it.",
        '# A change of a key with * is taken over by "rkvlmctl reload" and "systemctl reload";',
        "# the others need a restart.",
    ]
    for name, cls in SECTIONS.items():
        lines += ["", f"# {cls.__doc__}", f"[{name}]"]
        for f in fields(cls):
            default = f.default if f.default is not dataclasses.MISSING else ()
            unit = f" ({f.metadata['unit']})" if f.metadata["unit"] else ""
            star = " *" if f"{name}.{f.name}" in LIVE else ""
            lines += [f"# {f.metadata['doc']}{unit}{star}", f"# {f.name} = {_toml(default)}"]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


if __name__ == "__main__":
    import sys

    sys.stdout.write(render())
