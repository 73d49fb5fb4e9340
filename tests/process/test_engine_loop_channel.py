"""The child's end of the socket: frames cut anywhere, descriptors in order, none lost."""

from __future__ import annotations

import array
import contextlib
import fcntl
import itertools
import os
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkvlmd.engine import memfd
from rkvlmd.engine.channel import Channel, close_all
from rkvlmd.wire import child, frames
from tests.fakes.engine_child import Peer

pytestmark = pytest.mark.process


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, Channel]]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    channel = Channel(theirs)
    with ours:
        yield ours, channel
        channel.close()


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def send(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sent = sock.sendmsg([data], rights)
    sock.sendall(data[sent:])


def generate(number: int, count: int) -> bytes:
    spans = [child.Span(start=i, count=1, key=str(i)) for i in range(count)]
    order = child.Generate(id=number, tokens=[7] * count, spans=spans, max_tokens=1)
    return frames.encode(child.build(order) | {"fds": count})


FRAMES = st.lists(
    st.tuples(st.integers(0, 5), st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=4)),
    max_size=6,
)


@given(FRAMES)
def test_cut_anywhere(sent: list[tuple[int, list[tuple[float, bool]]]]) -> None:
    """Each frame goes in pieces; some pieces are read before the next one goes."""
    before = open_fds()
    ours, theirs = socket.socketpair()
    with ours, contextlib.closing(Channel(theirs)) as channel:
        received = []
        for number, (count, cuts) in enumerate(sent):
            frame = generate(number, count)
            read_at = {1 + int(cut * (len(frame) - 1)): read for cut, read in cuts}
            for start, end in itertools.pairwise(sorted({0, *read_at, len(frame)})):
                names = range(count if start == 0 else 0)
                fds = [memfd.create(f"{number}.{i}".encode()) for i in names]
                send(ours, frame[start:end], fds)
                close_all(fds)
                if read_at.get(end):
                    received += channel.receive()
        while len(received) < len(sent):
            received += channel.receive()
        for number, (order, fds) in enumerate(received):
            assert isinstance(order, child.Generate)
            assert order.id == number
            assert [memfd.read(fd) for fd in fds] == [
                f"{number}.{i}".encode() for i in range(sent[number][0])
            ]
            assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in fds)
            close_all(fds)
    assert open_fds() <= before


def test_end_of_file(pair: tuple[socket.socket, Channel]) -> None:
    ours, channel = pair
    ours.sendall(frames.encode(child.build(child.Abort(id=1)))[:5])
    assert channel.receive() == []
    ours.close()
    with pytest.raises(EOFError):
        channel.receive()


def test_descriptors_of_a_frame_that_never_comes_are_closed() -> None:
    before = open_fds()
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    fd = memfd.create(b"x")
    send(ours, generate(1, 1)[:9], [fd])
    os.close(fd)
    assert channel.receive() == []
    ours.close()
    channel.close()
    assert open_fds() <= before


def test_a_frame_without_its_descriptors(pair: tuple[socket.socket, Channel]) -> None:
    pair[0].sendall(generate(1, 2))
    with pytest.raises(frames.FrameError, match="without its descriptors"):
        pair[1].receive()


def test_descriptors_without_a_frame(pair: tuple[socket.socket, Channel]) -> None:
    fd = memfd.create(b"x")
    send(pair[0], frames.encode(child.build(child.Abort(id=1))), [fd])
    os.close(fd)
    with pytest.raises(frames.FrameError, match="descriptors without a frame"):
        pair[1].receive()


def test_more_descriptors_than_there_is_room_for(pair: tuple[socket.socket, Channel]) -> None:
    # No message of the kernel has more than a frame may carry; but a process may be full.
    fd = memfd.create(b"x")
    send(pair[0], b"\0", [fd] * 8)
    os.close(fd)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(name) for name in os.listdir("/proc/self/fd")}
    fifth = [number for number in range(len(taken) + 5) if number not in taken][4]
    resource.setrlimit(resource.RLIMIT_NOFILE, (fifth, hard))
    try:
        with pytest.raises(frames.FrameError, match="cut off"):
            pair[1].receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("body", [b"[1]", b'{"type": "nothing"}', b'{"type": "abort"}', b"\xff"])
