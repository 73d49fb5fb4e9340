"""What the RKLLM library measured of a run goes to usage, timings, metrics and the log."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from rkvlmd.front.http.metrics import render
from tests.fakes.prometheus import parse
from tests.fakes.scripted import chat, collect, submit
from tests.npusim import folders
from tests.npusim.house import open_house, plug_in

pytestmark = pytest.mark.process


async def test_the_library_s_figures_are_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sim = plug_in(tmp_path, monkeypatch)
    monkeypatch.setenv("NPUSIM_PREFILL_MS", "0.5")
    monkeypatch.setenv("NPUSIM_DECODE_MS", "50")
    monkeypatch.setenv("NPUSIM_REPLY", "count")
    monkeypatch.setenv("NPUSIM_REPLY_WORDS", "3")
    folders.write(tmp_path / "models" / "m", vision=False)
    caplog.set_level("INFO")
    async with open_house(sim) as house:
        with trio.fail_after(60):
            for text in ("the beginning, and one end", "the beginning, and another, longer end"):
                _, end = await collect(submit(house, chat(text, model="m")))
                assert end.reason == "stop"
            await house.scheduler.wait_empty()
        found = parse(render(house, 0))
    computed = [prefill["computed"] for prefill in sim.trace("prefill")]
    assert len(computed) == 2
    # Usage: what was not computed came from the cache.
    assert end.usage.cached_tokens == end.usage.prompt_tokens - computed[1] > 0
    # Timings: the library's own time of the prefill, not ours, which ends with the first token.
    assert 0.0005 * computed[1] <= end.timings.prefill < end.timings.first_token
    model = '{model_name="m"}'
    assert found[f"rkvlmd_prefix_cache_hits_total{model}"] == end.usage.cached_tokens
    lines = [r.getMessage() for r in caplog.records if "the NPU computed" in r.getMessage()]
    assert [int(line.split()[5]) for line in lines] == computed
    # The library leaves out the first token and counts the one that ends the answer.
    assert f"{end.usage.completion_tokens} of the answer" in lines[1]
    assert "the child's peak is" in lines[1]
