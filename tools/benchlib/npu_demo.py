"""The demo model's evaluation through the simulated Rockchip engine, beside the CPU engine's.

The simulated library hands the prompt and the embeddings that it received to
the demo model's own decoder, so a float in a wrong place changes an answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rkvlmd.models.catalog import DEMO
from tests.npusim import compiler, models
from tests.npusim.fixture import PYTHON, QUICK

from . import process, simulated
from .figures import BenchError, Figure, significant
from .npu_load import Options

#: How far the two engines' shares of right answers may lie apart, percentage points.
MOST_POINTS = 1.0
#: Longest time of one evaluation, seconds.
EVALUATION_SECONDS = 4 * 3600.0
#: Skills that are asked in a short run: one picture, two pictures, a second turn.
FEW = ("count", "nth_picture", "follow_up")


def demo(options: Options) -> list[Figure]:
    """Evaluate the demo model through both engines; the largest difference of a skill."""
    skills = FEW if options.short else ()
    scenes = 2 if options.short else options.scenes
    with process.running(models=None) as daemon:
        cpu = _evaluate(daemon, scenes, skills)
    with tempfile.TemporaryDirectory(prefix="rkvlmd-mind-") as name:
        with _on_npu(Path(name)) as daemon:
            npu = _evaluate(daemon, scenes, skills)
    rows = []
    for drawing, of in cpu.items():
        for skill, there in of.items():
            here = npu[drawing][skill]
            rows.append(
                {
                    "drawing": drawing,
                    "skill": skill,
                    "questions": there["questions"],
                    "cpu_percent": there["percent"],
                    "npu_percent": here["percent"],
                    "points": round(here["percent"] - there["percent"], 2),
                }
            )
    # The whole evaluation counts, not the luck of one skill.
    all_questions = sum(row["questions"] for row in rows)
    means = [
        sum(row[key] * row["questions"] for row in rows) / all_questions
        for key in ("cpu_percent", "npu_percent")
    ]
    detail = {
        "npu": "simulated NPU with the demo model's own decoder behind it",
        "skills": rows,
        "cpu_percent": significant(means[0]),
        "npu_percent": significant(means[1]),
        "worst_points_of_a_skill": max(abs(row["points"]) for row in rows),
    }
    name = (
        f"demo model through the Rockchip engine against the CPU engine, {all_questions} questions"
    )
    return [Figure(name, abs(means[1] - means[0]), "points", most=MOST_POINTS, detail=detail)]


def _evaluate(daemon: process.Daemon, scenes: int, skills: tuple[str, ...]) -> dict[str, Any]:
    command = [
        sys.executable, str(process.ROOT / "tools" / "eval_demo_model"), "--json",
        "--url", f"http://{daemon.host}:{daemon.port}", "--scenes", str(scenes),
        "--drawings", "world",
    ]  # fmt: skip
    if skills:
        command += ["--skills", ",".join(skills)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=EVALUATION_SECONDS
    )
    if done.returncode != 0:
        raise BenchError(f"the evaluation failed: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@contextmanager
def _on_npu(folder: Path) -> Iterator[process.Daemon]:
    """Run a daemon whose demo model has its decoder on a simulated NPU with a mind."""
    write_model(folder / "models" / "demo")
    socket = folder / "mind.sock"
    environ = {k: v for k, v in os.environ.items() if not k.startswith("NPUSIM_")} | QUICK
    environ["PYTHONPATH"] = os.pathsep.join([str(PYTHON), str(process.ROOT)])
    environ |= {"NPUSIM_MIND": str(socket), "NPUSIM_NPU": str(folder / "npu")}
    library = compiler.library(simulated.VERSION)
    settings = f'[npu]\nlibrary = "{library}"\nsoc = "rk3588"\n[models]\ndemo = false\n'
    with subprocess.Popen(
        [sys.executable, "-m", "tests.npusim.mind", str(socket), str(DEMO)],
        stdout=subprocess.PIPE, cwd=process.ROOT,
    ) as mind:  # fmt: skip
        assert mind.stdout is not None
        try:
            if mind.stdout.readline() != b"ready\n":
                raise BenchError("the helper with the decoder did not start")
            with process.running(
                models=folder / "models", settings=settings, environ=environ
            ) as daemon:
                yield daemon
        finally:
            mind.kill()


def write_model(folder: Path) -> Path:
    """Write the demo model with its decoder on the NPU: the same files, another manifest."""
    folder.mkdir(parents=True)
    tree = json.loads((DEMO / "rkvlm.json").read_text())
    files = [encoder["file"] for encoder in tree["encoders"]]
    for file in (*files, tree["tokenizer"]["file"], tree["template"]["file"]):
        (folder / file).symlink_to(DEMO / file)
    decoder = tree["decoder"]
    model = models.rkllm(
        folder / "demo.rkllm", embed=decoder["embedding"], specials=tree["special_strings"]
    )
    tree["decoder"] = {
        "engine": "rkllm",
        "files": {"model": {"file": model.name, "sha256": simulated.digest(model)}},
        "context": decoder["context"],
        "embedding": decoder["embedding"],
        "runtime_versions": [simulated.VERSION],
        "lease": "npu",
    }
    (folder / "rkvlm.json").write_text(json.dumps(tree))
    return folder
