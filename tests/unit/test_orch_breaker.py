"""The breaker's promises, transition by transition."""

from __future__ import annotations

import random
from datetime import timedelta

import pytest

from forebay.kit.failure import (
    BackendBusy,
    BackendUnavailable,
    BreakerOpen,
    Failure,
    InvalidRequest,
    MemoryExhausted,
    ModelLoadFailed,
    ModelNotFound,
    QueueFull,
)
from forebay.orchestrator.config import BreakerSettings
from forebay.orchestrator.fleet.breaker import Breaker, BreakerState
from forebay.orchestrator.fleet.breakers import Breakers

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
HARD, BUSY, FULL, WRONG = BackendUnavailable("x"), BackendBusy("x"), QueueFull("x"), InvalidRequest("x")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock, **settings: object) -> Breaker:
    return Breaker(
        BreakerSettings.model_validate({"jitter": 0, "consecutive_failures": 3, **settings}),
        clock=clock,
        source=random.Random(0),
    )


def call(breaker: Breaker, failure: Failure | None = None) -> None:
    permit = breaker.admit()
    assert permit is not None
    if failure is None:
        permit.succeed()
    else:
        permit.fail(failure)


def opened(clock: Clock, **settings: object) -> Breaker:
    breaker = make(clock, **settings)
    for _ in range(3):
        call(breaker, HARD)
    assert breaker.state is OPEN
    return breaker


def test_a_run_of_hard_failures_opens_it() -> None:
    breaker = make(Clock())
    call(breaker, HARD)
    call(breaker, HARD)
    assert breaker.state is CLOSED
    call(breaker, HARD)
    assert breaker.state is OPEN
    assert breaker.reason == "BACKEND_UNAVAILABLE"
    assert not breaker.can_admit


def test_a_success_ends_the_run() -> None:
    breaker = make(Clock())
    for failure in (HARD, HARD, None, HARD, HARD):
        call(breaker, failure)
    assert breaker.state is CLOSED


def test_what_is_not_the_backends_fault_counts_for_nothing() -> None:
    breaker = make(Clock(), min_samples=1)
    for _ in range(50):
        call(breaker, WRONG)
    assert breaker.state is CLOSED
    assert breaker.success_rate == 1.0


def test_a_call_that_was_broken_off_counts_for_nothing() -> None:
    breaker = make(Clock(), min_samples=1)
    for _ in range(50):
        permit = breaker.admit()
        assert permit is not None
        permit.forget()
    assert breaker.success_rate == 1.0


@pytest.mark.parametrize("busy", [BUSY, FULL, MemoryExhausted("x")])
def test_busy_lowers_the_weight_and_never_ejects(busy: Failure) -> None:
    breaker = make(Clock(), min_samples=1, success_rate=1.0)
    call(breaker)
    for number in range(1, 100):
        call(breaker, busy)
        assert breaker.state is CLOSED
        assert breaker.success_rate == pytest.approx(1 / (1 + number))


def test_among_busy_answers_hard_failures_open_it_as_they_do_alone() -> None:
    breaker = make(Clock(), min_samples=4, success_rate=0.6, consecutive_failures=9)
    for failure in (None, HARD, None):
        call(breaker, failure)
        for _ in range(20):
            call(breaker, BUSY)
    assert breaker.state is CLOSED, "three calls say nothing, however often it was busy"
    call(breaker, HARD)
    assert breaker.state is OPEN
    run = make(Clock(), success_rate=0)
    for failure in (HARD, BUSY, HARD, BUSY, BUSY):
        call(run, failure)
    assert run.state is CLOSED
    call(run, HARD)
    assert run.state is OPEN, "a busy answer in between is no success"


def test_every_other_call_failing_opens_it_by_the_rate() -> None:
    breaker = make(Clock(), min_samples=10, success_rate=0.6)
    for number in range(10):
        call(breaker, HARD if number % 2 else None)
    assert breaker.state is OPEN


def test_the_rate_says_nothing_of_few_calls() -> None:
    breaker = make(Clock(), min_samples=10, success_rate=1.0)
    for _ in range(4):
        call(breaker, HARD)
        call(breaker)
    assert breaker.state is CLOSED


def test_the_window_forgets() -> None:
    clock = Clock()
    breaker = make(clock, min_samples=10, window=30, consecutive_failures=99)
    for failure in (*[HARD] * 8, BUSY):
        call(breaker, failure)
    clock.now = 31.0
    for failure in (HARD, None, None, BUSY):
        call(breaker, failure)
    assert breaker.state is CLOSED
    assert breaker.success_rate == 0.5
    assert repr(breaker) == "<Breaker closed run 0 rate 0.50>"


