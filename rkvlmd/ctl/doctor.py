"""``rkvlmctl doctor``: what this machine has for the models, and what stops them; no daemon."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkvlmd import __version__
from rkvlmd.board import fits
from rkvlmd.board.finding import Finding
from rkvlmd.board.root import Here, Root, open_root
from rkvlmd.board.survey import Question, Report, look
from rkvlmd.ctl import render
from rkvlmd.ctl.client import CtlError

if TYPE_CHECKING:
    from rkvlmd.models.catalog import Entry
    from rkvlmd.settings import Settings

CONFIG = "/etc/rkvlmd/rkvlmd.toml"
#: Largest settings file that is read, bytes.
MAX_CONFIG_BYTES = 1 << 20
#: Where the service keeps its models.
SERVICE_STATE = "/var/lib/rkvlmd"
_COLOURS = {"ok": "\x1b[32m", "note": "", "warn": "\x1b[33m", "stop": "\x1b[31m"}
_PLAIN = "\x1b[0m"


class WrongUsageError(CtlError):
    """An option names what is not there."""

    exit_status = 2


def run(config: Path | None, models: Path | None, root: Path, *, as_json: bool) -> int:
    """Look at the machine below ``root`` and print what there is to say.

    Returns:
      1 if something stops an installed model from loading, else 0.

    Raises:
      WrongUsageError: an option names what is not there, or cannot be read.

    """
    if not root.is_dir():
        raise WrongUsageError(f"--root: there is no folder {root}", code="usage", param="--root")
    try:
        tree, here = open_root(root.absolute() if str(root) != "/" else root)
    except ValueError as exc:
        raise WrongUsageError(f"--root: {exc}", code="usage", param="--root") from None
    report = examine(tree, here, config, models)
    if as_json:
        whole = {"version": __version__, "root": str(root)} | report.to_json()
        print(json.dumps(whole))
    else:
        print(for_people(report, colour=render.wants_colour(sys.stdout)))
    return 0 if report.loads else 1


def examine(
    root: Root, here: Here, config: Path | None = None, models: Path | None = None
) -> Report:
    """Read settings and model folders, and look at the machine.

    Args:
      root: the machine.
      here: who asks.
      config: the settings file; ``None`` takes the usual one below ``root``.
      models: the folder of models; ``None`` takes that of the settings.

    """
    settings, broken = _settings(root, config)
    found, wrong = _models(root, here, settings, models)
    npu = settings.npu
    return look(
        root,
        here,
        Question(
            soc=npu.soc,
            library=npu.library,
            layout=npu.layout,
            reserve_bytes=settings.memory.reserve_bytes,
            models=found,
            broken=[*broken, *wrong],
        ),
    )


def _settings(root: Root, config: Path | None) -> tuple[Settings, list[Finding]]:
    """Return the settings, the defaults where the file cannot be used, and a line that says so."""
    # They cost a tenth of a second, which the other commands need not spend.
    from rkvlmd.errors import SettingsError
    from rkvlmd.settings import Settings, parse

    path = config if config is not None else root.real(CONFIG)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        if config is None:
            return Settings(), []
        raise WrongUsageError(
            f"--config: there is no file {config}", code="usage", param="--config"
        ) from None
    except OSError as exc:
        says = f"{path} cannot be read ({exc.strerror}); the defaults are assumed"
        todo = "ask as root, or as a user who may read it"
        return Settings(), [Finding("settings", "note", "settings", says, todo)]
    try:
        return parse(data[:MAX_CONFIG_BYTES].decode()), []
    except (SettingsError, UnicodeDecodeError) as exc:
        says = f"{path}: {exc}; the defaults are assumed"
        engines = ("onnx", "rknn", "rkllm")
        todo = "correct it; rkvlmd --check says when it is right"
        return Settings(), [Finding("settings", "stop", "settings", says, todo, engines)]


def _models(
    root: Root, here: Here, settings: Settings, given: Path | None
) -> tuple[list[fits.Model], list[Finding]]:
    """Return the installed models, and lines about the folders that are wrong."""
    from rkvlmd.models import catalog

    folder = given if given is not None else _folder(root, settings)
    wrong: list[Finding] = []
    try:
        os.listdir(folder)
    except PermissionError:
        # The service's folder is closed to others; the daemon itself may well read it.
        says = f"{folder} cannot be read by {here.user}"
        wrong.append(Finding("models", "note", "models", says, "ask as root to have them checked"))
        folder = Path(os.devnull)
    except OSError:
        pass  # it is not there, or no folder: then there are no models
    # The demo model belongs to this installation, not to a tree recorded elsewhere.
    entries, errors = catalog.scan(folder, demo=settings.models.demo and root.live)
    wrong += [
        Finding(
            "model.manifest", "stop", f"model {error.name}", "; ".join(error.problems),
            "correct the folder, or remove it", facts={"model": error.name},
        )
        for error in errors
    ]  # fmt: skip
    if not entries and not wrong:
        says, todo = f"none in {folder}", "see the README: one folder a model, with an rkvlm.json"
        wrong.append(Finding("models", "note", "models", says, todo))
    return [_model(entry) for entry in entries.values()], wrong


def _folder(root: Root, settings: Settings) -> Path:
    """Return the folder of models: the setting's, else this user's, else the service's."""
    from rkvlmd.settings import models_dir

    if settings.models.dir or settings.state.dir or root.live:
        own = root.real(str(models_dir(settings)))
        if settings.models.dir or settings.state.dir or own.is_dir():
            return own
    return root.real(f"{SERVICE_STATE}/models")


def _model(entry: Entry) -> fits.Model:
    manifest, decoder = entry.manifest, entry.manifest.decoder
    model = decoder.files.get("model")
    return fits.Model(
        name=entry.name,
        encoders=tuple(
            fits.Encoder(f"encoders[{i}]", e.engine, entry.folder / e.file, e.outputs)
            for i, e in enumerate(manifest.encoders)
        ),
        decoder=decoder.engine,
        file=entry.folder / model.file if model is not None else None,
        context=decoder.context,
        bytes=entry.bytes,
        kv_bytes=decoder.kv_bytes_per_token * decoder.context,
        npu_cores=decoder.npu_cores,
        runtime_versions=decoder.runtime_versions,
        iommu_domain=decoder.iommu_domain,
        cpu_mask=decoder.cpu_mask,
    )


def for_people(report: Report, *, colour: bool) -> str:
    """Return one line a finding, and one that sums up."""
    width = max((len(finding.what) for finding in report.findings), default=0)
    lines = [_line(finding, width, colour=colour) for finding in report.findings]
    return "\n".join([*lines, "", _sum(report)])


def _line(finding: Finding, width: int, *, colour: bool) -> str:
    ink = _COLOURS[finding.status] if colour else ""
    status = f"{ink}{finding.status:4}{_PLAIN if ink else ''}"
    text = f"{finding.what.ljust(width)}  {finding.says}"
    if finding.todo:
        text += f". To do: {finding.todo}"
    return f"{status}  {render.plain(text).replace(chr(10), ' ')}"


def _sum(report: Report) -> str:
    def count(status: str) -> int:
        return sum(finding.status == status for finding in report.findings)

    stops, warnings = count("stop"), count("warn")
    said: list[Any] = []
    if stops:
        said.append(f"{stops} of these lines keep a model from loading")
    else:
        said.append("nothing here stops an installed model from loading")
    if warnings:
        said.append(f"{warnings} {'warning' if warnings == 1 else 'warnings'}")
    return "; ".join(said) + "."
