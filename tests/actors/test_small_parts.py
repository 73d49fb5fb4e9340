"""Slots, embedding cache, crash memory, memory admission, outbox."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from rkvlmd.actors import memory
from rkvlmd.actors.blobs import Blob, from_bytes, from_text
from rkvlmd.actors.crashes import CrashMemory, content_key
from rkvlmd.actors.embeddings import EmbeddingCache, Rows, row_key
from rkvlmd.actors.job import Outbox
from rkvlmd.actors.slots import Gate
from rkvlmd.errors import RkvlmdError
from rkvlmd.messages import Ended
from rkvlmd.settings import QueueSettings
from rkvlmd.wire.child import Tensor


async def _rows(size: int) -> Rows:
    return Rows(await from_bytes(b"x" * size), Tensor(shape=(size,), dtype="uint8"))


async def test_cache_budget_and_ownership() -> None:
    with EmbeddingCache(250) as cache:
        for key in "abc":
            rows = await _rows(100)
            cache.put(key, rows)
            rows.blob.close()
        assert len(cache) == 2
        assert cache.bytes == 200
        assert cache.get("a") is None
        kept = cache.get("b")
        assert kept is not None
        big = await _rows(300)
        cache.put("big", big)
        assert len(cache) == 2
        big.blob.close()
    assert kept.blob.fd >= 0
    kept.blob.close()
    assert Blob.live == Blob.live_bytes == 0


def test_row_key_depends_on_both() -> None:
    assert len({row_key(a, b) for a in ("1", "2") for b in ("3", "4")}) == 4


async def test_blob_of_text_with_a_lone_surrogate() -> None:
    with await from_text("ab\ud800") as blob:
        assert blob.size == 3


def test_gate_counts_jobs_and_bytes() -> None:
    gate = Gate(QueueSettings(max_jobs=2, max_bytes=1000))
    first = gate.enter("a", 600)
    with pytest.raises(RkvlmdError, match="bytes") as info:
        gate.enter("b", 600)
    assert 1 <= (info.value.retry_after or 0) <= 120
    first.resize(300)
    second = gate.enter("b", 600)
    with pytest.raises(RkvlmdError, match="requests"):
        gate.enter("c", 1)
    with pytest.raises(RkvlmdError):
        first.resize(500)
    first.release()
    first.release()
    second.owned = True
    second.release()
    assert gate.jobs == 1
    second.close()
    assert gate.jobs == gate.bytes == 0
    assert gate.refused == 3


def test_retry_after_follows_the_service_time() -> None:
    gate = Gate(QueueSettings(max_jobs=1, max_bytes=1000))
    gate.enter("a", 1)
    for _ in range(50):
        gate.served(500.0)
    with pytest.raises(RkvlmdError) as info:
        gate.enter("b", 1)
    assert info.value.retry_after == 120


def test_one_client_holds_at_most_its_share() -> None:
    gate = Gate(QueueSettings(max_jobs=8, max_jobs_per_client=2, max_bytes=1000))
    slots = [gate.enter("a", 1), gate.enter("a", 1), gate.enter("b", 1)]
    for _ in range(50):
        gate.served(10.0)
    with pytest.raises(RkvlmdError, match="max_jobs_per_client") as info:
        gate.enter("a", 1)
    # Of three jobs two are its own: one of them ends after one and a half, on the average.
    assert (info.value.code, info.value.status, info.value.retry_after) == (
        "rate_limit_exceeded", 429, 15,
    )  # fmt: skip
    slots[0].release()
    slots.append(gate.enter("a", 1))
    gate.enter("b", 1)
    for slot in slots[1:]:
        slot.release()
    assert gate.refusals == {"client": 1}
    assert gate.jobs == 1


def test_no_share_when_it_is_off() -> None:
    gate = Gate(QueueSettings(max_jobs=40, max_jobs_per_client=0))
    for _ in range(40):
        gate.enter("a", 1)
    with pytest.raises(RkvlmdError) as info:
        gate.enter("a", 1)
    assert info.value.code == "server_is_overloaded"


def test_late_requests_are_refused_only_on_measured_grounds() -> None:
    gate = Gate(QueueSettings())
    gate.check_late(100.0, 10.0)
    gate.served(1.0)
    gate.check_late(9.0, 10.0)
    with pytest.raises(RkvlmdError, match="about 31 s, longer than its deadline of 10 s") as info:
        gate.check_late(30.5, 10.0)
    assert (info.value.code, info.value.retry_after) == ("server_is_overloaded", 21)
    assert gate.refusals == {"late": 1}
    patient = Gate(QueueSettings(refuse_late=False))
    patient.served(1.0)
    patient.check_late(30.5, 10.0)


def test_crash_memory() -> None:
    async def scenario() -> None:
        crashes = CrashMemory(600.0)
        key = content_key(["hello"], ["picture"])
        crashes.note(key)
        crashes.check(key)
        crashes.note(key)
        with pytest.raises(RkvlmdError) as info:
            crashes.check(key)
        assert info.value.should_retry is False
        crashes.check(content_key(["hello"], ["other"]))
        await trio.sleep(601)
        crashes.check(key)
        assert len(crashes) == 0

    trio.run(scenario, clock=trio.testing.MockClock(autojump_threshold=0))


def _tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_room_is_the_smaller_of_kernel_and_cgroup(tmp_path: Path) -> None:
    root = _tree(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 8000 kB\nMemAvailable: 4000 kB\n",
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/b/memory.current": "1000\n",
            "sys/fs/cgroup/a/memory.max": "3000000\n",
            "sys/fs/cgroup/a/memory.current": "1000000\n",
        },
    )
    room = memory.room(root)
    assert room.available == 4_096_000
    assert room.cgroup == 2_000_000
    assert room.bytes == 2_000_000


def test_room_without_a_cgroup(tmp_path: Path) -> None:
    room = memory.room(_tree(tmp_path, {"proc/meminfo": "MemAvailable: 1000 kB\n"}))
    assert room.cgroup is None
    assert room.bytes == 1_024_000


def test_load_admission_counts_what_the_swap_frees() -> None:
    room = memory.Room(1_000_000_000, None)
    memory.admit("m", need=1_500_000_000, freed=900_000_000, reserve=300_000_000, now=room)
    with pytest.raises(RkvlmdError, match=r"needs 1500 MB .* only 1200 MB"):
        memory.admit("m", need=1_500_000_000, freed=500_000_000, reserve=300_000_000, now=room)


async def test_outbox_merges_and_keeps_the_first_end() -> None:
    outbox = Outbox()
    outbox.put("a")
    outbox.put("")
    outbox.put("b")
    assert await outbox.take() == ("ab", None)
    outbox.put("c")
    outbox.close(Ended("stop"))
    outbox.close(Ended("error"))
    assert await outbox.take() == ("c", Ended("stop"))
    assert await outbox.take() == ("", Ended("stop"))
