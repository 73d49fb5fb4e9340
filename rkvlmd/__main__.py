"""``rkvlmd``: argv and a file to settings, a log, the daemon, and an exit status."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import faulthandler
import logging
import os
import resource
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkvlmd import __version__

if TYPE_CHECKING:
    from rkvlmd.settings import Settings

log = logging.getLogger("rkvlmd")

DEFAULT_CONFIG = Path("/etc/rkvlmd/rkvlmd.toml")
#: Largest settings file that is read, bytes.
MAX_CONFIG_BYTES = 1 << 20
OK, FAILED, INTERRUPTED = 0, 1, 130
#: ``EX_CONFIG`` of sysexits.h; the service is not restarted after it.
BAD_SETTINGS = 78
#: syslog priorities that journald reads at the head of a line (sd-daemon(3)).
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}
_SECRET_ENDS = ("_key", "_token", "_secret", "password")
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status (2 leaves through ``argparse``)."""
    args = parser().parse_args(argv)
    if args.command == "demo":
        from rkvlmd import demo

        return demo.main()
    from rkvlmd.errors import SettingsError

    try:
        settings = settings_of(args)
    except SettingsError as exc:
        _print_problems(exc.problems, sys.stdout if args.check else sys.stderr)
        return BAD_SETTINGS
    return _check(settings) if args.check else _run(settings, partial(settings_of, args))


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = argparse.ArgumentParser(
        prog="rkvlmd",
        description="Serve vision-language models with an OpenAI-compatible endpoint.",
        epilog="exit status: 0 stopped, 1 failed, 2 wrong usage, 78 wrong settings",
    )
    top.add_argument("--version", action="version", version=f"rkvlmd {__version__}")
    top.add_argument(
        "--config", type=Path, metavar="FILE",
        help=f"settings; default {DEFAULT_CONFIG} where it exists",
    )  # fmt: skip
    top.add_argument("--http", metavar="HOST:PORT", help="where to serve; port 0 picks a free one")
    top.add_argument("--control", type=Path, metavar="PATH", help="the control socket")
    top.add_argument("--models", type=Path, metavar="DIR", help="the folder of model folders")
    top.add_argument("--state", type=Path, metavar="DIR", help="the state folder")
    top.add_argument(
        "--check", action="store_true", help="check settings and model folders, and exit"
    )
    top.add_argument(
        "command", nargs="?", choices=["demo"],
        help="demo: show pictures to a throw-away daemon and print its answers",
    )  # fmt: skip
    return top


def settings_of(args: argparse.Namespace) -> Settings:
    """Return the settings of the file with those of the command line over them.

    Raises:
      SettingsError: with every problem and its key.

    """
    from rkvlmd import settings as module
    from rkvlmd.errors import SettingsError

    settings = module.parse(_config_text(args.config))
    over: dict[str, dict[str, str]] = {}
    for section, option, value in (
        ("http", "bind", args.http),
        ("control", "path", args.control),
        ("models", "dir", args.models),
        ("state", "dir", args.state),
    ):
        if value is not None:
            # A child may run in another folder.
            text = os.path.abspath(value) if isinstance(value, Path) else value
            over[section] = {option: text}
    for section, options in over.items():
        changed = dataclasses.replace(getattr(settings, section), **options)
        settings = dataclasses.replace(settings, **{section: changed})
    if problems := module.check(settings):
        raise SettingsError(problems)
    return settings


def _config_text(given: Path | None) -> str:
    from rkvlmd.errors import SettingsError

    path = given or DEFAULT_CONFIG
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        if given is None:
            return ""
        raise SettingsError([f"--config: there is no file {path}"]) from None
    except OSError as exc:
        raise SettingsError([f"--config: {exc.strerror}: {path}"]) from None
    if len(data) > MAX_CONFIG_BYTES:
        raise SettingsError([f"--config: more than {MAX_CONFIG_BYTES} bytes: {path}"])
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise SettingsError([f"--config: not UTF-8 at byte {exc.start}: {path}"]) from None


def _check(settings: Settings) -> int:
    from rkvlmd import daemon

    problems = daemon.check(settings)
    _print_problems(problems or ["ok"], sys.stdout)
    return BAD_SETTINGS if problems else OK


def _print_problems(problems: list[str], stream: Any) -> None:
    for problem in problems:
        print(problem.translate(_CONTROLS), file=stream)


