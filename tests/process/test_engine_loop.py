"""A real child: hello, load, work, abort, beats, the end of the socket, and every fault."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rkvlmd.engine import loop, memfd
from rkvlmd.engine.channel import Channel
from rkvlmd.wire import child, frames
from tests.fakes.engine_child import Peer, started

pytestmark = pytest.mark.process


def generate(number: int = 1, **more: Any) -> child.Generate:
    return child.Generate(id=number, **({"tokens": [1, 2, 3], "max_tokens": 100} | more))


def answer(peer: Peer) -> tuple[str, child.GenerateDone]:
    """The text and the end; there must be one ``prefilled`` before any text."""
    text, prefilled = "", 0
    while True:
        message, _ = peer.receive()
        if isinstance(message, child.Prefilled):
            prefilled += 1
        elif isinstance(message, child.Text):
            assert prefilled == 1
            text += message.text
        elif isinstance(message, child.GenerateDone):
            return text, message
        else:
            assert isinstance(message, child.Beat)


@pytest.mark.parametrize("role", ["prep", "encoder", "decoder", "scripted"])
def test_hello_and_leave(role: str) -> None:
    with started(role) as process:
        hello = process.hello()
        assert hello.pid == process.popen.pid
        assert (hello.role, hello.protocol) == (role, child.PROTOCOL)
        assert hello.libraries["numpy"] == np.__version__
        process.sock.close()
        assert process.wait() == 0
        assert process.words() == ""


def test_signals_do_not_end_it() -> None:
    with started("scripted") as process:
        process.loaded(script={"tokens": 3})
        process.popen.send_signal(signal.SIGTERM)
        process.popen.send_signal(signal.SIGINT)
        process.send(generate())
        assert answer(process)[0] == "t0 t1 t2"
        process.sock.close()
        assert process.wait() == 0


def test_load_encode_generate() -> None:
    encoders = [{"engine": "rknn", "tokens": 1, "embedding": 1},
                {"engine": "onnx", "tokens": 4, "embedding": 6}]  # fmt: skip
    manifest = {"encoders": encoders, "decoder": {"engine": "onnx", "embedding": 6}}
    scripted = {"backend": "scripted", "script": {"mode": "echo"}}
    with started("encoder") as encoder, started("decoder") as decoder:
        encoder.hello()
        encoder.send(child.Load(folder="/", manifest=manifest, part=1, options=scripted))
        seen = []
        while not seen or not isinstance(seen[-1], child.Ready):
            seen.append(encoder.receive()[0])
        fractions = [m.fraction for m in seen if isinstance(m, child.Progress)]
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0

        fd, tensor = memfd.from_array(np.ones((1, 3, 8, 8), np.float32))
        encoder.send(child.Encode(id=5, pixels=tensor), [fd])
        done, fds = encoder.until(child.EncodeDone)
        assert done.id == 5
        rows = encoder.array(os.dup(fds[0]), done.rows)
        assert rows.shape == (4, 6)
        assert rows.dtype == np.float32

        decoder.hello()
        decoder.send(child.Load(folder="/", manifest=manifest, options=scripted))
        decoder.until(child.Ready)
        spans = [child.Span(start=1, count=4, key="a"), child.Span(start=5, count=4, key="a")]
        order = generate(tokens=[0] * 9, spans=spans)
        decoder.send(order, [os.dup(fds[0]), fds[0]])
        crc = zlib.crc32(rows.tobytes() * 2)
        assert answer(decoder)[0] == f"pictures=2 prompt=9 sum={crc}"


def test_the_cache_and_the_limit() -> None:
    with started("scripted") as process:
        process.loaded(script={"tokens": 5})
        process.send(generate(1, tokens=[1, 2, 3, 4], max_tokens=2))
        assert answer(process)[1].reason == "length"
        process.send(generate(2, tokens=[1, 2, 9]))
        prefilled, _ = process.until(child.Prefilled)
        assert (prefilled.prompt, prefilled.cached) == (3, 2)
        while not isinstance(message := process.receive()[0], child.GenerateDone):
            assert isinstance(message, child.Text)
        assert (message.reason, message.completion) == ("stop", 5)
        process.send(generate(3, stop=["t2"]))
        assert answer(process)[0] == "t0 t1 "


def test_abort_between_tokens() -> None:
    with started("scripted") as process:
        process.loaded(script={"tokens": 1000, "rate": 50})
        process.send(generate(7))
        process.until(child.Prefilled)
        process.until(child.Text)
        process.send(child.Abort(id=6))  # of an order that is gone: nothing happens
        process.until(child.Text)
        process.send(child.Abort(id=7))
        _, done = answer_after(process)
        assert (done.id, done.reason) == (7, "aborted")
        process.send(generate(8, max_tokens=1))
        assert answer(process)[1].reason == "length"


def answer_after(peer: Peer) -> tuple[str, child.GenerateDone]:
    text = ""
    while not isinstance(message := peer.receive()[0], child.GenerateDone):
        text += message.text if isinstance(message, child.Text) else ""
    return text, message


def test_abort_before_the_worker_begins() -> None:
    with started("scripted") as process:
        process.loaded(script={"tokens": 1000, "rate": 50})
        process.send(generate(1))
        process.send(generate(2))
        process.send(child.Abort(id=2))
        process.send(child.Abort(id=1))
        assert answer_after(process)[1].reason == "aborted"
        done, _ = process.until(child.GenerateDone)
        assert (done.id, done.reason, done.completion) == (2, "aborted", 0)


def test_beats_while_it_works_and_while_it_hangs() -> None:
    with started("scripted", script={"fault": {"at": "prefill", "kind": "hang"}}) as process:
        process.loaded()
        process.send(generate())
        for _ in range(2):
            assert isinstance(process.receive()[0], child.Beat)
        process.sock.close()
        assert process.wait() == 0


def test_end_of_file_during_each_step() -> None:
    for script in ({"prefill_seconds": 1000}, {"rate": 0.001}):
        with started("scripted") as process:
            process.loaded(script=script)
            process.send(generate())
            process.sock.close()
            assert process.wait() == 0
    with started("scripted") as process:
        process.hello()
        script = {"load_seconds": 1000}
        process.send(child.Load(folder="/", manifest={}, options={"script": script}))
        process.sock.close()
        assert process.wait() == 0


@pytest.mark.parametrize("at", ["hello", "load", "encode", "prefill", "generate", "abort"])
@pytest.mark.parametrize(
    ("kind", "status"), [("kill", -signal.SIGKILL), ("segv", -signal.SIGSEGV), ("exit", 3)]
)
def test_deaths_on_demand(at: str, kind: str, status: int) -> None:
    script = {"rate": 50, "tokens": 1000, "fault": {"at": at, "kind": kind}}
    with started("scripted", script=script) as process:
        if at == "hello":
            assert process.eof()
        else:
            process.hello()
            process.send(child.Load(folder="/", manifest={}))
        if at == "encode":
            fd, tensor = memfd.from_array(np.zeros((1, 2), np.uint8))
            process.send(child.Encode(id=1, pixels=tensor), [fd])
        elif at in {"prefill", "generate", "abort"}:
            process.send(generate(1))
        if at == "abort":
            process.until(child.Ready)
            process.until(child.Prefilled)
            process.send(child.Abort(id=1))
        assert process.eof()
        assert process.wait() == status
        assert f"scripted fault: {kind} at {at}" in process.words()


def test_a_fault_that_counts_in_a_file(tmp_path: Path) -> None:
    fault = {"at": "generate", "kind": "kill", "after_tokens": 2, "times": 2,
             "file": str(tmp_path / "count")}  # fmt: skip
    for time in range(3):
        with started("scripted", script={"tokens": 4, "fault": fault}) as process:
            process.loaded()
            process.send(generate())
            if time < 2:
                process.until(child.Prefilled)
                texts = [process.until(child.Text)[0].text for _ in range(2)]
                assert texts == ["t0", " t1"]
                assert process.eof()
            else:
                assert answer(process)[0] == "t0 t1 t2 t3"


def test_an_error_leaves_the_child_well() -> None:
    script = {"tokens": 1, "fault": [{"at": "load", "kind": "error"},
                                     {"at": "prefill", "kind": "error"}]}  # fmt: skip
    with started("scripted", script=script) as process:
        process.hello()
        process.send(generate(1))
        failed, _ = process.until(child.Failed)
        assert (failed.id, failed.code) == (1, "model_not_loaded")
        process.send(child.Load(folder="/", manifest={}))
        failed, _ = process.until(child.Failed)
        assert (failed.id, failed.code) == (0, "engine_error")
        process.send(child.Load(folder="/", manifest={}))
        process.until(child.Ready)
        process.send(generate(2))
        failed, _ = process.until(child.Failed)
        assert (failed.id, failed.code) == (2, "engine_error")
        process.send(generate(3))
        assert answer(process)[0] == "t0"


def test_an_abort_that_nobody_hears() -> None:
    script = {"rate": 20, "tokens": 1000, "fault": {"at": "abort", "kind": "hang"}}
    with started("scripted", script=script) as process:
        process.loaded()
        process.send(generate(1))
        process.until(child.Prefilled)
        process.send(child.Abort(id=1))
        beats = 0
        while beats < 2:
            message, _ = process.receive()
            beats += isinstance(message, child.Beat)
            assert isinstance(message, child.Beat | child.Text)


@pytest.mark.parametrize(
    "data",
    [b"garbage that is no frame", b"\0\0\0\2[]", frames.encode({"type": "hello"}),
     frames.encode(child.build(generate(1, spans=[child.Span(start=0, count=1, key="k")])))],
    ids=["length", "list", "direction", "descriptors"],
)  # fmt: skip
def test_a_daemon_that_talks_nonsense(data: bytes) -> None:
    with started("scripted") as process:
        process.loaded()
        process.sock.sendall(data)
        assert process.eof()
        assert process.wait() == loop.EX_SOFTWARE
        assert "Traceback" in process.words()


def test_a_wrong_order_for_the_role() -> None:
    with started("encoder") as process:
        process.loaded(backend="scripted")
        process.send(generate())
        assert process.eof()
        assert "no order for a child of role encoder" in process.words()
        assert process.wait() == loop.EX_SOFTWARE


@pytest.mark.parametrize(("role", "engine"), [("encoder", "rknn"), ("decoder", "abacus")])
def test_an_engine_that_is_not_there(role: str, engine: str) -> None:
    with started(role) as process:
        process.hello()
        manifest = {"encoders": [{"engine": engine}], "decoder": {"engine": engine}}
        process.send(child.Load(folder="/", manifest=manifest))
        failed, _ = process.until(child.Failed)
        assert failed.code == "invalid_model"
        assert repr(engine) in failed.message


# --- the loop itself -----------------------------------------------------------------


class Slow:
    """A role whose order ends when the test says so."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.aborts = threading.Semaphore(0)

    def warm(self) -> None:
        pass

    def work(self, order: loop.Order, fds: Sequence[int], send: loop.Send) -> None:
        self.go.wait()
        send(child.Ready())

    def abort(self) -> None:
        self.aborts.release()


