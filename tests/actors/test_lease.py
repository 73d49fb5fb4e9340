"""The lease: order, cancellation at every step, handing over."""

from __future__ import annotations

import trio
import trio.testing

from rkvlmd.actors.lease import Grip, Lease
from rkvlmd.actors.policy import Choice
from tests.fakes.torture import cancel_everywhere


async def test_first_come_first_served() -> None:
    lease, order = Lease(), []

    async def one(name: str) -> None:
        async with lease.hold(name, "m"):
            order.append(name)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for name in "abc":
            nursery.start_soon(one, name)
            await trio.testing.wait_all_tasks_blocked()
    assert order == list("abc")
    assert not lease.held


async def test_policy_chooses() -> None:
    lease, order = Lease(policy=lambda waiting, _view: Choice(len(waiting) - 1)), []

    async def one(name: str) -> None:
        async with lease.hold(name, "m"):
            order.append(name)

    async with trio.open_nursery() as nursery:
        async with lease.hold("first", "m"):
            for name in "abc":
                nursery.start_soon(one, name)
                await trio.testing.wait_all_tasks_blocked()
    assert order == list("cba")


async def test_cancelled_waiter_is_forgotten() -> None:
    lease = Lease()
    async with lease.hold("a", "m"):
        with trio.move_on_after(0):
            async with lease.hold("b", "m"):
                raise AssertionError("not reached")
        assert lease.waiting == 0
    assert not lease.held


async def test_handed_over_grip_outlives_its_holder() -> None:
    lease = Lease()
    kept: list[Grip] = []
    async with lease.hold("a", "m") as grip:
        grip.handed_over = True
        kept.append(grip)
    assert lease.held
    kept[0].release()
    kept[0].release()
    assert not lease.held


def test_no_cancellation_leaks_the_lease() -> None:
    leases: list[Lease] = []

    async def scenario() -> None:
        lease = Lease()
        leases.append(lease)

        async def one(name: str) -> None:
            async with lease.hold(name, "m"):
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            for name in "abcd":
                nursery.start_soon(one, name)

    def check() -> None:
        assert not leases[-1].held
        assert leases[-1].waiting == 0

    assert cancel_everywhere(scenario, check) > 10
