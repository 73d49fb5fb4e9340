"""A daemon on the simulated NPU of ``tests/npusim``, with a model of Qwen3-VL-2B's shape."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkvlmd.ctl.client import Client
from tests.npusim import compiler, folders
from tests.npusim.fixture import PYTHON

from . import chatload, process
from .trace import Trace

#: RK3588, Qwen3-VL-2B (Rockchip's multimodal benchmark, 1.3.0): milliseconds of a picture, of a
#: token of a prompt, of a token of an answer; loads as seen on an Orange Pi 5 Max. A token of a
#: prompt-cache file: nobody says, so its 112 KiB of keys and values at 1 GB/s.
RK3588 = {
    "NPUSIM_ENCODE_MS": 2080.0,
    "NPUSIM_PREFILL_MS": 3.31,
    "NPUSIM_DECODE_MS": 67.1,
    "NPUSIM_RESTORE_MS": 0.115,
    "NPUSIM_LOAD_MS": 3000.0,
    "NPUSIM_ENCODER_LOAD_MS": 500.0,
}
#: Times that nobody waits for, for the tests of these programs.
QUICK = 1000.0
NAME = "simulated-vlm"
VERSION = "1.3.0"
#: Qwen3-VL-2B at 448 pixels: tokens, embedding size, outputs of the encoder.
SIDE, TOKENS, EMBEDDING, OUTPUTS = 448, 196, 2048, 4
CONTEXT = 16384
#: Limits that no figure shall meet; the deadline of a job is an hour.
SETTINGS = """\
[http]
max_connections = 4096
[queue]
max_jobs = 2048
max_jobs_per_client = 0
max_bytes = 1073741824
max_pixels = 200000000
job_seconds = 3600.0
refuse_late = false
[models]
demo = false
"""


@dataclass(frozen=True, slots=True)
class Times:
    """The simulated NPU's times, milliseconds; ``scale`` divides those of the RK3588."""

    scale: float
    encode: float
    prefill: float
    decode: float
    load: float
    decoder_load: float

    @classmethod
    def of(cls, scale: float) -> Times:
        """Return those of an RK3588 divided by ``scale``."""
        ms = {name: value / scale for name, value in RK3588.items()}
        decoder = ms["NPUSIM_LOAD_MS"]
        return cls(
            scale,
            ms["NPUSIM_ENCODE_MS"],
            ms["NPUSIM_PREFILL_MS"],
            ms["NPUSIM_DECODE_MS"],
            decoder + ms["NPUSIM_ENCODER_LOAD_MS"],
            decoder,
        )

    @property
    def words(self) -> str:
        """How figures name them."""
        return "RK3588 speed" if self.scale == 1 else f"RK3588 divided by {self.scale:g}"


@dataclass(frozen=True, slots=True)
class Board:
    """A running daemon, its simulated NPU's trace, and where to ask."""

    daemon: process.Daemon
    trace: Trace
    target: chatload.Target
    times: Times
    folder: Path
    environ: dict[str, str]

    @property
    def model(self) -> Path:
        """The folder of the model."""
        return self.folder / "models" / NAME

    def pids(self) -> dict[str, int]:
        """Return the pids of the daemon and of its children, by name."""
        return process.tree(self.daemon.pid)

    def load(self) -> None:
        """Load the model and wait."""
        with Client(self.daemon.control) as client:
            client.call("load", {"model": NAME}, progress=lambda _: None)

    def status(self) -> dict[str, Any]:
        """Return what ``rkvlmctl status`` shows."""
        with Client(self.daemon.control) as client:
            return client.call("status")


def environment(folder: Path, times: Times, **more: str) -> dict[str, str]:
    """Return the environment of a simulated board whose files are in ``folder``."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("NPUSIM_")}
    kept["PYTHONPATH"] = os.pathsep.join(
        [str(PYTHON), str(process.ROOT), os.environ.get("PYTHONPATH", "")]
    )
    return (
        kept
        | {name: f"{value / times.scale:.6f}" for name, value in RK3588.items()}
        | {
            "NPUSIM_TRACE": str(folder / "trace.jsonl"),
            "NPUSIM_NPU": str(folder / "npu"),
            "NPUSIM_FAULT_FILE": str(folder / "faults"),
            "NPUSIM_REPLY": "count",
            "NPUSIM_REPLY_WORDS": "400",
        }
        | more
    )


def write_model(folder: Path, **changes: Any) -> Path:
    """Write a model folder of Qwen3-VL-2B's shape; the weights are not there."""
    folders.write(
        folder,
        outputs=OUTPUTS,
        model={"embed": EMBEDDING, "merge": 32, "limit": CONTEXT},
        vision_file={"width": SIDE, "height": SIDE, "tokens": TOKENS, "embed": EMBEDDING},
    )
    path = folder / "rkvlm.json"
    tree = json.loads(path.read_text())
    tree["decoder"] |= {"context": CONTEXT, "embedding": EMBEDDING, "runtime_versions": [VERSION]}
    tree["encoders"][0] |= {
        "width": SIDE, "height": SIDE, "tokens": TOKENS, "embedding": EMBEDDING
    }  # fmt: skip
    path.write_text(json.dumps(tree | changes))
    return folder


@contextmanager
def board(
    *,
    scale: float = 10.0,
    settings: str = "",
    program: Sequence[str] = ("rkvlmd",),
    environ: Mapping[str, str] | None = None,
    loaded: bool = True,
) -> Iterator[Board]:
    """Run a daemon on a simulated board inside the block.

    Args:
      scale: by how much the RK3588's times are divided.
      settings: more of the settings file; a table that ``SETTINGS`` has already
        is merged with it.
      program: the module to start, and arguments before the options.
      environ: variables on top of the simulator's.
      loaded: load the model before the block.

    Raises:
      BenchError: the daemon did not come up or did not leave as it should.

    """
    times = Times.of(scale)
    with tempfile.TemporaryDirectory(prefix="rkvlmd-npusim-") as name:
        folder = Path(name)
        write_model(folder / "models" / NAME)
        variables = environment(folder, times, **(environ or {}))
        npu = f'[npu]\nlibrary = "{compiler.library(VERSION)}"\nsoc = "rk3588"\n'
        with process.running(
            models=folder / "models",
            settings=merged(SETTINGS, npu, settings),
            program=program,
            environ=variables,
        ) as daemon:
            where = chatload.Target(daemon.host, daemon.port, model=NAME)
            trace = Trace(folder / "trace.jsonl")
            made = Board(daemon, trace, where, times, folder, variables)
            if loaded:
                made.load()
            trace.mark()
            yield made


def merged(*texts: str) -> str:
    """Return settings files as one; a later value of a key counts."""
    tables: dict[str, dict[str, str]] = {}
    for text in texts:
        table = ""
        for line in filter(None, map(str.strip, text.splitlines())):
            if line.startswith("["):
                table = line
            else:
                key, _, value = line.partition("=")
                tables.setdefault(table, {})[key.strip()] = value.strip()
    parts = [
        "\n".join([name, *(f"{key} = {value}" for key, value in keys.items())])
        for name, keys in tables.items()
    ]
    return "\n".join(parts) + "\n"


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def describe(times: Times) -> dict[str, Any]:
    """Return what every figure of the simulated NPU says of it."""
    return {"npu": "simulated NPU", "speed": times.words, **dataclasses.asdict(times)}
