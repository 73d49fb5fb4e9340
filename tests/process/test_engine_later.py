"""What a child does beside its library: frames on a thread of their own, files made ahead."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkvlmd.engine import ahead, loop, memfd, roles
from rkvlmd.engine import channel as channels
from rkvlmd.engine.channel import Channel
from rkvlmd.errors import RkvlmdError
from rkvlmd.wire import child
from tests.fakes.engine_child import PATIENCE, Peer

pytestmark = pytest.mark.process


@pytest.fixture
def pair() -> Iterator[tuple[Peer, Channel]]:
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    with ours:
        yield Peer(ours), channel
        channel.close()


def text(number: int) -> child.Text:
    return child.Text(id=1, text=f"{number} ")


DONE = child.GenerateDone(id=1, reason="stop", completion=0, seconds=0.0)


def full(channel: Channel, sock: socket.socket) -> None:
    """Make the socket of a channel full."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    while channel.send_nowait(child.Progress(fraction=0.0, doing="x" * 500)):
        pass


def messages(peer: Peer, count: int) -> list[Any]:
    """The next messages that are no progress."""
    found: list[Any] = []
    while len(found) < count:
        message, _ = peer.receive()
        if not isinstance(message, child.Progress):
            found.append(message)
    return found


# --- frames ------------------------------------------------------------------------------


def test_frames_of_the_writer_keep_their_order(pair: tuple[Peer, Channel]) -> None:
    peer, channel = pair
    for number in range(1000):
        channel.send_later(text(number))
        if number % 100 == 50:
            channel.send(child.Text(id=2, text=f"{number}"))
    channel.send(DONE)
    found = messages(peer, 1011)
    assert found[-1] == DONE
    expected: list[Any] = []
    for number in range(1000):
        expected.append(text(number))
        if number % 100 == 50:
            expected.append(child.Text(id=2, text=f"{number}"))
    assert found[:-1] == expected


def test_a_held_frame_goes_before_the_next_and_with_it(pair: tuple[Peer, Channel]) -> None:
    peer, channel = pair
    channel.hold(text(1))
    fd = memfd.create(b"x")
    channel.send(text(2), [fd])
    os.close(fd)
    data, ancillary, _, _ = peer.sock.recvmsg(1 << 18, 4096, socket.MSG_PEEK)
    assert data.count(b'"text"') >= 2, "one message of the socket"
    first, fds = peer.receive()
    assert (first, fds) == (text(1), [])
    second, fds = peer.receive()
    assert isinstance(second, child.Text)
    assert second.text == "2 "
    assert memfd.read(fds[0]) == b"x"
    for found in fds:
        os.close(found)
    assert ancillary


def test_who_sends_later_does_not_wait_for_a_full_socket(pair: tuple[Peer, Channel]) -> None:
    peer, channel = pair
    full(channel, channel._sock)
    for number in range(channels.MOST_LATER - 1):
        channel.send_later(text(number))  # returns, although nobody reads

    def send_more() -> None:
        for number in (-1, -2, -3):
            channel.send_later(text(number))

    late = threading.Thread(target=send_more)
    late.start()
    found = messages(peer, channels.MOST_LATER - 1 + 3)
    late.join(PATIENCE)
    assert not late.is_alive()
    numbers = list(range(channels.MOST_LATER - 1))
    assert found == [*map(text, numbers), text(-1), text(-2), text(-3)]


def test_there_is_a_bound(pair: tuple[Peer, Channel]) -> None:
    peer, channel = pair
    full(channel, channel._sock)
    sent = threading.Event()
    count = 0

    def send() -> None:
        nonlocal count
        for number in range(3 * channels.MOST_LATER):
            channel.send_later(text(number))
            count = number + 1
        sent.set()

    threading.Thread(target=send, daemon=True).start()
    # The writer has taken some of them when it meets the full socket.
    assert not sent.wait(0.2)
    assert count <= 2 * channels.MOST_LATER + 1
    found = messages(peer, 3 * channels.MOST_LATER)
    assert found == [text(number) for number in range(3 * channels.MOST_LATER)]
    assert sent.wait(PATIENCE)