def test_no_order(pair: tuple[socket.socket, Channel], body: bytes) -> None:
    pair[0].sendall(len(body).to_bytes(4, "big") + body)
    with pytest.raises((frames.FrameError, msgspec.ValidationError)):
        pair[1].receive()


def test_two_threads_and_a_slow_reader() -> None:
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    channel, peer = Channel(theirs), Peer(ours)
    text = "x" * 50_000

    def work(number: int) -> None:
        for _ in range(20):
            with_fd = memfd.create(str(number).encode())
            channel.send(child.EncodeDone(
                id=number, rows=child.Tensor(shape=(1,), dtype="uint8"), seconds=0.0
            ), [with_fd])  # fmt: skip
            os.close(with_fd)
            channel.send(child.Text(id=number, text=text))

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2)]
    for thread in threads:
        thread.start()
    seen: dict[int, list[str]] = {1: [], 2: []}
    for _ in range(80):
        message, fds = peer.receive()
        if isinstance(message, child.EncodeDone):
            assert memfd.read(fds[0]) == str(message.id).encode()
            close_all(fds)
        else:
            assert isinstance(message, child.Text)
            assert message.text == text
        seen[message.id].append(type(message).__name__)
    for thread in threads:
        thread.join()
    assert seen == {1: ["EncodeDone", "Text"] * 20, 2: ["EncodeDone", "Text"] * 20}
    ours.close()
    channel.close()


def test_send_nowait_gives_up_at_a_full_socket(pair: tuple[socket.socket, Channel]) -> None:
    ours, channel = pair
    count = 0
    while channel.send_nowait(child.Beat()):
        count += 1
        assert count < 100_000
    peer = Peer(ours)
    for _ in range(count):
        assert isinstance(peer.receive()[0], child.Beat)
    assert channel.send_nowait(child.Beat())


# --- memory files --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", sorted(memfd.DTYPES))
def test_arrays_cross(dtype: str) -> None:
    array_ = np.arange(24).reshape(2, 3, 4).astype(dtype)
    fd, tensor = memfd.from_array(array_.transpose(2, 0, 1))
    mapped = memfd.map_array(fd, tensor)
    os.close(fd)
    assert tensor == child.Tensor(shape=(4, 2, 3), dtype=dtype)
    assert np.array_equal(mapped, array_.transpose(2, 0, 1))
    assert not mapped.flags.writeable


def test_a_memory_file_is_sealed() -> None:
    fd = memfd.create(b"abc")
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 1)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0)
    assert memfd.read(fd) == b"abc"
    os.close(fd)


def test_an_empty_memory_file() -> None:
    fd = memfd.create(b"")
    assert memfd.read(fd) == b""
    os.close(fd)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3,), "uint8"), ((5,), "uint8"), ((2,), "float32"), ((0,), "uint8"), ((-4,), "uint8"),
     ((4,), "object"), ((4,), "S1")],
)  # fmt: skip
def test_a_wrong_description(shape: tuple[int, ...], dtype: str) -> None:
    fd = memfd.create(b"abcd")
    with pytest.raises(memfd.MemoryFileError):
        memfd.map_array(fd, child.Tensor(shape=shape, dtype=dtype))
    os.close(fd)


def test_what_could_shrink_is_refused(tmp_path: Path) -> None:
    unsealed = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    with pytest.raises(memfd.MemoryFileError, match="not sealed"):
        memfd.checked_size(unsealed)
    os.close(unsealed)
    (tmp_path / "x").write_bytes(b"x")
    plain = os.open(tmp_path / "x", os.O_RDONLY)
    with pytest.raises(memfd.MemoryFileError):
        memfd.read(plain)
    os.close(plain)
