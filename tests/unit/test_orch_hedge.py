"""What `Hedge` promises, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import BackendUnavailable, InvalidRequest, NoBackend, StreamInterrupted
from forebay.kit.pipeline import Call, Request, Send
from forebay.orchestrator.budget import RetryBudget
from forebay.orchestrator.config import HedgeSettings
from forebay.orchestrator.layers.hedge import FirstDeltas, Hedge, Race
from forebay.testing import grammar
from forebay.testing.calls import Sink, ask, serve
from forebay.testing.clock import now, virtual

STARTED = pb.GenerateResponse(started=pb.Started(backend="x"))
PROGRESS = pb.GenerateResponse(progress=pb.Progress(stage=pb.Progress.STAGE_PREFILLING))
FINISHED = pb.GenerateResponse(finished=pb.Finished())
Step = pb.GenerateResponse | Exception | float


def delta(text: str) -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.Delta(text=text))


class Backends:
    """What is below: backends in order, each with what it says, fails with, or how long it waits."""

    def __init__(self, **steps: Sequence[Step]) -> None:
        self.steps = steps
        self.seen: list[tuple[str, float]] = []
        self.cancelled: list[tuple[str, float]] = []

    async def __call__(self, call: Call[Request], send: Send) -> None:
        left = [name for name in self.steps if name not in call.tried]
        if not left:
            raise NoBackend("nobody is left")
        name = left[0]
        if call.on_route is not None:
            call.on_route(name)
        self.seen.append((name, now()))
        try:
            for step in self.steps[name]:
                if isinstance(step, float):
                    await asyncio.sleep(step)
                elif isinstance(step, Exception):
                    raise step
                else:
                    await send(step)
        except asyncio.CancelledError:
            self.cancelled.append((name, now()))
            raise


def hedge(inner: Backends, *, budget: float = 10.0, samples: int = 100, **settings: object) -> Hedge:
    times = FirstDeltas()
    for number in range(samples):
        times.note(number / 100)
    made = Hedge(
        inner,
        settings=HedgeSettings.model_validate({"enabled": True, **settings}),
        budget=RetryBudget(ratio=0.0, per_second=budget, clock=now),
        times=times,
        on_race=RACES.append,
    )
    RACES.clear()
    return made


RACES: list[Race] = []


@virtual
async def test_a_slow_call_gets_a_second_attempt_and_the_loser_is_cancelled_at_once() -> None:
    backends = Backends(a=[STARTED, 9.0, delta("a"), FINISHED], b=[STARTED, 1.0, delta("b"), 1.0, FINISHED])
    sink = await serve(hedge(backends), ask())
    assert sink.kinds == ["started", "delta", "finished"]
    assert sink.text == "b"
    assert backends.seen == [("a", 0.0), ("b", 0.95)]
    assert backends.cancelled == [("a", 1.95)]
    assert [Race(backends=("a", "b"), winner="b", wasted=1.95)] == RACES


@virtual
async def test_the_first_may_still_win() -> None:
    backends = Backends(a=[1.0, STARTED, delta("a"), 1.0, FINISHED], b=[STARTED, 9.0, delta("b"), FINISHED])
    sink = await serve(hedge(backends), ask())
    grammar.check(sink.events, numbered=False)
    assert sink.text == "a"
    assert backends.cancelled == [("b", 1.0)]
    assert RACES[0].winner == "a"
    assert RACES[0].wasted == pytest.approx(0.05)


@virtual
async def test_a_call_that_begins_in_time_is_made_once() -> None:
    backends = Backends(a=[0.5, STARTED, delta("a"), 9.0, FINISHED], b=[])
    assert (await serve(hedge(backends), ask())).text == "a"
    assert backends.seen == [("a", 0.0)]
    assert not RACES


@pytest.mark.parametrize("settings", [{"enabled": False}, {"samples": 19}])
@virtual
async def test_it_is_off_unless_switched_on_and_until_enough_is_known(settings: dict[str, int]) -> None:
    backends = Backends(a=[50.0, STARTED, delta("a"), FINISHED], b=[])
    await serve(hedge(backends, **settings), ask())
    assert len(backends.seen) == 1


@virtual
async def test_the_wait_is_the_quantile_and_never_too_short() -> None:
    slow: Sequence[Step] = [9.0, STARTED, delta("a"), FINISHED]
    backends = Backends(a=slow, b=slow)
    await serve(hedge(backends, quantile=0.5), ask())
    assert backends.seen[1] == ("b", 0.5)
    backends, since = Backends(a=slow, b=slow), now()
    await serve(hedge(backends, quantile=0.0, delay_min="200ms"), ask())
    assert backends.seen[1][1] - since == pytest.approx(0.2)


@virtual
async def test_a_second_attempt_is_a_retry_and_may_be_refused() -> None:
    backends = Backends(a=[5.0, STARTED, delta("a"), FINISHED], b=[])
    assert (await serve(hedge(backends, budget=0.0), ask())).text == "a"
    assert len(backends.seen) == 1


@virtual
async def test_a_first_attempt_that_fails_is_told_at_once_so_that_the_next_begins_at_once() -> None:
    with pytest.raises(BackendUnavailable):
        await serve(hedge(Backends(a=[0.1, BackendUnavailable("x")])), ask())
    assert now() == pytest.approx(0.1)


@virtual
async def test_where_one_of_two_fails_the_other_serves() -> None:
    backends = Backends(a=[1.5, BackendUnavailable("x")], b=[2.0, PROGRESS, STARTED, delta("b"), FINISHED])
    sink = await serve(hedge(backends), ask())
    assert sink.kinds == ["progress", "started", "delta", "finished"]
    backends = Backends(
        a=[PROGRESS, 3.0, STARTED, delta("a"), FINISHED], b=[PROGRESS, BackendUnavailable("x")]
    )
    sink = await serve(hedge(backends), ask())
    assert sink.kinds == ["progress", "started", "delta", "finished"]
    assert sink.text == "a"


@virtual
async def test_where_both_fail_the_first_failure_is_told() -> None:
    for second in ([BackendUnavailable("second")], None):
        steps: dict[str, Sequence[Step]] = {"a": [2.0, BackendUnavailable("first")]}
        if second is not None:
            steps["b"] = second
        with pytest.raises(BackendUnavailable, match="first"):
            await serve(hedge(Backends(**steps)), ask())
        assert RACES[0].winner == ""


@virtual
async def test_what_the_caller_did_wrong_ends_both() -> None:
    backends = Backends(a=[2.0, InvalidRequest("x")], b=[9.0])
    with pytest.raises(InvalidRequest):
        await serve(hedge(backends), ask())
    assert backends.cancelled == [("b", 2.0)]


@virtual
async def test_after_the_first_delta_a_failure_is_the_calls() -> None:
    backends = Backends(a=[9.0], b=[STARTED, delta("b"), StreamInterrupted("gone")])
    sink = Sink()
    with pytest.raises(StreamInterrupted):
        await serve(hedge(backends), ask(), sink=sink)
    assert sink.text == "b"


@virtual
async def test_two_that_answer_in_the_same_moment_are_one_answer() -> None:
    backends = Backends(a=[1.95, STARTED, delta("a"), FINISHED], b=[1.0, STARTED, delta("b"), FINISHED])
    sink = await serve(hedge(backends), ask())
    grammar.check(sink.events, numbered=False)
    assert sink.text in {"a", "b"}


@virtual
async def test_a_caller_who_leaves_ends_both() -> None:
    backends = Backends(a=[9.0], b=[9.0])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(2.0):
            await serve(hedge(backends), ask())
    assert sorted(backends.cancelled) == [("a", 2.0), ("b", 2.0)]


@virtual
async def test_a_fault_of_ours_is_raised_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        await serve(hedge(Backends(a=[2.0, ZeroDivisionError()], b=[9.0])), ask())


@virtual
async def test_a_reply_that_is_over_at_once_needs_no_second_attempt() -> None:
    sink = await serve(hedge(Backends(a=[])), ask())
    assert not sink.events
