"""Where the models are, for the commands that work without a daemon."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rkvlmd.ctl.client import CtlError

if TYPE_CHECKING:
    from rkvlmd.models.templates import Template
    from rkvlmd.settings import Settings

CONFIG = Path("/etc/rkvlmd/rkvlmd.toml")
#: Largest settings file that is read, bytes.
MAX_CONFIG_BYTES = 1 << 20
#: Where the service keeps its models.
SERVICE = Path("/var/lib/rkvlmd/models")


def settings_of(config: Path | None) -> Settings:
    """Return the settings; the defaults where there is no file, and none was named.

    Raises:
      CtlError: the file that was named is not there, or is wrong.

    """
    from rkvlmd.errors import SettingsError
    from rkvlmd.settings import Settings, parse

    path = config if config is not None else CONFIG
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
        return parse(data[:MAX_CONFIG_BYTES].decode())
    except (FileNotFoundError, PermissionError) as exc:
        if config is None:
            return Settings()
        message = f"--config: {config} cannot be read ({exc.strerror})"
        raise CtlError(message, code="usage", param="--config") from None
    except (OSError, SettingsError, UnicodeDecodeError) as exc:
        raise CtlError(f"{path}: {exc}", code="usage", param="--config") from None


def models_folder(config: Path | None, given: Path | None) -> Path:
    """Return the folder of model folders: as given, else the setting's, else the service's."""
    if given is not None:
        return given
    from rkvlmd.settings import models_dir

    settings = settings_of(config)
    own = models_dir(settings)
    if settings.models.dir or settings.state.dir or own.is_dir() or not SERVICE.is_dir():
        return own
    return SERVICE


def catalogue() -> tuple[dict[str, Template], list[str]]:
    """Return the known models, and what is wrong with files of the catalogue."""
    from rkvlmd.models import templates

    found, errors = templates.load((templates.shipped(), templates.OWN))
    return found, [f"models.d/{error.name}.json: {'; '.join(error.problems)}" for error in errors]
