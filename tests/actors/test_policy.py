"""The order of the queue: simulated over many random arrivals, and its promises one by one."""

from __future__ import annotations

import random

import pytest

from rkvlmd.actors.policy import Choice, History, Rules, View, Waiting, ahead, choose
from tests.fakes.queue import Board, Served, Work

INTERACTIVE, NORMAL, BATCH = range(3)


def random_arrivals(rng: random.Random) -> list[Work]:
    """Bursts and gaps of a few clients, models and classes, maintenance among them."""
    clients = [f"c{i}" for i in range(rng.randint(1, 5))]
    ranks = rng.choice([[NORMAL], [INTERACTIVE, NORMAL, BATCH], [INTERACTIVE, BATCH]])
    models = rng.choice([["a"], ["a", "b"], ["a", "b", "c"]])
    spread = rng.choice([0.0, 3.0, 10.0, 30.0])
    works = []
    for _ in range(rng.randint(2, 16)):
        if rng.random() < 0.05:
            client, model, rank = "", "", NORMAL
        else:
            client, model, rank = rng.choice(clients), rng.choice(models), rng.choice(ranks)
        prefix = rng.choice(["", "", "p", "q"])
        at = rng.uniform(0, spread)
        works.append(Work(at, client, model, rng.choice([0.2, 1.0, 2.0]), rank, prefix))
    return works


def bound(board: Board, one: Served, longest: float) -> float:
    """The formula of the module's docstring."""
    rank, rules = one.work.rank, board.rules
    m = rules.max_jumps
    r = sum(t.client == one.work.client and t.rank == rank for t in one.waiting_before)
    clients, better = board.most_clients[rank], board.most_better[rank]
    if rank == INTERACTIVE:
        return longest * (1 + (r + 1) * (clients + m + 2))
    return rank * rules.age_seconds + longest * (1 + (r + 1) * (clients + m) * (better + m + 2))


def test_every_wait_is_bounded_and_no_second_is_wasted() -> None:
    rng = random.Random(20261120)
    for number in range(10_000):
        rules = Rules(rng.choice([0.5, 3.0, 30.0]), rng.randint(0, 4))
        board = Board(rules, swap_seconds=rng.choice([0.0, 1.0, 5.0]))
        works = random_arrivals(rng)
        served = board.run(works)
        longest = max(one.end - one.start for one in served)
        for one in served:
            assert one.wait <= bound(board, one, longest) + 1e-9, (number, one)
        # Work is conserved: everything is served once, and the board rests only when nobody waits.
        assert sorted(map(id, works)) == sorted(id(one.work) for one in served)
        end = 0.0
        for one in served:
            earliest = min(other.work.at for other in served if other.start >= one.start)
            assert one.start == max(end, earliest)
            end = one.end


def test_jobs_of_one_client_and_class_keep_their_order_within_the_jumps() -> None:
    rng = random.Random(7)
    for _ in range(2_000):
        board = Board(Rules(3.0, 0), swap_seconds=1.0)
        last: dict[tuple[str, int], float] = {}
        for one in board.run(random_arrivals(rng)):
            line = (one.work.client, one.work.rank)
            assert last.get(line, -1.0) <= one.work.at
            last[line] = one.work.at


def test_between_two_clients_of_one_class() -> None:
    """The other's request starts after at most 1 + max_jumps foreign jobs and one swap."""
    rng = random.Random(3)
    plain = 0
    for _ in range(10_000):
        rules = Rules(rng.choice([0.5, 30.0]), rng.randint(0, 4))
        board = Board(rules, swap_seconds=1.0)
        models = rng.choice(["ab", "abc"])
        works = [
            Work(
                rng.uniform(0, 12), rng.choice("xy"), rng.choice(models), rng.choice([0.5, 1.0]),
                prefix=rng.choice(["", "p", "q"]),
            )
            for _ in range(rng.randint(2, 20))
        ]  # fmt: skip
        served = board.run(works)
        for one in served:
            own = one.work.client
            if any(ticket.client == own for ticket in one.waiting_before):
                continue
            between = served[one.services_before : one.number - 1]
            foreign = [s for s in between if s.work.client != own]
            later = [s for s in between if s.work.client == own]
            assert len(later) <= rules.max_jumps
            assert not any(s.swap for s in later)
            own_ran = one.running is not None and one.running.work.client == own
            assert sum(s.swap for s in foreign) <= own_ran + len(later)
            if not own_ran and not later:
                plain += 1
                assert sum(s.swap for s in served[one.services_before : one.number]) <= 1
            if one.running is not None and not own_ran:
                foreign.insert(0, one.running)
            assert len(foreign) <= 1 + rules.max_jumps
    assert plain > 10_000