def test_an_opening_ends_by_the_clock_in_half_open() -> None:
    clock = Clock()
    breaker = opened(clock)
    assert breaker.remaining == timedelta(seconds=1)
    clock.now = 0.99
    assert breaker.state is OPEN
    clock.now = 1.0
    assert breaker.state is HALF_OPEN
    assert breaker.remaining == timedelta(0)


def test_half_open_lets_one_call_through_at_a_time() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now = 1.0
    assert breaker.can_admit
    probe = breaker.admit()
    assert probe is not None
    assert probe.is_probe
    assert breaker.is_probing
    assert not breaker.can_admit
    assert breaker.admit() is None
    probe.succeed()
    assert breaker.state is CLOSED
    assert breaker.reason == ""
    assert breaker.remaining == timedelta(0)


@pytest.mark.parametrize("failure", [HARD, BUSY, FULL])
def test_a_failed_probe_opens_it_for_twice_as_long(failure: Failure) -> None:
    clock = Clock()
    breaker = opened(clock)
    for opening in (2.0, 4.0, 8.0):
        clock.now += breaker.remaining.total_seconds()
        call(breaker, failure)
        assert breaker.state is OPEN
        assert breaker.remaining == timedelta(seconds=opening)


def test_openings_are_bounded_and_begin_anew_after_a_success() -> None:
    clock = Clock()
    breaker = opened(clock, open_max=5)
    for _ in range(6):
        clock.now += breaker.remaining.total_seconds()
        call(breaker, HARD)
    assert breaker.remaining == timedelta(seconds=5)
    clock.now += 5.0
    call(breaker)
    for _ in range(3):
        call(breaker, HARD)
    assert breaker.remaining == timedelta(seconds=1)


@pytest.mark.parametrize("harmless", [WRONG, None])
def test_a_probe_that_says_nothing_leaves_it_half_open_for_the_next(harmless: Failure | None) -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now = 1.0
    probe = breaker.admit()
    assert probe is not None
    if harmless is None:
        probe.forget()
    else:
        probe.fail(harmless)
    assert breaker.state is HALF_OPEN
    assert breaker.can_admit


def test_a_call_from_before_the_opening_does_not_decide_the_probe() -> None:
    clock = Clock()
    breaker = make(clock)
    old = breaker.admit()
    assert old is not None
    for _ in range(3):
        call(breaker, HARD)
    clock.now = 1.0
    old.succeed()
    assert breaker.state is HALF_OPEN


def test_calls_from_before_the_opening_do_not_prolong_it() -> None:
    clock = Clock()
    breaker = make(clock)
    late = [breaker.admit() for _ in range(20)]
    for _ in range(3):
        call(breaker, HARD)
    for permit in late:
        assert permit is not None
        permit.fail(HARD)
    assert breaker.remaining == timedelta(seconds=1)


def test_an_outcome_is_told_once() -> None:
    breaker = make(Clock())
    permit = breaker.admit()
    assert permit is not None
    permit.succeed()
    for _ in range(5):
        permit.fail(HARD)
    assert breaker.state is CLOSED


def test_a_last_resort_is_let_through_an_open_breaker_one_at_a_time() -> None:
    breaker = opened(Clock())
    probe = breaker.admit()
    assert probe is not None
    assert breaker.admit() is None
    probe.succeed()
    assert breaker.state is CLOSED


def test_a_backend_that_came_back_is_tried_at_once() -> None:
    breaker = opened(Clock())
    breaker.heal()
    assert breaker.state is HALF_OPEN
    closed = make(Clock())
    closed.heal()
    assert closed.state is CLOSED


def test_openings_are_jittered_and_only_ever_shortened_by_it() -> None:
    openings = set()
    for seed in range(100):
        clock = Clock()
        breaker = Breaker(BreakerSettings(consecutive_failures=1), clock=clock, source=random.Random(seed))
        call(breaker, HARD)
        openings.add(breaker.remaining.total_seconds())
    assert len(openings) > 90
    assert 0.5 <= min(openings) < 0.6 < 0.9 < max(openings) <= 1.0


def boards(clock: Clock) -> Breakers:
    settings = BreakerSettings.model_validate({"jitter": 0, "consecutive_failures": 2})
    return Breakers("mlx", settings, clock=clock, source=random.Random(0))


def fail(breakers: Breakers, model: str, failure: Failure) -> None:
    with pytest.raises(type(failure)), breakers.admit(model):
        raise failure


def test_a_model_that_cannot_be_loaded_ejects_only_itself() -> None:
    breakers = boards(Clock())
    for _ in range(2):
        fail(breakers, "bad", ModelLoadFailed("x"))
    assert breakers.whole.state is CLOSED
    assert breakers.closed_models() == {"bad"}
    assert [(model, breaker.state) for model, breaker in breakers.not_closed()] == [("bad", OPEN)]
    with breakers.admit("good"):
        pass
    assert breakers.closed_models() == {"bad"}