def test_the_end_of_the_socket_reaches_the_sender(pair: tuple[Peer, Channel]) -> None:
    peer, channel = pair
    full(channel, channel._sock)
    before = set(threading.enumerate())
    channel.send_later(text(0))
    channel.send_later(text(1))
    (writer,) = [t for t in threading.enumerate() if t.name == "writer" and t not in before]
    peer.sock.close()
    writer.join(PATIENCE)
    with pytest.raises(ConnectionError):
        channel.send_later(text(2))
    with pytest.raises(ConnectionError):
        channel.send(DONE)


def test_the_writer_takes_no_processor_from_who_rings(pair: tuple[Peer, Channel]) -> None:
    peer, channel = pair
    before = set(threading.enumerate())
    channel.send_later(text(0))
    channel.send_later(text(1))
    messages(peer, 2)
    (writer,) = [t for t in threading.enumerate() if t.name == "writer" and t not in before]
    assert writer.native_id is not None
    assert os.sched_getscheduler(writer.native_id) == os.SCHED_BATCH
    channel.close()
    writer.join(PATIENCE)
    assert not writer.is_alive()


@given(
    st.lists(st.floats(0.0005, 0.5), min_size=2, max_size=40), st.lists(st.floats(0, 1)),
)  # fmt: skip
def test_a_rhythm_waits_a_bounded_time(gaps: list[float], looks: list[float]) -> None:
    rhythm, now = channels.Rhythm(), 100.0
    least, most = rhythm.STEPS
    assert least <= rhythm.pause(now) <= most
    for gap in gaps:
        now += gap
        rhythm.heard(now)
        for look in looks:
            pause = rhythm.pause(now + look)
            assert least <= pause <= max(1.1 * max(gaps) + most, most)
    # After some regular ones the next look comes just after the next event.
    for _ in range(200):
        now += 0.064
        rhythm.heard(now)
    assert rhythm.pause(now) == pytest.approx(0.064 + most)
    assert rhythm.pause(now + 0.07) == pytest.approx(most), "it is late"
    for _ in range(3):
        now += 0.008
        rhythm.heard(now)
    assert rhythm.pause(now) == pytest.approx(0.0085)


def test_the_thread_sleeps_between_orders(pair: tuple[Peer, Channel]) -> None:
    peer, channel = pair
    before = set(threading.enumerate())
    for number in range(3):
        channel.send_later(text(number))
    channel.send(DONE)
    messages(peer, 4)
    (writer,) = [t for t in threading.enumerate() if t.name == "writer" and t not in before]
    path = Path(f"/proc/self/task/{writer.native_id}/status")

    def switches() -> int:
        line = next(x for x in path.read_text().splitlines() if x.startswith("voluntary"))
        return int(line.split()[1])

    turn, asleep, until = threading.Event(), -1, time.monotonic() + PATIENCE
    # Its last look of the order may still come; looks that never end are far less than 0.2 s apart.
    while asleep != (asleep := switches()):
        assert time.monotonic() < until
        turn.wait(0.2)
    channel.send_later(text(7))
    channel.send_later(text(8))
    assert messages(peer, 2) == [text(7), text(8)], "nobody has sent them but the thread"


# --- a generation whose library calls back --------------------------------------------------


