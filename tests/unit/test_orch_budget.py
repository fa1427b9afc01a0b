"""Waits and budgets: nothing is ever retried beyond them."""

from __future__ import annotations

import random
from datetime import timedelta

import pytest

from forebay.orchestrator.backoff import Backoff
from forebay.orchestrator.budget import RetryBudget


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_waits_double_up_to_the_longest() -> None:
    backoff = Backoff(timedelta(seconds=1), timedelta(seconds=5), jitter=0.0, source=random.Random(0))
    assert [backoff.next() for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert backoff.count == 5
    backoff.reset()
    assert backoff.next() == 1.0


def test_many_waits_stay_at_the_longest() -> None:
    backoff = Backoff(timedelta(seconds=1), timedelta(seconds=5), jitter=0.0, source=random.Random(0))
    assert [backoff.next() for _ in range(2000)][-1] == 5.0


@pytest.mark.parametrize("seed", range(20))
def test_jitter_never_makes_a_wait_longer(seed: int) -> None:
    backoff = Backoff(timedelta(seconds=1), timedelta(seconds=1), jitter=0.5, source=random.Random(seed))
    assert all(0.5 <= backoff.next() <= 1.0 for _ in range(50))


def test_a_quiet_orchestrator_can_retry() -> None:
    budget = RetryBudget(ratio=0.2, per_second=2.0, clock=Clock())
    assert [budget.withdraw() for _ in range(3)] == [True, True, False]


def test_time_refills_the_budget() -> None:
    clock = Clock()
    budget = RetryBudget(ratio=0.2, per_second=2.0, clock=clock)
    while budget.withdraw():
        pass
    clock.now = 0.5
    assert [budget.withdraw() for _ in range(2)] == [True, False]
    clock.now = 100.0
    assert [budget.withdraw() for _ in range(3)] == [True, True, False]


def test_one_call_in_five_earns_a_retry() -> None:
    budget = RetryBudget(ratio=0.2, per_second=0.0, clock=Clock())
    assert not budget.withdraw()
    for _ in range(11):
        budget.deposit()
    assert [budget.withdraw() for _ in range(3)] == [True, True, False]


def test_traffic_of_long_ago_saves_up_a_bounded_number() -> None:
    budget = RetryBudget(ratio=1.0, per_second=0.0, clock=Clock())
    for _ in range(10_000):
        budget.deposit()
    assert sum(budget.withdraw() for _ in range(10_000)) == 100


@pytest.mark.parametrize("seed", range(50))
def test_the_budget_holds_for_any_schedule(seed: int) -> None:
    source = random.Random(seed)
    clock = Clock()
    budget = RetryBudget(ratio=0.2, per_second=10.0, clock=clock)
    calls = allowed = 0
    for _ in range(2000):
        clock.now += source.expovariate(50.0)
        budget.deposit()
        calls += 1
        for _ in range(source.randint(0, 5)):
            allowed += budget.withdraw()
    assert allowed <= 0.2 * calls + 10.0 * (clock.now + 1.0)
