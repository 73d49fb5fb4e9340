"""What is counted, and the page that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from rkvlmd.actors.house import House
from rkvlmd.actors.metrics import Counter, Histogram, Metrics
from rkvlmd.board.gauges import read as read_gauges
from rkvlmd.board.root import open_root
from rkvlmd.errors import RkvlmdError
from rkvlmd.front.http.metrics import _counter, _histogram, render
from tests.fakes.boards import trees
from tests.fakes.prometheus import Samples, parse
from tests.fakes.quick_house import quick_house
from tests.fakes.scripted import chat, collect, submit, until_phase


def page(house: House) -> Samples:
    return parse(render(house, 3))


def text(*lines: str) -> Samples:
    return parse(("\n".join(lines) + "\n").encode())


def test_a_histogram_adds_up() -> None:
    family = Histogram("wait_seconds", "Wait.", (0.1, 1.0), "model_name")
    family.observe(0.1, "m")
    family.observe(0.5, "m", count=3)
    family.observe(7.0, "m")
    assert _histogram(family) == [
        "# HELP rkvlmd_wait_seconds Wait.",
        "# TYPE rkvlmd_wait_seconds histogram",
        'rkvlmd_wait_seconds_bucket{model_name="m",le="0.1"} 1',
        'rkvlmd_wait_seconds_bucket{model_name="m",le="1"} 4',
        'rkvlmd_wait_seconds_bucket{model_name="m",le="+Inf"} 5',
        'rkvlmd_wait_seconds_sum{model_name="m"} 8.6',
        'rkvlmd_wait_seconds_count{model_name="m"} 5',
    ]


def test_labels_are_escaped() -> None:
    family = Counter("x_total", "X.", "name")
    family.add('a"b\\c\nd')
    assert list(text(*_counter(family))) == ['rkvlmd_x_total{name="a\\"b\\\\c\\nd"}']


async def test_names_of_vllm_are_there_from_the_start(tmp_path: Path) -> None:
    """The names that dashboards of vLLM use, after ``vllm:`` has become ``rkvlmd_``."""
    async with quick_house(tmp_path, "a") as house:
        content = render(house, 0).decode()
    for name in (
        "num_requests_running", "num_requests_waiting", "num_preemptions_total",
        "prompt_tokens_total", "generation_tokens_total", "request_success_total",
        "prefix_cache_queries_total", "prefix_cache_hits_total", "mm_cache_queries_total",
        "mm_cache_hits_total", "admission_rejections_total", "time_to_first_token_seconds",
        "inter_token_latency_seconds", "e2e_request_latency_seconds",
        "request_queue_time_seconds", "request_prefill_time_seconds",
        "request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens",
        "request_generation_tokens", "request_params_max_tokens", "request_params_n",
        "iteration_tokens_total", "kv_cache_usage_perc", "cache_config_info",
    ):  # fmt: skip
        assert f"# TYPE rkvlmd_{name} " in content


async def test_two_answers(tmp_path: Path) -> None:
    async with quick_house(tmp_path, "a") as house:
        with trio.fail_after(60):
            for _ in range(2):
                await collect(submit(house, chat(pictures=1, model="a")))
            await house.scheduler.wait_empty()
        found = page(house)
    a = '{model_name="a"}'
    assert found[f"rkvlmd_prompt_tokens_total{a}"] == 12
    assert found[f"rkvlmd_prefix_cache_queries_total{a}"] == 12
    assert found[f"rkvlmd_prefix_cache_hits_total{a}"] == 0
    assert found[f"rkvlmd_generation_tokens_total{a}"] == 6
    assert found['rkvlmd_request_success_total{model_name="a",finished_reason="stop"}'] == 2
    for name in (
        "time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
        "request_prefill_time_seconds", "request_decode_time_seconds",
        "request_inference_time_seconds", "request_prompt_tokens", "request_generation_tokens",
        "request_params_max_tokens",
    ):  # fmt: skip
        assert found[f"rkvlmd_{name}_count{a}"] == 2, name
    assert found[f"rkvlmd_inter_token_latency_seconds_count{a}"] == 4
    assert found[f"rkvlmd_request_prompt_tokens_sum{a}"] == 12
    assert found[f"rkvlmd_request_generation_tokens_sum{a}"] == 6
    assert found["rkvlmd_image_decode_seconds_count"] == 1  # the second time it was known
    assert found['rkvlmd_image_encode_seconds_count{cache="miss"}'] == 1
    assert found['rkvlmd_image_encode_seconds_count{cache="hit"}'] == 1
    assert (found["rkvlmd_mm_cache_queries_total"], found["rkvlmd_mm_cache_hits_total"]) == (2, 1)
    assert found["rkvlmd_memfds"] == 1
    assert found["rkvlmd_memfd_bytes"] == found["rkvlmd_mm_cache_bytes"] == 128
    assert found["rkvlmd_lease_busy_seconds_total"] > 0
    assert found[f"rkvlmd_model_loaded{a}"] == 1
    assert found[f"rkvlmd_model_load_seconds{a}"] > 0
    assert found["rkvlmd_unknown_fields_total"] == 3
    assert found["rkvlmd_queue_bytes"] == 0
    latency = found[f"rkvlmd_request_inference_time_seconds_sum{a}"]
    parts = ("prefill", "decode")
    assert latency == pytest.approx(
        sum(found[f"rkvlmd_request_{part}_time_seconds_sum{a}"] for part in parts)
    )


async def test_who_waits_and_who_left(tmp_path: Path) -> None:
    async with quick_house(tmp_path, "a", queue={"max_jobs": 2, "max_jobs_per_client": 1}) as house:
        with trio.fail_after(60):
            async with house.tools.lease.hold("test", "a"):
                job = submit(house, chat(model="a", priority="batch"), "10.0.0.1")
                other = submit(house, chat(model="a"), "10.0.0.2")
                for client, code in (
                    ("10.0.0.1", "rate_limit_exceeded"), ("10.0.0.3", "server_is_overloaded"),
                ):  # fmt: skip
                    with pytest.raises(RkvlmdError) as info:
                        submit(house, chat(model="a"), client)
                    assert info.value.code == code
                for one in (job, other):
                    await until_phase(house, one, "waiting")
                found = page(house)
                assert found['rkvlmd_num_requests_waiting{model_name="a"}'] == 2
                assert found['rkvlmd_num_requests_running{model_name="a"}'] == 0
                assert found['rkvlmd_queue_requests{priority="batch"}'] == 1
                assert found['rkvlmd_queue_requests{priority="interactive"}'] == 0
                assert found["rkvlmd_queue_bytes"] > 0
                assert found['rkvlmd_admission_rejections_total{reason="client"}'] == 1
                assert found['rkvlmd_admission_rejections_total{reason="jobs"}'] == 1
                job.abandon("client_gone")
                other.abandon("cancelled")
            await house.scheduler.wait_empty()
        found = page(house)
    assert found['rkvlmd_client_disconnects_total{phase="waiting"}'] == 1
    assert found['rkvlmd_request_success_total{model_name="a",finished_reason="abort"}'] == 2
    assert found['rkvlmd_requests_ended_total{model_name="a",reason="client_gone"}'] == 1
    assert found['rkvlmd_num_requests_waiting{model_name="a"}'] == 0
    # What they never reached is not counted.
    assert 'rkvlmd_request_queue_time_seconds_count{model_name="a"}' not in found
    assert 'rkvlmd_time_to_first_token_seconds_count{model_name="a"}' not in found


async def test_one_line_in_the_log_for_each_job(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with quick_house(tmp_path, "a") as house:
        with trio.fail_after(60):
            await collect(submit(house, chat("secret", pictures=1, model="a", priority="batch")))
            await house.scheduler.wait_empty()
    (line,) = [r.getMessage() for r in caplog.records if " end=" in r.getMessage()]
    found = dict(pair.split("=") for pair in line.split()[2:])
    assert {name: found[name] for name in ("client", "model", "priority", "stream", "end")} == {
        "client": "10.0.0.1", "model": "a", "priority": "batch", "stream": "0", "end": "stop",
    }  # fmt: skip
    assert (found["pictures"], found["completion"], found["code"]) == ("1", "3", "-")
    stages = ("fetch", "decode_image", "prepare", "queue", "load", "encode", "prefill", "generate")
    assert all(float(found[stage]) >= 0 for stage in (*stages, "first_token", "total"))
    assert "secret" not in line


async def test_the_board_is_on_the_page(tmp_path: Path) -> None:
    """Temperature, clock, load and CMA of a recorded board; nothing of them on another machine."""
    tree = trees.rk3588()
    tree.files["/sys/kernel/debug/rknpu/load"] = "NPU load:  Core0: 95%, Core1:  0%, Core2:  7%,\n"
    root, _ = open_root(tree.write(tmp_path / "board"))
    async with quick_house(tmp_path, "a") as house:
        found = parse(render(house, 0, read_gauges(root)))
        other = page(house)
    assert found["rkvlmd_npu_temperature_celsius"] == 46.23
    assert found["rkvlmd_npu_frequency_hertz"] == 1e9
    assert [found[f'rkvlmd_npu_load_ratio{{core="{core}"}}'] for core in range(3)] == [
        0.95,
        0,
        0.07,
    ]
    assert found["rkvlmd_cma_free_bytes"] == 240000 * 1024
    assert not any("npu_" in name or "cma_" in name for name in other)
    # Without the driver's own entries (they are root's): one figure for all cores.
    tree = trees.rk3588().without("/sys/kernel/debug/rknpu/load")
    tree.files["/sys/devices/platform/fdab0000.npu/devfreq/fdab0000.npu/load"] = "42@1000000000Hz\n"
    root, _ = open_root(tree.write(tmp_path / "plain"))
    assert read_gauges(root).load == (("all", 0.42),)
    root, _ = open_root(trees.x86().write(tmp_path / "x86"))
    assert read_gauges(root) == type(read_gauges(root))()


async def test_how_full_the_cache_is_and_what_a_step_computes(tmp_path: Path) -> None:
    async with quick_house(tmp_path, "a") as house:
        with trio.fail_after(60):
            context = house.residency.model("a").context
            job = submit(house, chat(pictures=1, model="a"))
            await until_phase(house, job, "generating")
            found = page(house)
            used = (job.prompt_tokens + job.completion_tokens) / context
            assert found['rkvlmd_kv_cache_usage_perc{model_name="a"}'] == pytest.approx(used)
            await collect(job)
            await house.scheduler.wait_empty()
            found = page(house)
            (view,) = [v for v in house.residency.models() if v.name == "a"]
    config = f'{{model_name="a",num_tokens="{view.context}"}}'
    assert found[f"rkvlmd_cache_config_info{config}"] == 1
    assert found['rkvlmd_kv_cache_usage_perc{model_name="a"}'] == 0
    # One prefill of six tokens that gave the first token, and two more tokens.
    assert found['rkvlmd_iteration_tokens_total_count{model_name="a"}'] == 3
    assert found['rkvlmd_iteration_tokens_total_sum{model_name="a"}'] == 6 + 3


async def test_a_job_tells_how_long_its_phase_lasts(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with quick_house(tmp_path, "a") as house:
        with trio.fail_after(60):
            async with house.tools.lease.hold("test", "a"):
                job = submit(house, chat(model="a"))
                await until_phase(house, job, "waiting")
                await trio.sleep(2)
                job.phase = "waiting"  # the same phase goes on
                assert (job.view().phase_age, job.view().age) == (2, 2)
                job.phase = "encoding"
                await trio.sleep(3)
                assert (job.view().phase_age, job.view().age) == (3, 5)
                job.abandon("cancelled")
            await house.scheduler.wait_empty()
            status = house.status()
    assert status["lease"]["busy_seconds"] == round(house.tools.lease.busy_seconds, 3)
    assert house.tools.lease.busy_seconds > 0
    assert status["tokens"] == {"prompt": 0, "cached": 0, "generated": 0}


async def test_errors_of_jobs(tmp_path: Path) -> None:
    async with quick_house(tmp_path, "a") as house:
        with trio.fail_after(60):
            _, end = await collect(submit(house, chat(model="a", max_tokens=1)))
            assert end.error is None
            house.metrics.error("invalid_image")
            house.metrics.error("invalid_json")
        found = page(house)
    assert found['rkvlmd_request_errors_total{code="invalid_json"}'] == 1
    assert found['rkvlmd_image_rejected_total{code="invalid_image"}'] == 1
    assert 'rkvlmd_image_rejected_total{code="invalid_json"}' not in found


def test_a_name_is_used_once_and_labels_are_bounded() -> None:
    families = list(Metrics().families())
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    bounded = {"model_name", "finished_reason", "reason", "code", "phase", "cache"}
    assert {label for family in families for label in family.labels} <= bounded