def test_an_idle_child_waits_without_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float | None] = []
    real = select.poll

    class Poll:
        def __init__(self) -> None:
            self._poll = real()
            self.register = self._poll.register

        def poll(self, wait: float | None) -> Any:
            waits.append(wait)
            return self._poll.poll(wait)

    monkeypatch.setattr(select, "poll", Poll)
    ours, theirs = socket.socketpair()
    role, peer = Slow(), Peer(ours)
    running = loop.Loop(Channel(theirs), role)
    threading.Thread(target=running._worker, daemon=True).start()

    def serve() -> None:
        with pytest.raises(EOFError):
            running._serve()

    thread = threading.Thread(target=serve)
    thread.start()
    peer.send(child.Load(folder="/", manifest={}))
    assert isinstance(peer.receive()[0], child.Beat)
    role.go.set()
    peer.until(child.Ready)
    with running._state:
        assert running._state.wait_for(lambda: not running._in_hand, 30)
    peer.send(child.Abort(id=3))  # wakes it up once
    ours.close()
    thread.join(30)
    theirs.close()
    assert waits[0] is None
    assert all(w is not None and w <= 1000 for w in waits[1:3])
    assert waits[-1] is None or waits[-1] <= 1000


def test_too_many_orders() -> None:
    with started("scripted", script={"prefill_seconds": 1000}) as process:
        process.loaded()
        for number in range(loop.MOST_ORDERS + 1):
            process.send(generate(number + 1))
        assert process.eof()
        assert "orders at the same time" in process.words()
