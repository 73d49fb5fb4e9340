"""What is counted while the daemon works, for ``/metrics``; whoever does the work counts it.

Names, units and meaning follow vLLM's, with our prefix, so that its dashboards fit after
``vllm:`` was replaced by ``rkvlmd_``. Labels are bounded: models that are installed, and words
of our own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rkvlmd.errors import CODES
from rkvlmd.messages import GOOD_ENDS

if TYPE_CHECKING:
    from rkvlmd.actors.job import Job
    from rkvlmd.messages import Ended

PREFIX = "rkvlmd_"

#: Upper ends of buckets: seconds of a request, up to ten minutes; seconds between two tokens;
#: seconds of one picture; tokens of one request.
REQUEST_SECONDS = (
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0,
    90.0, 120.0, 180.0, 240.0, 300.0, 450.0, 600.0,
)  # fmt: skip
TOKEN_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0,
    2.5, 5.0, 10.0, 20.0,
)  # fmt: skip
PICTURE_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0,
    7.5, 10.0, 20.0, 60.0,
)  # fmt: skip
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000)

#: vLLM's word for each of our ends that has one; every other end is an abort there.
_FINISHED = {
    "stop": "stop", "tool_calls": "stop", "length": "length", "error": "error",
    "engine_died": "error", "engine_wedged": "error",
}  # fmt: skip
#: Codes that say what is wrong with a picture.
PICTURE_CODES = frozenset(code for code in CODES if "image" in code)


class Family:
    """One metric: its name without the prefix, what it means, and the names of its labels."""

    kind = "untyped"

    def __init__(self, name: str, doc: str, *labels: str) -> None:
        self.name = name
        self.doc = doc
        self.labels = labels


class Counter(Family):
    """Counts up, for each combination of labels."""

    kind = "counter"

    def __init__(self, name: str, doc: str, *labels: str) -> None:
        super().__init__(name, doc, *labels)
        self.values: dict[tuple[str, ...], float] = {} if labels else {(): 0}

    def add(self, *labels: str, by: float = 1) -> None:
        """Count ``by`` more."""
        self.values[labels] = self.values.get(labels, 0) + by

    def sum(self) -> float:
        """Return the count of all labels together."""
        return sum(self.values.values())


class Series:
    """One histogram: ``counts`` of each bucket (the last one is above all), and the sum."""

    __slots__ = ("counts", "total")

    def __init__(self, buckets: int) -> None:
        self.counts = [0] * (buckets + 1)
        self.total = 0.0


class Histogram(Family):
    """How values are spread, for each combination of labels."""

    kind = "histogram"

    def __init__(self, name: str, doc: str, buckets: tuple[float, ...], *labels: str) -> None:
        super().__init__(name, doc, *labels)
        self.buckets = buckets
        self.series: dict[tuple[str, ...], Series] = {} if labels else {(): Series(len(buckets))}

    def observe(self, value: float, *labels: str, count: int = 1) -> None:
        """Count ``value``, ``count`` times."""
        series = self.series.get(labels)
        if series is None:
            series = self.series[labels] = Series(len(self.buckets))
        series.counts[bisect_left(self.buckets, value)] += count
        series.total += value * count


#: The label that holds an installed model's name.
MODEL = "model_name"


class Metrics:
    """One daemon's counts; made once and handed to those who count."""

    def __init__(self) -> None:
        self.prompt_tokens = Counter(
            "prompt_tokens_total", "Prompt tokens, those from the KV cache included.", MODEL
        )
        self.generation_tokens = Counter("generation_tokens_total", "Generated tokens.", MODEL)
        self.prefix_queries = Counter(
            "prefix_cache_queries_total", "Prompt tokens looked for in the KV cache.", MODEL
        )
        self.prefix_hits = Counter(
            "prefix_cache_hits_total", "Prompt tokens found in the KV cache.", MODEL
        )
        self.finished = Counter(
            "request_success_total", "Ended requests: stop, length, abort or error.",
            MODEL, "finished_reason",
        )  # fmt: skip
        self.ended = Counter(
            "requests_ended_total", "Ended requests, by how exactly they ended.", MODEL, "reason"
        )
        self.errors = Counter("request_errors_total", "Errors told to clients.", "code")
        self.pictures_rejected = Counter("image_rejected_total", "Refused pictures.", "code")
        self.disconnects = Counter(
            "client_disconnects_total", "Clients that left before their answer was whole.", "phase"
        )
        self.first_token = Histogram(
            "time_to_first_token_seconds", "From the admission to the first token.",
            REQUEST_SECONDS, MODEL,
        )  # fmt: skip
        self.inter_token = Histogram(
            "inter_token_latency_seconds", "Between two tokens of an answer.", TOKEN_SECONDS, MODEL
        )
        self.whole = Histogram(
            "e2e_request_latency_seconds", "From the admission to the end.", REQUEST_SECONDS, MODEL
        )
        self.queue = Histogram(
            "request_queue_time_seconds", "Wait for the lease.", REQUEST_SECONDS, MODEL
        )
        self.prefill = Histogram(
            "request_prefill_time_seconds",
            "From the lease to the first token: load and encode included.", REQUEST_SECONDS, MODEL,
        )  # fmt: skip
        self.decode = Histogram(
            "request_decode_time_seconds", "From the first token to the last.",
            REQUEST_SECONDS, MODEL,
        )  # fmt: skip
        self.inference = Histogram(
            "request_inference_time_seconds", "From the lease to the last token.",
            REQUEST_SECONDS, MODEL,
        )  # fmt: skip
        self.prompt_sizes = Histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", TOKENS, MODEL
        )
        self.answer_sizes = Histogram(
            "request_generation_tokens", "Generated tokens of a request.", TOKENS, MODEL
        )
        self.steps = Histogram(
            "iteration_tokens_total", "Tokens of one step: a prefill, or one token.", TOKENS, MODEL
        )
        self.answers = Histogram(
            "request_params_n", "Answers that a request asks for: always 1.", (1, 2, 5), MODEL
        )
        self.limits = Histogram(
            "request_params_max_tokens", "Most tokens that a request may generate.", TOKENS, MODEL
        )
        self.picture_decode = Histogram(
            "image_decode_seconds", "Decoding and resizing one picture in its child.",
            PICTURE_SECONDS,
        )  # fmt: skip
        self.picture_encode = Histogram(
            "image_encode_seconds", "Getting one picture's embeddings, from the cache or not.",
            PICTURE_SECONDS, "cache",
        )  # fmt: skip

    def families(self) -> Iterator[Counter | Histogram]:
        """Return every metric that is counted here."""
        for value in vars(self).values():
            if isinstance(value, (Counter, Histogram)):
                yield value

    def error(self, code: str) -> None:
        """An error was told to a client."""
        self.errors.add(code)
        if code in PICTURE_CODES:
            self.pictures_rejected.add(code)

    def generated(self, job: Job, tokens: int, now: float) -> None:
        """Tokens came, at ``now`` of the loop's clock."""
        if not tokens:
            return
        self.generation_tokens.add(job.model, by=tokens)
        if job.last_token is not None:
            gap = (now - job.last_token) / tokens
            self.inter_token.observe(gap, job.model, count=tokens)
            self.steps.observe(1, job.model, count=tokens)
        else:
            job.first_token = now
            self.first_token.observe(now - job.submitted, job.model)
            self.steps.observe(job.prompt_tokens - job.cached_tokens + tokens, job.model)
        job.last_token = now

    def end(self, job: Job, ended: Ended) -> None:
        """A job has ended; what it never reached is not counted."""
        model, seconds, usage = job.model, ended.timings, ended.usage
        self.finished.add(model, _FINISHED.get(ended.reason, "abort"))
        self.ended.add(model, ended.reason)
        if ended.error is not None:
            self.error(ended.error.code)
        if ended.reason == "client_gone":
            self.disconnects.add(job.ended_in)
        self.whole.observe(seconds.total, model)
        if job.leased is None:
            return
        self.queue.observe(seconds.queue, model)
        self.prompt_sizes.observe(usage.prompt_tokens, model)
        self.limits.observe(job.max_tokens, model)
        self.answers.observe(1, model)
        if "prefill" in job.seconds or job.first_token is not None:
            self.prompt_tokens.add(model, by=usage.prompt_tokens)
            self.prefix_queries.add(model, by=usage.prompt_tokens)
            self.prefix_hits.add(model, by=usage.cached_tokens)
        if job.first_token is not None and job.last_token is not None:
            self.prefill.observe(job.first_token - job.leased, model)
            self.decode.observe(job.last_token - job.first_token, model)
            self.inference.observe(job.last_token - job.leased, model)
        if ended.reason in GOOD_ENDS:
            self.answer_sizes.observe(usage.completion_tokens, model)
