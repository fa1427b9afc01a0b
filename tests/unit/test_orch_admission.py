"""What the queue before all backends promises: order, bounds, fairness and honest forecasts."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable

import pytest

from forebay.kit.failure import Failure, QueueFull, QueueTimeout
from forebay.kit.pipeline import Urgency
from forebay.orchestrator.admission import OLDEST_EVERY, Admission, Ticket, Turn
from soak import counted

INTERACTIVE, NORMAL, BATCH = Urgency.INTERACTIVE, Urgency.NORMAL, Urgency.BATCH


class Desk:
    """An admission with its clock in hand."""

    def __init__(self, *, slots: int | dict[str, int] = 1, queue: int = 100, **settings: float) -> None:
        self.now = 0.0
        self.slots = slots if isinstance(slots, dict) else {"": slots}
        self.admission = Admission(
            queue=queue,
            ageing=settings.pop("ageing", 10.0),
            capacity=lambda pool: self.slots.get(pool, self.slots[""]),
            clock=lambda: self.now,
            **settings,  # type: ignore[arg-type]  # queue_bytes only
        )

    def come(
        self,
        urgency: Urgency = NORMAL,
        caller: str = "a",
        *,
        pool: str = "m",
        cost: float = 10.0,
        remaining: float | None = None,
        on_turn: Callable[[], None] = lambda: None,
        size: int = 0,
    ) -> Ticket:
        return self.admission.arrive(
            urgency=urgency,
            caller=caller,
            pool=pool,
            cost=cost,
            remaining=remaining,
            on_turn=on_turn,
            size=size,
        )

    def finish(self, ticket: Ticket, *, seconds: float = 0.0, tokens: float | None = None) -> None:
        self.now += seconds
        self.admission.leave(ticket, tokens=ticket.cost if tokens is None else tokens)

    def drain(self, tickets: list[Ticket]) -> list[Ticket]:
        """Ends whatever runs until nothing waits, and returns the order in which the tickets ran."""
        order = []
        while running := [ticket for ticket in tickets if ticket.turn is Turn.RUNNING]:
            order.append(running[0])
            self.finish(running[0])
        return order


def test_calls_run_at_once_while_there_are_permits_and_wait_after() -> None:
    desk = Desk(slots=2)
    first, second, third = (desk.come() for _ in range(3))
    assert [t.turn for t in (first, second, third)] == [Turn.RUNNING, Turn.RUNNING, Turn.WAITING]
    assert repr(desk.admission) == "<Admission 2 running, queue 1/100>"
    desk.finish(first)
    assert third.turn is Turn.RUNNING
    assert desk.admission.tally.admitted == 3


def test_the_more_urgent_goes_first_whatever_came_first() -> None:
    desk = Desk()
    desk_first = desk.come()
    waiting = [desk.come(urgency) for urgency in (BATCH, NORMAL, INTERACTIVE)]
    assert desk.admission.depth() == {INTERACTIVE: 1, NORMAL: 1, BATCH: 1}
    order = desk.drain([desk_first, *waiting])
    assert [ticket.urgency for ticket in order[1:]] == [INTERACTIVE, NORMAL, BATCH]


def test_of_the_urgent_and_the_aged_each_get_their_share() -> None:
    desk = Desk(ageing=10.0)
    running = desk.come()
    batch = [desk.come(BATCH, caller="batch") for _ in range(10)]
    desk.now = 20.0
    urgent = [desk.come(INTERACTIVE) for _ in range(50)]
    order = desk.drain([running, *batch, *urgent])[1:]
    assert [ticket.urgency for ticket in order[:16]].count(BATCH) == 2
    assert [ticket for ticket in order if ticket.urgency is BATCH] == batch


def test_before_it_is_aged_a_call_never_goes_before_a_more_urgent_one() -> None:
    desk = Desk(ageing=10.0)
    running = desk.come()
    batch = desk.come(BATCH)
    desk.now = 19.9
    urgent = [desk.come(INTERACTIVE) for _ in range(50)]
    assert desk.drain([running, batch, *urgent])[-1] is batch


def test_callers_share_by_tokens_and_not_by_calls() -> None:
    desk = Desk()
    running = desk.come(caller="x", cost=1)
    long = [desk.come(caller="long", cost=100) for _ in range(10)]
    short = [desk.come(caller="short", cost=10) for _ in range(100 - 10)]
    order = desk.drain([running, *long, *short])[1:]
    half = order[:50]
    by_caller = {name: sum(t.cost for t in half if t.caller == name) for name in ("long", "short")}
    assert abs(by_caller["long"] - by_caller["short"]) <= 150


def test_what_a_call_really_took_is_what_counts() -> None:
    desk = Desk()
    running = desk.come(caller="greedy", cost=10)
    others = [desk.come(caller=name, cost=10) for name in ("greedy", "modest") * 3]
    desk.finish(running, tokens=500)
    assert desk.admission.used("greedy") >= 500
    order = desk.drain(others)
    assert [ticket.caller for ticket in order] == ["modest"] * 3 + ["greedy"] * 3


def test_a_crowd_of_one_caller_does_not_hold_up_another() -> None:
    desk = Desk()
    crowd = [desk.come(caller="crowd") for _ in range(50)]
    single = desk.come(caller="single")
    assert desk.drain([*crowd, single]).index(single) <= 2


def test_rest_earns_no_credit() -> None:
    desk = Desk()
    for _ in range(100):
        desk.finish(desk.come(caller="busy", cost=100))
    running = desk.come(caller="busy", cost=100)
    waiting = [desk.come(caller=name, cost=100) for name in ("fresh",) * 6 + ("busy",) * 6]
    order = [ticket.caller for ticket in desk.drain([running, *waiting])[1:]]
    assert 2 <= order[:6].count("busy") <= 4


def test_the_oldest_call_goes_every_few_turns_whatever_the_counters_say() -> None:
    desk = Desk()
    running = desk.come(caller="indebted", cost=1)
    desk.finish(running, tokens=90_000)
    running = desk.come(caller="indebted", cost=1)
    waiting = desk.come(caller="indebted")
    desk.now += 30.0
    turns = 0
    while waiting.turn is Turn.WAITING:
        fresh = [desk.come(caller=f"fresh{turns}-{i}") for i in range(2)]
        desk.finish(running)
        running = next((t for t in (waiting, *fresh) if t.turn is Turn.RUNNING), running)
        if running.turn is not Turn.RUNNING:
            running = next(iter(desk.admission._running))
        turns += 1
        assert turns <= OLDEST_EVERY


def test_calls_for_a_busy_model_do_not_stand_before_those_for_an_idle_one() -> None:
    desk = Desk(slots={"": 2, "m": 1, "n": 1})
    first, second = desk.come(pool="m"), desk.come(INTERACTIVE, pool="m")
    other = desk.come(BATCH, pool="n")
    assert (first.turn, second.turn, other.turn) == (Turn.RUNNING, Turn.WAITING, Turn.RUNNING)
    desk.finish(other)
    assert second.turn is Turn.WAITING
    desk.finish(first)
    assert second.turn is Turn.RUNNING


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    desk = Desk(queue=1)
    first = desk.come()
    desk.come()
    with pytest.raises(QueueFull) as caught:
        desk.come()
    assert caught.value.metadata == {"active": "1", "waiting": "1"}
    assert caught.value.retry_after is not None
    assert caught.value.retry_after.total_seconds() == 1.0
    desk.finish(first, seconds=20.0, tokens=10)
    desk.come()
    with pytest.raises(QueueFull) as caught:
        desk.come()
    assert caught.value.retry_after is not None
    assert caught.value.retry_after.total_seconds() == pytest.approx(20.0)
    assert desk.admission.tally.full == 2


def test_a_full_queue_of_urgent_calls_lets_the_oldest_other_live_to_age() -> None:
    desk = Desk(queue=10, ageing=10.0)
    running = [desk.come(INTERACTIVE)]
    batch = [desk.come(BATCH) for _ in range(3)]
    waiting: list[Ticket] = []
    for number in range(60):  # three come in the time in which one is done
        desk.now += 1.0
        with contextlib.suppress(QueueFull):
            waiting.append(desk.come(INTERACTIVE, f"caller {number % 7}"))
        if number % 3 == 2:
            done = next(ticket for ticket in [*running, *batch, *waiting] if ticket.turn is Turn.RUNNING)
            desk.finish(done)
    assert [ticket.turn for ticket in batch] == [Turn.OVER, Turn.DROPPED, Turn.DROPPED]


def test_no_queue_at_all_refuses_whatever_cannot_run() -> None:
    desk = Desk(queue=0)
    desk.come()
    with pytest.raises(QueueFull):
        desk.come(INTERACTIVE)
    assert desk.admission.waiting == 0


def test_an_urgent_call_takes_the_place_of_the_youngest_that_is_not() -> None:
    desk = Desk(queue=2)
    desk.come()
    told: list[str] = []
    older, younger = (desk.come(BATCH, on_turn=lambda name=name: told.append(name)) for name in "oy")
    urgent = desk.come(INTERACTIVE)
    assert (older.turn, younger.turn, urgent.turn) == (Turn.WAITING, Turn.DROPPED, Turn.WAITING)
    assert told == ["y"]


def test_a_call_that_waited_for_its_right_keeps_it() -> None:
    desk = Desk(queue=1, ageing=10.0)
    desk.come()
    batch = desk.come(BATCH, caller="b")
    desk.now = 20.0
    with pytest.raises(QueueFull):
        desk.come(INTERACTIVE)
    assert batch.turn is Turn.WAITING


def test_a_crowd_of_one_caller_cannot_keep_others_out_of_the_queue() -> None:
    desk = Desk(queue=4)
    desk.come(caller="crowd")
    crowd = [desk.come(caller="crowd") for _ in range(4)]
    single = desk.come(caller="single")
    assert single.turn is Turn.WAITING
    assert [t.turn for t in crowd] == [Turn.WAITING] * 3 + [Turn.DROPPED]
    with pytest.raises(QueueFull):
        desk.come(caller="crowd")


def test_waiting_requests_have_a_budget_of_bytes() -> None:
    desk = Desk(queue_bytes=100)
    desk.come(size=1000)
    small = desk.come(BATCH, size=60)
    with pytest.raises(QueueFull):
        desk.come(NORMAL, caller="b", size=101)
    assert small.turn is Turn.WAITING
    urgent = desk.come(NORMAL, caller="b", size=100)
    assert (small.turn, urgent.turn) == (Turn.DROPPED, Turn.WAITING)


def test_a_call_that_cannot_make_its_deadline_is_refused_at_once() -> None:
    desk = Desk()
    desk.finish(desk.come(), seconds=10.0)  # a token a second
    desk.come()
    desk.come()
    with pytest.raises(QueueTimeout) as caught:
        desk.come(remaining=15.0)
    assert caught.value.metadata == {"wait_seconds": "20.000", "remaining_seconds": "15.000"}
    assert caught.value.retry_after is not None
    assert caught.value.retry_after.total_seconds() == pytest.approx(5.0)
    assert desk.admission.waiting == 1
    assert desk.come(remaining=25.0).turn is Turn.WAITING
    assert desk.come(INTERACTIVE, remaining=15.0).turn is Turn.WAITING
    assert desk.admission.tally.late == 1


def test_nobody_is_refused_for_a_deadline_before_anything_is_known() -> None:
    desk = Desk()
    desk.come()
    late = desk.come(remaining=0.001)
    assert late.turn is Turn.WAITING
    assert desk.admission.outlook(late).seconds is None


def test_the_forecast_tells_place_and_wait() -> None:
    desk = Desk(slots=2)
    desk.finish(desk.come(), seconds=10.0)
    desk.come(cost=10)
    desk.come(cost=40)
    desk.now += 5.0
    waiting = [desk.come() for _ in range(3)]
    shown = [desk.admission.outlook(ticket) for ticket in waiting]
    assert [(each.ahead, each.seconds) for each in shown] == [(0, 5.0), (1, 15.0), (2, 25.0)]


def test_a_call_that_is_overdue_is_expected_to_take_a_while_longer() -> None:
    desk = Desk()
    desk.finish(desk.come(), seconds=10.0)
    desk.come()
    desk.now += 100.0
    assert desk.admission.outlook(desk.come()).seconds == pytest.approx(25.0)


def test_the_forecast_counts_only_who_is_in_the_way() -> None:
    desk = Desk(slots={"": 9, "m": 1, "n": 1})
    desk.come(pool="m")
    desk.come(pool="n")
    others = [desk.come(pool="m") for _ in range(3)]
    mine = desk.come(pool="n")
    assert desk.admission.outlook(mine).ahead == 0
    assert desk.admission.outlook(others[-1]).ahead == 2


def test_each_model_has_its_own_pace() -> None:
    desk = Desk(slots={"": 9, "slow": 1, "fast": 1})
    desk.finish(desk.come(pool="slow"), seconds=100.0)
    desk.finish(desk.come(pool="fast"), seconds=1.0)
    desk.come(pool="slow")
    desk.come(pool="fast")
    assert desk.admission.outlook(desk.come(pool="slow")).seconds == pytest.approx(100.0)
    assert desk.admission.outlook(desk.come(pool="fast")).seconds == pytest.approx(1.0)


def test_capacity_that_grows_is_used_and_capacity_that_shrinks_is_kept_to() -> None:
    desk = Desk(slots=1)
    running = [desk.come() for _ in range(5)]
    desk.slots = {"": 3}
    desk.admission.pump()
    assert [t.turn for t in running] == [Turn.RUNNING] * 3 + [Turn.WAITING] * 2
    desk.slots = {"": 1}
    assert desk.admission.outlook(running[4]).ahead == 1
    desk.finish(running[0])
    desk.finish(running[1])
    assert running[3].turn is Turn.WAITING
    desk.finish(running[2])
    assert running[3].turn is Turn.RUNNING


def test_who_leaves_while_waiting_leaves_nothing_behind() -> None:
    desk = Desk()
    running, waiting, behind = desk.come(), desk.come(), desk.come()
    desk.admission.leave(waiting)
    desk.admission.leave(waiting)
    assert desk.admission.tally.left == 1
    assert desk.admission.outlook(behind).ahead == 0
    desk.finish(running)
    desk.finish(running)
    assert behind.turn is Turn.RUNNING
    assert (desk.admission.running, desk.admission.waiting) == (1, 0)


def test_a_call_that_fails_says_nothing_of_how_long_calls_take() -> None:
    desk = Desk()
    desk.admission.leave(desk.come())
    desk.come()
    assert desk.admission.outlook(desk.come()).seconds is None


def test_a_load_of_the_model_says_nothing_of_how_long_calls_take() -> None:
    desk = Desk()
    cold = desk.come()
    desk.now += 70.0
    desk.admission.leave(cold, tokens=10, aside=60.0)
    desk.come()
    assert desk.admission.outlook(desk.come()).seconds == pytest.approx(10.0)


def test_any_number_of_callers_and_models_takes_a_bounded_memory() -> None:
    desk = Desk(slots=10)
    kept = desk.come(caller="first")
    for number in range(3000):
        desk.finish(desk.come(caller=str(number), pool=str(number)), seconds=1.0)
    assert len(desk.admission._used) <= 1024
    assert len(desk.admission._rates) <= 256
    assert not any(pool for pool in desk.admission._pools if pool != "m")
    desk.finish(kept)
    assert desk.admission.running == 0


class Schedule:
    """One seed's worth of comings, goings and changes of capacity, and what holds in all of them."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.slots = self.chance.randint(1, 4)
        self.queue = self.chance.randint(0, 30)
        self.desk = Desk(slots=self.slots, queue=self.queue, ageing=self.chance.choice([1.0, 10.0, 60.0]))
        self.callers = [f"c{i}" for i in range(self.chance.randint(1, 6))]
        self.tickets: list[Ticket] = []
        self.outcomes: dict[int, int] = {}
        self.refusals: list[Failure] = []

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.chance.choices([self.arrive, self.finish, self.leave, self.resize], [5, 4, 1, 0.2])[0]()
            self.desk.now += self.chance.expovariate(1.0)
            self.check()
        self.drain()

    def arrive(self) -> None:
        urgency = self.chance.choice(list(Urgency))
        number = len(self.tickets)

        def on_turn() -> None:
            self.outcomes[number] = self.outcomes.get(number, 0) + 1

        try:
            ticket = self.desk.come(
                urgency,
                self.chance.choice(self.callers),
                pool=self.chance.choice("mn"),
                cost=self.chance.choice([1.0, 10.0, 200.0, 5000.0]),
                remaining=self.chance.choice([None, 5.0, 500.0]),
                on_turn=on_turn,
            )
        except (QueueFull, QueueTimeout) as failure:
            self.refusals.append(failure)
            return
        self.tickets.append(ticket)

    def of(self, turn: Turn) -> list[Ticket]:
        return [ticket for ticket in self.tickets if ticket.turn is turn]

    def finish(self) -> None:
        running = self.of(Turn.RUNNING)
        if not running:
            return
        waiting = self.of(Turn.WAITING)
        now, ageing = self.desk.now, self.desk.admission._ageing
        ticket = self.chance.choice(running)
        tokens = self.chance.choice([None, ticket.cost, ticket.cost * self.chance.random() * 3])
        self.desk.admission.leave(ticket, tokens=tokens)
        started = [each for each in waiting if each.turn is Turn.RUNNING]
        for each in started:  # nobody is passed over by a call that is less urgent, unless that one is aged
            if now - each.arrived < max(1, each.urgency) * ageing:
                assert all(other.urgency >= each.urgency for other in self.of(Turn.WAITING))

    def leave(self) -> None:
        waiting = self.of(Turn.WAITING)
        if waiting:
            self.desk.admission.leave(self.chance.choice(waiting))

    def resize(self) -> None:
        self.desk.slots = {"": self.chance.randint(1, 5)}
        self.desk.admission.pump()

    def check(self) -> None:
        for failure in self.refusals:
            assert failure.retry_after is not None
            assert 0.1 <= failure.retry_after.total_seconds() <= 60.0
        admission = self.desk.admission
        assert admission.waiting <= self.queue
        assert admission.waiting == len(self.of(Turn.WAITING))
        assert admission.running == len(self.of(Turn.RUNNING)) == sum(admission._pools.values())
        capacity = self.desk.slots[""]
        assert admission.waiting == 0 or admission.running >= capacity  # no permit lies idle
        assert all(times == 1 for times in self.outcomes.values())
        places = sorted(admission.outlook(ticket).ahead for ticket in self.of(Turn.WAITING))
        assert places == list(range(admission.waiting))

    def drain(self) -> None:
        """Ends every call while urgent newcomers keep coming: all who wait get their turn."""
        left = self.of(Turn.WAITING)
        bound = OLDEST_EVERY * (len(left) + 2) + 10 * len(left)
        self.desk.now += 200.0
        while any(ticket.turn is Turn.WAITING for ticket in left):
            bound -= 1
            assert bound > 0, "somebody starves"
            if self.desk.admission.waiting < self.queue:
                self.tickets.append(self.desk.come(INTERACTIVE, f"new{bound}", pool=self.chance.choice("mn")))
            self.desk.now += 0.1
            self.desk.admission.leave(self.of(Turn.RUNNING)[0], tokens=10.0)
            self.check()
        for ticket in self.of(Turn.RUNNING) + self.of(Turn.WAITING):
            self.desk.admission.leave(ticket)
        assert (self.desk.admission.running, self.desk.admission.waiting) == (0, 0)
        assert self.desk.admission._bytes == 0


@pytest.mark.parametrize("block", range(5))
def test_every_schedule_keeps_the_promises(block: int) -> None:
    for seed in range(block * 110, block * 110 + 110):
        Schedule(seed).run(60)


@pytest.mark.soak(minutes=1)
@pytest.mark.timeout(3 * 3600)
def test_ten_thousand_schedules_keep_the_promises() -> None:
    for seed in counted(10_000, "schedules of the queue"):
        Schedule(seed).run(120)
