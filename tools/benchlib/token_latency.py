"""From a token leaving the child to its bytes on the client's socket.

The child is scripted: the text of each token is the monotonic clock of the
moment before the child sends it. That clock is the same in all processes, so
a client that notes it right after a read has the latency of the whole path,
its own wake-up included.
"""

from __future__ import annotations

import json
import selectors
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rkvlmd.wire import sse

from . import folder, process
from .client import PATIENCE, Stream, text_of
from .figures import BenchError, Figure, percentile, significant

#: Targets in milliseconds.
MOST_MEDIAN, MOST_P99 = 0.5, 3.0
RATE = 80
TOKENS = 800
WAITING = 50
RUNS = 3
#: Seconds that the waiting clients get to be admitted, while the answer goes on.
_ADMISSION_SECONDS = 40
_MODEL = "scripted"
_PING_SECONDS = 1.0


def run(*, tokens: int = TOKENS, waiting: int = WAITING, runs: int = RUNS) -> list[Figure]:
    """Measure ``tokens`` tokens with one client, then with ``waiting`` more in the queue.

    Each is done ``runs`` times, taking turns; the figures are the medians of
    the runs' medians and of their 99th percentiles.
    """
    said = tokens + RATE * _ADMISSION_SECONDS
    settings = (
        f"[http]\nping_seconds = {_PING_SECONDS}\n"
        # All clients have one address here, and nobody is to be refused.
        f"[queue]\nmax_jobs = {waiting + 8}\nmax_jobs_per_client = 0\n"
        "refuse_late = false\nstop_seconds = 1\n"
        "[models]\ndemo = false\n"
    )
    script = json.dumps({"mode": "clock", "rate": RATE, "tokens": said})
    program = ("tools.benchlib.scripted_daemon", script)
    taken: dict[int, list[list[float]]] = {0: [], waiting: []}
    pings = 0
    with tempfile.TemporaryDirectory(prefix="rkvlmd-bench-") as scratch:
        models = Path(scratch)
        folder.make(models, _MODEL, context=said + 1024)
        with process.running(models=models, settings=settings, program=program) as daemon:
            one(daemon, tokens=max(1, min(tokens, RATE)), waiting=0, said=said)  # loads, warms up
            for _ in range(runs):
                for count, found in taken.items():
                    latencies, heard = one(daemon, tokens=tokens, waiting=count, said=said)
                    found.append(latencies)
                    pings += heard
    figures = []
    for count, lists in taken.items():
        who = "1 client" if not count else f"1 client and {count} waiting"
        medians = [statistics.median(values) for values in lists]
        highs = [percentile(values, 0.99) for values in lists]
        detail: dict[str, Any] = {
            "tokens": sum(map(len, lists)),
            "tokens_per_second": RATE,
            "each_run": [
                {"median": significant(m), "p99": significant(p), "max": significant(max(values))}
                for m, p, values in zip(medians, highs, lists, strict=True)
            ],
        }
        if count:
            detail["pings_to_those_waiting"] = pings
        name = f"token to socket, {who}"
        figures += [
            Figure(f"{name}: median", statistics.median(medians), "ms", MOST_MEDIAN, detail=detail),
            Figure(f"{name}: p99", statistics.median(highs), "ms", MOST_P99),
        ]
    return figures


def one(daemon: process.Daemon, *, tokens: int, waiting: int, said: int) -> tuple[list[float], int]:
    """Return the latencies of ``tokens`` tokens in milliseconds, and the pings that were heard.

    With ``waiting`` the tokens count from the moment at which all of the
    others wait for the lease with their streams open.

    Raises:
      BenchError: the answer ended too early, or somebody was not admitted.

    """
    with ExitStack() as stack:
        main = stack.enter_context(Stream(daemon.host, daemon.port, _body(said)))
        main.send()
        _until_text(main)
        others = []
        for _ in range(waiting):
            others.append(stack.enter_context(Stream(daemon.host, daemon.port, _body(1))))
            others[-1].send()
        _until_open(others)
        latencies = _measure(main, time.monotonic_ns(), tokens)
        heard = sum(other.ready().count(sse.PING) for other in others)
    return latencies, heard


def _body(tokens: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Go."}], "max_tokens": tokens}


def _until_text(stream: Stream) -> None:
    while True:
        data = stream.read().data
        if any(text_of(event) for event in stream.events(data)):
            return
        if stream.ended:
            raise BenchError("the answer has no text")


def _until_open(streams: list[Stream]) -> None:
    """Wait until each stream has its first event: it waits for the lease then."""
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream, selectors.EVENT_READ, stream)
        deadline = time.monotonic() + min(PATIENCE, _ADMISSION_SECONDS)
        while selector.get_map():
            ready = selector.select(max(deadline - time.monotonic(), 0))
            if not ready:
                raise BenchError("the waiting clients were not admitted in time")
            for key, _ in ready:
                waiting: Stream = key.data
                if waiting.events(waiting.read().data):
                    selector.unregister(waiting)
                elif waiting.ended:
                    raise BenchError("a waiting client's stream ended")


def _measure(stream: Stream, since: int, tokens: int) -> list[float]:
    """Read until ``tokens`` tokens have come that left after ``since`` (monotonic ns)."""
    latencies: list[float] = []
    while len(latencies) < tokens:
        read = stream.read()
        # What is done with the bytes comes after the clock; it is over long before the next token.
        for event in stream.events(read.data):
            sent = (int(word) for word in text_of(event).split())
            latencies += [(read.at - at) / 1e6 for at in sent if at >= since]
        if stream.ended:
            raise BenchError("the answer ended early")
    return latencies[:tokens]
