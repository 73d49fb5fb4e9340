"""What end-to-end tests share: a folder with two tiny models, and a daemon over it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.daemon import Daemon, running
from tests.fakes.tiny_model import make_model


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models ``tiny`` and ``other``; a test that changes one copies it first."""
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "tiny", name="tiny")
    make_model(folder / "other", name="other")
    return folder


@pytest.fixture
def daemon(tmp_path: Path, models: Path) -> Iterator[Daemon]:
    """A daemon of this test alone, on default settings."""
    with running(tmp_path, models) as started:
        yield started
