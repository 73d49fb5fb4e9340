"""The simulated NPU is one for all processes and both libraries, with one active IOMMU domain."""

from __future__ import annotations

import fcntl
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rkvlmd.engine.rkllm_library import open_library
from rkvlmd.engine.rkllm_session import InitError, Session, Setup
from tests.npusim import compiler, models
from tests.npusim.fixture import PYTHON, Sim
from tests.npusim.house import plug_in

pytestmark = pytest.mark.process


@pytest.fixture
def sim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sim:
    made = plug_in(tmp_path, monkeypatch)
    monkeypatch.syspath_prepend(str(PYTHON))
    monkeypatch.setenv("NPUSIM_SWITCH_LIMIT_MS", "20")
    models.rkllm(tmp_path / "m.rkllm", embed=8)
    return made


@contextmanager
def another_at_work(sim: Sim, domain: int) -> Iterator[None]:
    """Have somebody else's work in flight inside the block."""
    fd = os.open(sim.folder / "npu", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.pwrite(fd, b"%-12d\n" % domain, 0)
        yield
    finally:
        os.close(fd)


def encode(_sim: Sim) -> bool:
    from rknnlite import npu

    return bool(npu.work(0, 0.1, "encode"))


def load(sim: Sim) -> bool:
    session = Session(open_library(str(compiler.library("1.3.0"))))
    try:
        session.open(Setup(sim.folder / "m.rkllm", 512, 100, domain=0))
    except InitError:
        return False
    session.close()
    return True


@pytest.mark.parametrize("work", [encode, load])
def test_work_in_another_domain_fails_while_work_is_in_flight(
    sim: Sim, work: Callable[[Sim], bool]
) -> None:
    with another_at_work(sim, domain=1):
        assert not work(sim)
        assert sim.one("switch_timeout")["domain"] == 0
        assert not sim.trace("npu")
    # Nobody is at work any more: the domain changes, and the next one finds it so.
    assert work(sim)
    assert (sim.one("switch")["from"], sim.one("switch")["to"]) == (1, 0)
    assert work(sim)
    assert len(sim.trace("switch")) == 1


def test_both_libraries_share_it(sim: Sim) -> None:
    assert load(sim)
    assert encode(sim)
    first, second = sim.trace("npu")
    assert (first["what"], second["what"]) == ("load", "encode")
    assert first["end"] <= second["begin"]


def visit(_sim: Sim) -> bool:
    from rknnlite import npu

    return bool(npu.fault("encode") == "")


@pytest.mark.parametrize(("place", "work"), [("encode", visit), ("init", load)])
def test_what_waits_goes_on_when_it_is_told_and_as_if_nothing_had_been(
    sim: Sim, monkeypatch: pytest.MonkeyPatch, place: str, work: Callable[[Sim], bool]
) -> None:
    monkeypatch.setenv("NPUSIM_FAULT", f"wait@{place}")
    done: list[bool] = []
    thread = threading.Thread(target=lambda: done.append(work(sim)))
    thread.start()
    while not sim.trace("fault"):
        time.sleep(0.001)
    assert not done
    sim.go()
    thread.join(60)
    assert done == [True]


def test_a_compiler_is_the_system_s_or_the_extra_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = compiler.compiler.__wrapped__
    monkeypatch.setenv("CXX", "my-compiler --fast")
    assert find() == ("my-compiler", "--fast")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find() == (sys.executable, "-m", "ziglang", "c++")
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    assert find() == (str(tmp_path / "g++"),)
