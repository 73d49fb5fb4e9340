"""``tools/bench npu``: every figure in its short form. What it measured is nobody's business here."""

from __future__ import annotations

import itertools
import json
import math
import random
from typing import Any

import pytest

for needed in ("numpy", "tokenizers", "PIL", "onnxruntime"):
    pytest.importorskip(needed)

from tools.benchlib import cli, figures, npu, npu_life, npu_open, simulated, trace  # noqa: E402
from tools.benchlib.chatload import Answer  # noqa: E402

pytestmark = pytest.mark.process

#: How many figures each of them has, and what must be among their details.
FIGURES = {
    "overhead": (1, {"first_token_ms", "above_ms"}),
    "busy": (2, {"bare", "load"}),
    "same-picture": (1, set()),
    "conversation": (2, {"turns", "encodes"}),
    "interleaved": (1, {"prefilled_tokens"}),
    "interactive": (1, {"alone_ms", "with_the_others_ms"}),
    "waiting": (2, {"inter_token_ms"}),
    "loop": (1, {"worst"}),
    "leavers": (1, {"left"}),
    "memory": (3, {"with_prep_mb", "without_prep_mb"}),
    "restart": (1, {"answer_after_a_death_ms"}),
    "profile": (1, {"top"}),
    "demo": (1, {"skills"}),
    "soak": (5, {"faults", "load", "settling_minutes"}),
}


def test_every_figure_is_tried_here() -> None:
    assert set(FIGURES) == set(npu.MEASURES)


@pytest.mark.parametrize("name", FIGURES)
def test_short(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["npu", name, "--short", "--machine", "a test"])
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert report["missing"] == {}
    assert status == 0
    count, details = FIGURES[name]
    assert len(report["figures"]) == count
    assert details <= set(report["figures"][0]["detail"])
    assert report["machine"]["name"] == "a test"
    # Nobody shall take it for a figure of a board.
    assert "simulated NPU" in figures.table(report).lower().replace(
        "simulated npu", "simulated NPU"
    )
    assert "simulated NPU" in json.dumps(report["figures"][0]["detail"])
    check = globals().get(f"check_{name.replace('-', '_')}")
    if check is not None:
        check(report["figures"])


def check_same_picture(found: list[dict[str, Any]]) -> None:
    assert found[0]["value"] == 1


def check_conversation(found: list[dict[str, Any]]) -> None:
    assert found[0]["value"] == 0
    assert found[0]["detail"]["encodes"] == 1


def check_busy(found: list[dict[str, Any]]) -> None:
    for figure in found:
        ours, theirs = figure["detail"]["ours"], figure["detail"]["bare"]
        # The same work was done with and without a server.
        assert set(ours["by_work"]) == {"decode", "encode", "prefill"}
        assert ours["jobs"] == theirs["jobs"]
    assert found[0]["detail"]["encoder_loads_in_the_run"] == 0


def check_demo(found: list[dict[str, Any]]) -> None:
    rows = found[0]["detail"]["skills"]
    assert {row["skill"] for row in rows} == {"count", "nth_picture", "follow_up"}
    assert found[0]["value"] == 0


def check_profile(found: list[dict[str, Any]]) -> None:
    top = found[0]["detail"]["top"]
    assert [row["own_s"] for row in top] == sorted((row["own_s"] for row in top), reverse=True)
    # Of which parts is chance in so short a run; that it is the daemon's loop is not.
    assert any("trio/_core" in row["function"] for row in top)


# --- what they are made of -------------------------------------------------------------


def job(what: str, begin: float, end: float) -> dict[str, Any]:
    return {"ev": "npu", "what": what, "begin": int(begin * 1e9), "end": int(end * 1e9)}


def test_use_of_the_npu() -> None:
    events = [
        job("load", 0, 5),
        job("encode", 10, 12),
        job("prefill", 12, 13),
        job("decode", 14, 15),
    ]
    used = trace.use([*events, {"ev": "run"}])
    assert used["busy"] == pytest.approx(4 / 5)
    assert used["by_work"] == {"decode": 1, "encode": 2, "prefill": 1}
    assert trace.use([]) == {"busy": 0.0, "seconds": 0.0}


def check_soak(found: list[dict[str, Any]]) -> None:
    names = [figure["name"] for figure in found]
    assert any("anonymous memory of the daemon" in name for name in names)
    for figure in found:
        assert figure["detail"]["first"] > 0
        assert len(figure["detail"]["parts"]) >= 3