class Calls:
    """A channel that says how it was used."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda message, *_: self.calls.append((name, message))


class Speaks:
    """A role whose library calls back, or does not."""

    def __init__(self, said: Sequence[Any], in_callback: bool) -> None:
        self.said, self.in_callback, self.aborts = said, in_callback, 0
        self.between: Callable[[], None] = lambda: None

    def warm(self) -> None: ...

    def abort(self) -> None:
        self.aborts += 1

    def work(self, _order: Any, _fds: Sequence[int], send: loop.Send) -> None:
        for message in self.said:
            send(message, in_callback=self.in_callback)
            self.between()
        send(DONE)


PREFILLED = child.Prefilled(id=1, prompt=1, cached=0, seconds=0.0)


def did(role: Speaks) -> list[tuple[str, Any]]:
    channel = Calls()
    made = loop.Loop(channel, role)  # type: ignore[arg-type]
    made._in_hand.append(1)
    role.between = lambda: made._aborted.add(1)
    made._do(child.Generate(id=1, tokens=[1], max_tokens=9), ())
    return channel.calls


def test_the_first_text_is_on_its_way_before_the_library_goes_on() -> None:
    """Whether a job has begun to answer decides whether it is done again."""
    role = Speaks([PREFILLED, text(0), text(1), text(2)], in_callback=True)
    assert did(role) == [
        ("hold", PREFILLED), ("send", text(0)), ("send_later", text(1)), ("send_later", text(2)),
        ("send", DONE),
    ]  # fmt: skip


def test_who_speaks_between_calls_sends_himself() -> None:
    role = Speaks([PREFILLED, text(0), text(1)], in_callback=False)
    assert [how for how, _ in did(role)] == ["send"] * 4


@pytest.mark.parametrize("in_callback", [True, False])
def test_an_abort_meets_a_backend_at_each_frame(in_callback: bool) -> None:
    role = Speaks([PREFILLED, text(0), text(1), text(2)], in_callback)
    did(role)
    assert role.aborts == 3, "one for each frame after the abort came"


# --- rows that are made ahead ---------------------------------------------------------------


class Encoder:
    """An encoder that fills its place; ``fault`` is raised after it has asked for it."""

    rows_shape = (3, 4)

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def load(self, *_: Any) -> dict[str, Any]:
        return {}

    def encode(self, *_: Any) -> Any:
        raise AssertionError("in place is faster")

    def encode_into(self, pixels: Any, _grid: Any, rows: Callable[[], Any]) -> object:
        place = rows()
        place[...] = np.arange(12, dtype=np.float32).reshape(3, 4) + pixels[0]
        if self.fault:
            raise RkvlmdError("engine_error", self.fault)
        return place


def encoded(encoder: Any, pixel: int) -> tuple[child.EncodeDone, int]:
    """Return the answer of a role, and a duplicate of the descriptor of its rows."""
    role = roles.EngineRole("encoder")
    role._backend = encoder
    found: list[Any] = []

    def send(message: Any, fds: Sequence[int] = (), **_: Any) -> None:
        found.append((message, os.dup(fds[0])))

    fd, tensor = memfd.from_array(np.array([pixel], np.uint8))
    try:
        role.work(child.Encode(id=7, pixels=tensor), [fd], send)
    finally:
        os.close(fd)
    (answer,) = found
    return answer  # type: ignore[no-any-return]


def test_rows_made_in_place_are_sealed_and_of_their_size() -> None:
    done, fd = encoded(Encoder(), 5)
    assert done.rows == child.Tensor(shape=(3, 4), dtype="float32")
    assert memfd.checked_size(fd) == os.fstat(fd).st_size == 48
    expected = np.arange(12, dtype=np.float32).reshape(3, 4) + 5
    np.testing.assert_array_equal(memfd.map_array(fd, done.rows), expected)
    mine = memfd.map_array(fd, done.rows, own=True)
    mine[...] = 0  # a copy of whoever maps it so
    np.testing.assert_array_equal(memfd.map_array(fd, done.rows), expected)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 4)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 64)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 48)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0)
    os.close(fd)


def test_a_kernel_without_the_seal_of_later_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memfd, "_SEAL_FUTURE_WRITE", 1 << 20)  # none knows this one
    fd, mapped = memfd.writable(48)
    mapped[:] = b"x" * 48
    memfd.seal(fd, mapped)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"y", 0)
    assert memfd.read(fd) == b"x" * 48
    os.close(fd)


def test_a_failed_encode_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "PAUSE", 0.0)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(RkvlmdError, match="no luck"):
            encoded(Encoder("no luck"), 1)
    # A thread of each role frees: give them their turn.
    turn = threading.Event()
    for _ in range(int(PATIENCE * 100)):
        if len(os.listdir("/proc/self/fd")) <= before:
            return
        turn.wait(0.01)
    raise AssertionError("descriptors are left")


def test_no_memory_is_told_where_the_rows_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_size: int) -> Any:
        raise OSError(12, "no memory")

    monkeypatch.setattr(memfd, "writable", none)
    with pytest.raises(OSError, match="no memory"):
        encoded(Encoder(), 1)


def test_what_comes_too_fast_is_freed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "PAUSE", PATIENCE)
    sweeper, count = ahead.Sweeper(), 0

    class Old:
        def __del__(self) -> None:
            nonlocal count
            count += 1

    for _ in range(20):
        sweeper.take(Old())
    # One is with the thread, or is still to be taken by it.
    assert count >= 20 - ahead.MOST_OLD - 1