@pytest.mark.parametrize("jumps", [0, 1, 4])
def test_two_models_in_turn_do_not_thrash(jumps: int) -> None:
    board = Board(Rules(30.0, jumps), swap_seconds=10.0)
    works = [Work(i / 100, client, model) for i in range(30) for client, model in ("xa", "yb")]
    served = board.run(works)
    assert board.swaps <= 2 + len(served) // (jumps + 1)
    assert {one.work.client for one in served[: jumps + 2]} == {"x", "y"}


def test_one_client_with_two_models_does_not_thrash() -> None:
    board = Board(Rules(30.0, 4), swap_seconds=10.0)
    served = board.run(Work(i / 100, "x", "ab"[i % 2]) for i in range(40))
    assert board.swaps <= 2 + len(served) // 5


def test_nobody_starves_behind_endless_newcomers() -> None:
    """New clients come faster than they can be served; each asks for the best class."""
    rules = Rules(age_seconds=10.0, max_jumps=4)
    board = Board(rules)
    crowd = [Work(i * 0.5, f"n{i}", rank=INTERACTIVE) for i in range(400)]
    served = board.run([*crowd, Work(0.1, "slow", rank=BATCH), Work(0.1, "", "", rank=NORMAL)])
    waits = {one.work.client: one.wait for one in served}
    assert waits["slow"] <= 20.0 + 1 + 3
    assert waits[""] <= 10.0 + 1 + rules.max_jumps


def test_nobody_starves_behind_endless_newcomers_of_its_class() -> None:
    board = Board(Rules(30.0, 0))
    crowd = [Work(i * 0.5, f"n{i}") for i in range(400)]
    served = board.run([*crowd, Work(0.0, "old"), Work(0.0, "old")])
    _first, second = (one for one in served if one.work.client == "old")
    assert second.number <= 8  # those who came before its first was served, and nobody else


def test_nobody_starves_behind_a_chat_that_goes_on() -> None:
    """Follow-ups of one conversation come one after the other, each warm when it comes."""
    board = Board(Rules(30.0, 3))
    chat = [Work(float(i), "chat", prefix="p") for i in range(60)]
    (other,) = [s for s in board.run([*chat, Work(5.5, "other")]) if s.work.client == "other"]
    assert other.number - 1 - other.services_before <= 3


def test_a_new_client_waits_for_nobody_who_was_served_since() -> None:
    board = Board()
    backlog = [Work(0.0, "greedy") for _ in range(20)]
    served = board.run([*backlog, Work(0.5, "one"), Work(0.6, "two"), Work(3.5, "three")])
    names = [s.work.client for s in served]
    assert names[:6] == ["greedy", "one", "two", "greedy", "three", "greedy"]


def test_turns_and_not_jobs_count() -> None:
    board = Board()
    served = board.run([*(Work(0.0, "x") for _ in range(4)), *(Work(0.0, "y") for _ in range(2))])
    assert [s.work.client for s in served] == list("xyxyxx")


def test_classes_come_in_order_and_age_lifts() -> None:
    rules = Rules(age_seconds=10.0, max_jumps=0)
    works = [Work(0.0, "b", rank=BATCH), Work(0.0, "n"), Work(0.0, "i", rank=INTERACTIVE)]
    assert [s.work.client for s in Board(rules).run(works)] == ["i", "n", "b"]
    works += [Work(0.1 + i, f"i{i % 3}", rank=INTERACTIVE) for i in range(60)]
    served = Board(rules).run(works)
    starts = {s.work.client: s.start for s in served}
    assert 10.0 <= starts["n"] <= 12.0
    assert 20.0 <= starts["b"] <= 22.0