def test_slope() -> None:
    slope, error = npu_life.slope_of([(x / 10, 3 + 2 * x / 10) for x in range(20)])
    assert slope == pytest.approx(2)
    assert error == pytest.approx(0, abs=1e-6)
    slope, error = npu_life.slope_of([(x / 37, math.sin(x)) for x in range(37)])
    assert abs(slope) < 2 * error
    assert len(npu_life.blocks_of([(float(x), 0.0) for x in range(4)])) == 4
    assert npu_life.blocks_of([(float(x), 1.0) for x in range(100)])[1] == (14.5, 1.0)
    with pytest.raises(figures.BenchError):
        npu_life.slope_of([(1.0, 1.0)])
    with pytest.raises(figures.BenchError):
        npu_life.slope_of([(1.0, float(y)) for y in range(20)])


#: Looks in the three quarters of an hour that count, and the time of each in hours.
LOOKS = [number * npu_life.LOOK_SECONDS / 3600 for number in range(540)]


def grows(levels: list[float]) -> bool:
    """Whether a soak with these looks, MB, would miss its target."""
    slope, error = npu_life.slope_of(list(zip(LOOKS, levels, strict=True)))
    return slope > npu_life.STUDENT * error


def walk(rng: random.Random, step: float = 0.02) -> list[float]:
    """Memory that comes and goes in steps, and stays between them."""
    return list(itertools.accumulate(rng.gauss(0, step) for _ in LOOKS))


def test_steps_are_no_slope() -> None:
    """A heap that found its size late, and one that wanders, have not leaked."""
    for at in range(10, len(LOOKS), 30):
        assert not grows([30.0 if number < at else 32.0 for number in range(len(LOOKS))])
    rng = random.Random(5)
    # One of forty should be above by chance; a line through all looks says so of nearly half.
    assert sum(grows(walk(rng)) for _ in range(400)) < 400 * 0.05


@pytest.mark.parametrize("step", [0.0, 0.13])
def test_a_leak_is_a_slope(step: float) -> None:
    """1 MB an hour shows above the noise of looks, also where the C library takes 132 KiB at a time."""
    rng = random.Random(6)
    for _ in range(100):
        leaked = [at if not step else at // step * step for at in LOOKS]
        assert grows([30 + more + rng.gauss(0, 0.1) for more in leaked])
    # On top of a heap that wanders by some 0.1 MB in that time.
    assert sum(grows([a + b for a, b in zip(LOOKS, walk(rng, 0.005), strict=True)])
               for _ in range(100)) > 95  # fmt: skip


def test_settings_are_merged() -> None:
    made = simulated.merged("[a]\nx = 1\ny = 2\n", "[b]\nz = 3", "[a]\ny = 4\n")
    assert made == "[a]\nx = 1\ny = 4\n[b]\nz = 3\n"


def test_times_are_those_of_the_rk3588() -> None:
    full, tenth = simulated.Times.of(1), simulated.Times.of(10)
    assert (full.encode, full.decode, full.words) == (2080, 67.1, "RK3588 speed")
    assert tenth.encode == pytest.approx(208)
    assert tenth.words == "RK3588 divided by 10"
    assert full.load == full.decoder_load + 500


def test_work_for_clients_that_have_left() -> None:
    """A prefill in flight is not counted, one that begins later is, and every token."""

    def run(client: int, *jobs: tuple[str, float, float]) -> list[dict[str, Any]]:
        asked = {"ev": "run", "t": int(jobs[0][1] * 1e9), "prompt": f"client {client:04d} says"}
        return [asked, *(job(*one) for one in jobs)]

    def answer(gone: float | None) -> Answer:
        return Answer("leaver", 0.0, gone=gone)

    events = [
        *run(0, ("prefill", 1, 2), ("decode", 2, 2.5)),  # left in its prefill
        *run(1, ("prefill", 3, 4), ("decode", 4, 5), ("decode", 5, 6)),  # left in its first token
        *run(2, ("prefill", 7, 8)),  # had left before
        *run(3, ("prefill", 9, 10), ("decode", 10, 11)),  # stayed
        *run(4, ("prefill", 12, 13)),  # left afterwards
        # Left in the first part of its prefill, which no abort ends.
        *run(5, ("prefill", 30, 31), ("prefill", 31, 32), ("decode", 32, 32.25)),
    ]
    gone = {0: 1.5, 1: 4.5, 2: 6.5, 3: None, 4: 20.0, 5: 30.5}
    found = npu_open._overtime(events, {client: answer(at) for client, at in gone.items()})
    assert found == {
        0: pytest.approx(500), 1: pytest.approx(1500), 2: pytest.approx(1500), 4: 0.0,
        5: pytest.approx(250),
    }  # fmt: skip
