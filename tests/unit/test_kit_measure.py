"""Measure: every call is told once, with times that are the backend's and not the client's."""

import asyncio

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import BackendUnavailable, CallerLeft
from forebay.kit.layers.measure import Ending, Measure, Outcome
from forebay.kit.pipeline import Call, Request, Send
from forebay.testing import clock
from forebay.testing.calls import Sink, ask, message, serve, with_options
from forebay.testing.scripted import ScriptedCrashError, ScriptedEngine

SLOW = {"first_delay": "2s", "token_delay": "0.5s"}


def measured(request: Request, sink: Sink | None = None, error: type[BaseException] | None = None) -> Outcome:
    outcomes: list[Outcome] = []
    service = Measure(ScriptedEngine().service, record=outcomes.append)

    async def body() -> None:
        if error is None:
            await serve(service, request, sink=sink)
            return
        with pytest.raises(error):
            await serve(service, request, sink=sink)

    clock.run(body())
    assert len(outcomes) == 1
    return outcomes[0]


def test_a_reply_has_its_times_and_its_rate() -> None:
    request = with_options(ask(token_count=5), **SLOW)
    outcome = measured(request)
    assert outcome.ending is Ending.DONE
    assert outcome.failure is None
    assert outcome.call.request == request
    assert outcome.first_delta == 2.0
    assert outcome.generating == 2.0
    assert outcome.duration == 4.0
    assert outcome.token_count == 5
    assert outcome.tokens_per_second == 2.0


def test_waiting_for_a_slow_client_is_left_out() -> None:
    outcome = measured(with_options(ask(token_count=5), **SLOW), Sink(delay=100))
    assert outcome.first_delta == pytest.approx(2.0)
    assert outcome.duration == pytest.approx(4.0)
    assert outcome.tokens_per_second == pytest.approx(2.0)


def test_a_unary_call_has_a_duration_and_no_first_delta() -> None:
    outcome = measured(with_options(pb.EmbedRequest(model="scripted", texts=["a"]), first_delay="3s"))
    assert (outcome.ending, outcome.duration, outcome.first_delta) == (Ending.DONE, 3.0, None)
    assert outcome.tokens_per_second is None
    assert measured(pb.CountTokensRequest(model="scripted", messages=[message("a")])).token_count == 0


def test_one_token_has_no_rate() -> None:
    assert measured(with_options(ask(token_count=1), **SLOW)).tokens_per_second is None


def test_a_failure_is_told_with_what_came_before_it() -> None:
    outcome = measured(with_options(ask(), fault="UNAVAILABLE@3", **SLOW), error=BackendUnavailable)
    assert outcome.ending is Ending.FAILED
    assert isinstance(outcome.failure, BackendUnavailable)
    assert outcome.token_count == 3
    assert outcome.tokens_per_second == 2.0


def test_a_failure_before_any_event_is_told() -> None:
    outcome = measured(ask(model="fail:UNAVAILABLE"), error=BackendUnavailable)
    assert (outcome.ending, outcome.first_delta, outcome.token_count) == (Ending.FAILED, None, 0)


def test_a_crash_is_no_failure() -> None:
    outcome = measured(ask(model="fail:CRASH@1"), error=ScriptedCrashError)
    assert (outcome.ending, outcome.failure) == (Ending.CRASHED, None)


@pytest.mark.parametrize("error", [CallerLeft("gone"), ConnectionResetError("gone")])
def test_a_client_that_cannot_be_reached_is_not_the_backends_failure(error: Exception) -> None:
    outcome = measured(ask(), Sink(error=error, error_at=3), error=type(error))
    assert (outcome.ending, outcome.failure) == (Ending.LEFT, None)


@pytest.mark.parametrize("seconds", [0.5, 2.2, 3.7])
def test_a_cancelled_call_is_told_once_in_every_phase(seconds: float) -> None:
    outcomes: list[Outcome] = []
    service = Measure(ScriptedEngine().service, record=outcomes.append)

    async def body() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(seconds):
                await serve(service, with_options(ask(), **SLOW))

    clock.run(body())
    assert [outcome.ending for outcome in outcomes] == [Ending.LEFT]
    assert outcomes[0].duration == pytest.approx(seconds)


def test_a_call_cancelled_while_the_client_is_slow_is_told_once() -> None:
    outcomes: list[Outcome] = []
    service = Measure(ScriptedEngine().service, record=outcomes.append)

    async def body() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await serve(service, ask(), sink=Sink(delay=100))

    clock.run(body())
    assert [(outcome.ending, outcome.duration) for outcome in outcomes] == [(Ending.LEFT, 0.0)]


def test_tokens_are_counted_by_deltas_where_finished_does_not_say() -> None:
    outcomes: list[Outcome] = []
    ticks = iter(range(100))

    async def inner(call: Call[Request], send: Send) -> None:
        await send(pb.GenerateResponse(started=pb.Started()))
        for count in (3, 4):
            await send(pb.GenerateResponse(delta=pb.Delta(text="x", token_count=count)))
        await send(pb.GenerateResponse(finished=pb.Finished()))

    service = Measure(inner, record=outcomes.append, clock=lambda: float(next(ticks)))
    clock.run(serve(service, ask()))
    assert (outcomes[0].token_count, outcomes[0].first_token_count) == (7, 3)
    assert outcomes[0].tokens_per_second is not None