@pytest.mark.parametrize("busy", [1, 4])
def test_old_jobs_do_not_push_the_better_class_aside(busy: int) -> None:
    """Interactive clients that ask again at once, alone and among 60 old ones of a worse class."""

    def waits(crowd: int) -> list[float]:
        board, answers = Board(Rules(age_seconds=5.0, max_jumps=4)), []
        for i in range(crowd):
            board.arrive(Work(0.0, f"n{i}"), None)
        for i in range(busy):
            board.arrive(Work(0.0, f"i{i}", rank=INTERACTIVE), None)
        for _ in range(600):
            one = board.serve()
            if one.work.rank == INTERACTIVE:
                answers.append(one.wait)
            # Closed loop: whoever was served asks again as soon as it has its answer.
            board.now = one.end
            board.arrive(Work(one.end, one.work.client, rank=one.work.rank), None)
        return sorted(answers)

    alone, crowded = waits(0), waits(60)
    assert crowded[len(crowded) * 95 // 100] <= 1.3 * alone[len(alone) * 95 // 100] + 1.0


def waiting(*tickets: tuple[str, str]) -> list[Waiting]:
    return [Waiting(client, model, 0.0) for client, model in tickets]


def test_maintenance_neither_jumps_nor_is_jumped_for_good() -> None:
    queue = waiting(("x", "a"), ("", ""), ("y", "a"))
    # Nothing loaded and no model: that is no affinity.
    assert choose(queue, View(0.0, loaded="")) == Choice(0)
    rules = Rules(30.0, 2)
    served = Board(rules, loaded="a").run(
        [Work(0.0, "x", seconds=5.0), Work(1.0, "", ""), *(Work(1.5, "x") for _ in range(20))]
    )
    assert [s.work.client for s in served[:4]].count("") == 1
    lasting = Board(rules, loaded="a").run(
        [Work(0.0, "x", "b"), *(Work(0.5, f"y{i}", "b") for i in range(9)), Work(0.7, "", "")]
    )
    assert lasting[-1].work.client == ""  # others came before it, and each has its turn


def test_affinity_prefers_the_warm_prefix() -> None:
    queue = [
        Waiting("x", "b", 0.0),
        Waiting("y", "a", 0.0),
        Waiting("z", "a", 0.0, prefix=tuple("pqrs")),
    ]
    assert choose(queue, View(0.0, "a")) == Choice(1, (0,))
    assert choose(queue, View(0.0, "a", frozenset("p"))) == Choice(1, (0,))  # not even half of it
    assert choose(queue, View(0.0, "a", frozenset("pq"))) == Choice(2, (0, 1))
    assert choose(queue, View(0.0, "a", frozenset("pq"), rules=Rules(30.0, 0))) == Choice(0)


def test_worse_classes_do_not_jump_better_ones() -> None:
    queue = [Waiting("x", "b", 0.0, INTERACTIVE), Waiting("y", "a", 0.0, BATCH)]
    for now in (0.0, 1000.0):
        history = History(5, {}, {BATCH: 5})
        assert choose(queue, View(now, "a", history=history)) == Choice(0)


def test_ahead_counts_better_classes_and_turns() -> None:
    queue = [
        Waiting("x", "a", 0.0, NORMAL),
        Waiting("x", "a", 0.0, NORMAL),
        Waiting("y", "a", 0.0, INTERACTIVE),
        Waiting("z", "a", 0.0, BATCH),
    ]
    view = View(0.0, "a", history=History(9, {(NORMAL, "x"): 9}))
    new = Waiting("new", "a", 0.0, NORMAL, arrived=9)
    assert ahead(queue, view, new) == 1  # y; x was served since
    assert ahead(queue, view, Waiting("x", "a", 0.0, NORMAL, arrived=9)) == 3
    assert ahead(queue, view, Waiting("new", "a", 0.0, BATCH, arrived=9)) == 4
    assert ahead([], view, new) == 0