def served(breakers: Breakers, model: str) -> None:
    with breakers.admit(model):
        pass


def test_a_model_that_fails_beside_one_that_works_ejects_only_itself(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    breakers = boards(clock)
    for _ in range(3):
        fail(breakers, "bad", HARD)
        served(breakers, "good")
    assert breakers.whole.state is CLOSED
    assert breakers.closed_models() == {"bad"}
    clock.now = 1.0
    fail(breakers, "bad", HARD)
    assert breakers.whole.state is CLOSED
    assert breakers.of("bad")[1].remaining == timedelta(seconds=2), "its probe failed"
    assert caplog.messages == ["backend mlx: calls are kept from model bad: they failed: BACKEND_UNAVAILABLE"]
    clock.now = 3.0
    served(breakers, "bad")
    assert breakers.not_closed() == []


def test_where_every_model_fails_the_backend_is_ejected() -> None:
    breakers = boards(Clock())
    served(breakers, "good")  # of the time before
    fail(breakers, "bad", HARD)
    fail(breakers, "good", HARD)
    assert breakers.whole.state is OPEN


def test_who_failed_alone_is_judged_anew_once_the_backend_came_back() -> None:
    breakers = boards(Clock())
    fail(breakers, "bad", HARD)
    served(breakers, "good")
    breakers.heal()
    for _ in range(2):
        fail(breakers, "bad", HARD)
    assert breakers.whole.state is OPEN


def test_what_fails_when_a_models_breaker_is_open_already_opens_it_no_longer() -> None:
    breakers = boards(Clock())
    late = [breakers.admit("bad") for _ in range(20)]
    for each in late:
        each.__enter__()
    fail(breakers, "bad", HARD)
    served(breakers, "good")
    for each in late:
        assert not each.__exit__(BackendUnavailable, HARD, None)
    assert breakers.of("bad")[1].remaining == timedelta(seconds=1)
    assert breakers.whole.state is CLOSED


def test_a_model_that_works_again_is_forgotten() -> None:
    clock = Clock()
    breakers = boards(clock)
    for _ in range(2):
        fail(breakers, "bad", ModelLoadFailed("x"))
    clock.now = 1.0
    assert breakers.closed_models() == frozenset()
    with breakers.admit("bad"), pytest.raises(BreakerOpen, match="is being tried"), breakers.admit("bad"):
        raise AssertionError("not reached")
    assert breakers.not_closed() == []
    assert breakers.of("bad") == (breakers.whole,)


def test_a_refused_call_leaves_no_probe_behind() -> None:
    clock = Clock()
    breakers = boards(clock)
    for _ in range(2):
        fail(breakers, "bad", ModelLoadFailed("x"))
        fail(breakers, "bad", HARD)
    assert breakers.whole.state is OPEN
    clock.now = 1.0
    bad = breakers.of("bad")[1]
    probe = bad.admit()
    with pytest.raises(BreakerOpen), breakers.admit("bad"):
        raise AssertionError("not reached")
    assert probe is not None
    assert not breakers.whole.is_probing


def test_a_second_call_that_failed_with_the_model_counts_too() -> None:
    breakers = boards(Clock())
    slow = breakers.admit("bad")
    slow.__enter__()
    fail(breakers, "bad", ModelLoadFailed("x"))
    fail(breakers, "bad", ModelLoadFailed("x"))
    probe = breakers.of("bad")[1].admit()
    assert probe is not None
    failure = ModelLoadFailed("x")
    assert not slow.__exit__(ModelLoadFailed, failure, None)
    assert breakers.closed_models() == {"bad"}


def test_a_backend_that_came_back_is_tried_with_every_model() -> None:
    breakers = boards(Clock())
    for _ in range(2):
        fail(breakers, "bad", ModelLoadFailed("x"))
        fail(breakers, "good", HARD)
    breakers.heal()
    assert [(model, breaker.state) for model, breaker in breakers.not_closed()] == [
        ("", HALF_OPEN),
        ("bad", HALF_OPEN),
    ]


def test_a_broken_off_call_frees_the_probe() -> None:
    clock = Clock()
    breakers = boards(clock)
    for _ in range(2):
        fail(breakers, "m", HARD)
    clock.now = 1.0
    with pytest.raises(KeyboardInterrupt), breakers.admit("m"):
        raise KeyboardInterrupt
    assert breakers.whole.can_admit


def test_what_the_caller_did_wrong_frees_the_probe_too() -> None:
    clock = Clock()
    breakers = boards(clock)
    for _ in range(2):
        fail(breakers, "m", HARD)
    clock.now = 1.0
    fail(breakers, "m", ModelNotFound("x"))
    assert breakers.whole.state is HALF_OPEN
    assert breakers.whole.can_admit
