"""``tools/bench npu``: every figure in its short form. What it measured is nobody's business here."""

from __future__ import annotations

import json
from typing import Any

import pytest

for needed in ("numpy", "tokenizers", "PIL", "onnxruntime"):
    pytest.importorskip(needed)

from tools.benchlib import cli, figures, npu, npu_life, simulated, trace  # noqa: E402

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
    "soak": (4, {"faults", "load"}),
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
    assert any("rkvlmd" in row["function"] for row in found[0]["detail"]["top"])


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


def test_slope() -> None:
    slope, error = npu_life.slope_of([(x / 10, 3 + 2 * x / 10) for x in range(20)])
    assert slope == pytest.approx(2)
    assert error == pytest.approx(0, abs=1e-6)
    slope, error = npu_life.slope_of([(float(x), (-1.0) ** x) for x in range(40)])
    assert abs(slope) < 2 * error
    with pytest.raises(figures.BenchError):
        npu_life.slope_of([(1.0, 1.0)])


def test_settings_are_merged() -> None:
    made = simulated.merged("[a]\nx = 1\ny = 2\n", "[b]\nz = 3", "[a]\ny = 4\n")
    assert made == "[a]\nx = 1\ny = 4\n[b]\nz = 3\n"


def test_times_are_those_of_the_rk3588() -> None:
    full, tenth = simulated.Times.of(1), simulated.Times.of(10)
    assert (full.encode, full.decode, full.words) == (2080, 67.1, "RK3588 speed")
    assert tenth.encode == pytest.approx(208)
    assert tenth.words == "RK3588 divided by 10"