def _run(settings: Settings, reread: Callable[[], Settings]) -> int:
    import trio

    from rkvlmd import daemon

    # SIGABRT is how systemd's watchdog ends us: then the log tells where we were.
    faulthandler.enable()
    set_up_log(settings.log.level)
    for line in effective(settings):
        log.info("setting %s", line)
    raise_descriptors()
    try:
        trio.run(partial(daemon.main, settings, announce=_announce, reread=reread))
    except KeyboardInterrupt:
        return INTERRUPTED  # it came before the daemon took signals
    except (Exception, BaseExceptionGroup) as exc:  # noqa: BLE001 - becomes the exit status
        return _failed(exc)
    return OK


def raise_descriptors() -> None:
    """Raise the soft limit of open files to the hard one, at most ``DESCRIPTORS``.

    Each waiting client, picture and set of rows takes one, and the NPU's
    libraries take one a buffer; the usual soft limit is 1024. Children inherit it.
    """
    from rkvlmd.board.memory import DESCRIPTORS

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _announce(address: str) -> None:
    address = address if "//" in address else f"http://{address}"
    print(f"rkvlmd {__version__} listening on {address}", flush=True)


def _failed(exc: BaseException) -> int:
    """Say why the daemon ended, in one line where the owner can mend it."""
    from rkvlmd.errors import SettingsError

    leaves = list(_leaves(exc))
    if bad := [problem for leaf in leaves if isinstance(leaf, SettingsError)
               for problem in leaf.problems]:  # fmt: skip
        _print_problems(bad, sys.stderr)
        return BAD_SETTINGS
    if all(isinstance(leaf, KeyboardInterrupt) for leaf in leaves):
        return INTERRUPTED
    reason = _reason(leaves[0])
    expected = reason is not None
    log.critical("the daemon ends", exc_info=None if expected else exc)
    reason = reason or f"{type(leaves[0]).__name__}: {leaves[0]}"
    print(f"rkvlmd: {reason}".translate(_CONTROLS), file=sys.stderr)
    return FAILED


def _reason(exc: BaseException) -> str | None:
    """Return what the owner can mend, or ``None`` where it takes a trace to understand."""
    from rkvlmd.errors import StartError

    if isinstance(exc, StartError):
        return str(exc)
    if isinstance(exc, OSError) and exc.filename is None:
        # EAI_* numbers of a host that has no address are below zero.
        bind = {errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES}
        if exc.errno in bind or (exc.errno or 0) < 0:
            return f"http.bind: {exc.strerror}"
    return None


def _leaves(exc: BaseException) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from _leaves(inner)
    else:
        yield exc


def effective(settings: Settings) -> Iterator[str]:
    """Yield ``section.key = value`` for each setting that is not at its default."""
    for section in dataclasses.fields(settings):
        group = getattr(settings, section.name)
        usual = type(group)()
        for option in dataclasses.fields(group):
            value = getattr(group, option.name)
            if value != getattr(usual, option.name):
                secret = option.name.endswith(_SECRET_ENDS)
                yield f"{section.name}.{option.name} = {'***' if secret else repr(value)}"


class _Lines(logging.Formatter):
    """One line an event, and a trace, if any, on indented lines after it.

    Text from outside cannot start a line of its own: control characters are
    shown as escapes.
    """

    def __init__(self, *, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage().translate(_CONTROLS)
        lines = [f"{record.name}: {text}"]
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            lines += [f"    {line.translate(_CONTROLS)}" for line in trace.splitlines()]
        if self._journal:
            head = f"<{_PRIORITIES.get(record.levelno, 2)}>"
            return "\n".join(head + line for line in lines)
        lines[0] = f"{self.formatTime(record)} {record.levelname.lower():7} {lines[0]}"
        return "\n".join(lines)


def set_up_log(level: str) -> None:
    """Send the log to standard error, in journald's form where journald reads it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(journal=_journal_reads(sys.stderr)))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)


def _journal_reads(stream: Any) -> bool:
    """Whether ``stream`` goes to the journal (JOURNAL_STREAM of systemd.exec(5))."""
    given = os.environ.get("JOURNAL_STREAM", "")
    try:
        stat = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return given == f"{stat.st_dev}:{stat.st_ino}"


if __name__ == "__main__":
    sys.exit(main())
