"""The page ``/metrics``: what was counted, and what is so now, in Prometheus's text format 0.0.4."""

from __future__ import annotations

import math
from collections import Counter as Tally
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import rkvlmd
from rkvlmd.actors.blobs import Blob
from rkvlmd.actors.metrics import MODEL, PREFIX, Counter, Histogram
from rkvlmd.board.gauges import Gauges
from rkvlmd.messages import PRIORITIES, ModelState

if TYPE_CHECKING:
    from rkvlmd.actors.house import House

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

#: Phases of jobs that hold the lease.
_RUNNING = frozenset({"loading", "encoding", "prefill", "generating"})

#: Those of them whose prompt is in the KV cache, or on its way.
_IN_KV = frozenset({"prefill", "generating"})
_NO_BOARD = Gauges()
_Rows = list[tuple[tuple[str, ...], float]]


@dataclass(frozen=True, slots=True)
class _Now:
    """One metric whose values the house itself knows."""

    kind: Literal["counter", "gauge"]
    name: str
    doc: str
    rows: _Rows
    labels: tuple[str, ...] = ()


def render(house: House, unknown_fields: int, board: Gauges = _NO_BOARD) -> bytes:
    """Return the page; ``unknown_fields`` counts what the front has seen of them."""
    lines: list[str] = []
    for family in house.metrics.families():
        lines += _counter(family) if isinstance(family, Counter) else _histogram(family)
    unknown = _single(
        "counter", "unknown_fields_total", "Fields of requests that nobody knows.", unknown_fields
    )
    for now in (*_queue(house), *_parts(house), *_models(house), *_board(board), unknown):
        lines += _head(now.name, now.doc, now.kind)
        lines += [_sample(now.name, now.labels, values, value) for values, value in now.rows]
    return ("\n".join(lines) + "\n").encode()


def _single(kind: Literal["counter", "gauge"], name: str, doc: str, value: float) -> _Now:
    return _Now(kind, name, doc, [((), value)])


def _queue(house: House) -> Iterator[_Now]:
    jobs, gate = house.scheduler.jobs(), house.scheduler.gate
    models = house.residency.models()
    names = [model.name for model in models]
    used = dict.fromkeys(names, 0.0)
    contexts = {model.name: model.context for model in models}
    for job in jobs:
        if job.model in used and job.phase in _IN_KV:
            tokens = job.prompt_tokens + job.completion_tokens
            used[job.model] = min(tokens / contexts[job.model], 1.0)
    running = Tally(job.model for job in jobs if job.phase in _RUNNING)
    waiting = Tally(job.model for job in jobs if job.phase not in _RUNNING)
    classes = Tally(str(job.priority) for job in jobs if job.phase not in _RUNNING)
    yield _Now(
        "gauge", "num_requests_running", "Requests that hold the lease.",
        [((name,), running[name]) for name in names], (MODEL,),
    )  # fmt: skip
    yield _Now(
        "gauge", "num_requests_waiting", "Requests in preparation or waiting for the lease.",
        [((name,), waiting[name]) for name in names], (MODEL,),
    )  # fmt: skip
    yield _Now(
        "gauge", "queue_requests", "The waiting requests by class.",
        [((name,), classes[name]) for name in PRIORITIES], ("priority",),
    )  # fmt: skip
    yield _Now("gauge", "kv_cache_usage_perc",
        "How much of the KV cache the running request fills, 0 to 1.",
        [((name,), used[name]) for name in names], (MODEL,),
    )  # fmt: skip
    yield _single("gauge", "queue_bytes", "Bytes of the admitted requests.", gate.bytes)
    yield _Now(
        "counter", "admission_rejections_total", "Requests refused at the door.",
        [((reason,), count) for reason, count in sorted(gate.refusals.items())], ("reason",),
    )  # fmt: skip
    yield _single("counter", "num_preemptions_total", "Always 0: no job is preempted.", 0)
    busy = house.tools.lease.busy_seconds
    yield _single("counter", "lease_busy_seconds_total", "How long the lease was held.", busy)


def _parts(house: House) -> Iterator[_Now]:
    cache, prep = house.tools.cache, house.tools.prep
    looked = cache.hits + cache.misses
    yield _single("counter", "mm_cache_queries_total", "Pictures looked for in the cache.", looked)
    yield _single("counter", "mm_cache_hits_total", "Pictures found in the cache.", cache.hits)
    yield _single("gauge", "mm_cache_bytes", "Bytes of the embeddings kept.", cache.bytes)
    yield _single("gauge", "memfds", "Memory files that the daemon holds.", Blob.live)
    yield _single("gauge", "memfd_bytes", "Bytes in those memory files.", Blob.live_bytes)
    yield _Now(
        "counter", "child_restarts_total", "Engine children started in the place of one gone.",
        [((role,), count) for role, count in house.residency.restarts.items()], ("role",),
    )  # fmt: skip
    yield _single("counter", "prep_deaths_total", "Prep children that died.", prep.deaths)
    yield _single("gauge", "prep_waiting", "Pictures and prompts that no child has.", prep.waiting)
    yield _Now("gauge", "build_info", "Always 1.", [((rkvlmd.__version__,), 1)], ("version",))


def _models(house: House) -> Iterator[_Now]:
    models = house.residency.models()
    yield _Now(
        "gauge", "model_loaded", "Whether the model is loaded and ready.",
        [((model.name,), model.state is ModelState.READY) for model in models], (MODEL,),
    )  # fmt: skip
    yield _Now(
        "gauge", "model_memory_bytes", "Resident memory of the model's children.",
        [((model.name,), model.memory_bytes) for model in models], (MODEL,),
    )  # fmt: skip
    yield _Now(
        "gauge", "cache_config_info", "Always 1; tokens that the KV cache holds.",
        [((model.name, str(model.context)), 1) for model in models], (MODEL, "num_tokens"),
    )  # fmt: skip
    loads = [((model.name,), house.residency.pace(model.name).load_seconds) for model in models]
    yield _Now(
        "gauge", "model_load_seconds", "How long the latest load took.",
        [row for row in loads if math.isfinite(row[1])], (MODEL,),
    )  # fmt: skip


def _board(board: Gauges) -> Iterator[_Now]:
    """What the machine says of its NPU; a machine without one has none of these."""
    if board.celsius is not None:
        doc = "Temperature of the NPU, or of the board's hottest zone."
        yield _single("gauge", "npu_temperature_celsius", doc, board.celsius)
    if board.hertz is not None:
        yield _single("gauge", "npu_frequency_hertz", "The NPU's clock.", board.hertz)
    if board.load:
        yield _Now(
            "gauge", "npu_load_ratio", "How busy the NPU is, 0 to 1, by core.",
            [((core,), share) for core, share in board.load], ("core",),
        )  # fmt: skip
    if board.cma_free is not None:
        yield _single("gauge", "cma_free_bytes", "Free contiguous memory.", board.cma_free)


def _counter(family: Counter) -> list[str]:
    rows = sorted(family.values.items())
    return _head(family.name, family.doc, family.kind) + [
        _sample(family.name, family.labels, values, value) for values, value in rows
    ]


def _histogram(family: Histogram) -> list[str]:
    lines = _head(family.name, family.doc, family.kind)
    labels = (*family.labels, "le")
    for values, series in sorted(family.series.items()):
        count = 0
        for end, more in zip((*family.buckets, math.inf), series.counts, strict=True):
            count += more
            lines.append(_sample(f"{family.name}_bucket", labels, (*values, _number(end)), count))
        lines.append(_sample(f"{family.name}_sum", family.labels, values, series.total))
        lines.append(_sample(f"{family.name}_count", family.labels, values, count))
    return lines


def _head(name: str, doc: str, kind: str) -> list[str]:
    return [f"# HELP {PREFIX}{name} {doc}", f"# TYPE {PREFIX}{name} {kind}"]


def _sample(name: str, labels: tuple[str, ...], values: tuple[str, ...], value: float) -> str:
    pairs = ",".join(
        f'{label}="{_escape(text)}"' for label, text in zip(labels, values, strict=True)
    )
    return f"{PREFIX}{name}{f'{{{pairs}}}' if pairs else ''} {_number(value)}"


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf"
    return str(int(value)) if value == int(value) else repr(float(value))
