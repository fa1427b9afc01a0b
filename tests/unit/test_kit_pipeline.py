"""Calls, stacks, and the kit's layers put together as the services put them."""

import asyncio
import dataclasses
from datetime import timedelta

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import Failure, StreamStalled
from forebay.kit.layers.limit import Limit
from forebay.kit.layers.measure import Ending, Measure, Outcome
from forebay.kit.layers.watchdog import Watchdog
from forebay.kit.pipeline import Call, Layer, Request, Send, Service, Urgency, stack
from forebay.testing import clock, grammar
from forebay.testing.calls import Sink, ask, serve, with_options
from forebay.testing.scripted import Chaos, ScriptedEngine


def test_the_first_layer_listed_sees_a_call_first() -> None:
    order: list[str] = []

    def named(name: str) -> Layer:
        def layer(inner: Service) -> Service:
            async def service(call: Call[Request], send: Send) -> None:
                order.append(name)
                await inner(call, send)

            return service

        return layer

    clock.run(serve(stack(named("a"), named("b"), around=ScriptedEngine().service), ask()))
    assert order == ["a", "b"]


def test_a_call_is_changed_only_as_a_copy() -> None:
    call = Call(request=ask(), request_id="1")
    changed = call.with_(tried=frozenset({"mlx"}))
    assert (call.tried, changed.tried) == (frozenset(), frozenset({"mlx"}))
    assert changed.request is call.request
    with pytest.raises(dataclasses.FrozenInstanceError):
        call.tried = frozenset()  # type: ignore[misc]  # that is what is tested


def test_a_call_makes_up_an_identifier() -> None:
    assert Call(request=ask()).request_id != Call(request=ask()).request_id


@clock.virtual
async def test_the_time_left_is_counted_on_the_loops_clock_and_never_negative() -> None:
    call = Call(request=ask(), deadline=10.0)
    assert call.remaining() == 10.0
    await asyncio.sleep(4)
    assert call.remaining() == 6.0
    await asyncio.sleep(60)
    assert call.remaining() == 0.0
    assert Call(request=ask()).remaining() is None


@pytest.mark.parametrize(
    ("priority", "urgency"),
    [
        (pb.PRIORITY_UNSPECIFIED, Urgency.NORMAL),
        (pb.PRIORITY_INTERACTIVE, Urgency.INTERACTIVE),
        (pb.PRIORITY_BATCH, Urgency.BATCH),
    ],
)
def test_priority_decides_urgency(priority: pb.Priority.ValueType, urgency: Urgency) -> None:
    request = pb.EmbedRequest(routing=pb.RoutingHints(priority=priority))
    assert Call(request=request).urgency is urgency


def test_counting_tokens_is_always_urgent() -> None:
    request = pb.CountTokensRequest(routing=pb.RoutingHints(priority=pb.PRIORITY_BATCH))
    assert Call(request=request).urgency is Urgency.INTERACTIVE


def endpoint(engine: ScriptedEngine, outcomes: list[Outcome]) -> Service:
    """The order the orchestrator has: limit, measure, watchdog."""
    return stack(
        lambda inner: Limit(inner, slots=2, queue=100),
        lambda inner: Measure(inner, record=outcomes.append),
        lambda inner: Watchdog(inner, first_event=timedelta(seconds=20), between_events=timedelta(seconds=5)),
        around=engine.service,
    )


def test_a_stall_frees_the_slot_and_is_measured() -> None:
    engine = ScriptedEngine()
    outcomes: list[Outcome] = []
    service = endpoint(engine, outcomes)

    async def body() -> None:
        for _ in range(3):
            with pytest.raises(StreamStalled):
                await serve(service, with_options(ask(), fault="STALL@2"))

    clock.run(body())
    assert [type(outcome.failure) for outcome in outcomes] == [StreamStalled] * 3
    assert [outcome.duration for outcome in outcomes] == [5.0] * 3
    assert repr(service) == "<Limit 0/2 queue 0/100>"


def test_waiting_for_a_slot_is_not_measured() -> None:
    outcomes: list[Outcome] = []
    service = endpoint(ScriptedEngine(), outcomes)

    async def body() -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(6):
                tasks.create_task(serve(service, with_options(ask(), first_delay="10s")))

    clock.run(body())
    assert [outcome.duration for outcome in outcomes] == [10.0] * 6


@pytest.mark.parametrize("seed", range(25))
def test_every_call_ends_once_and_holds_nothing_whatever_goes_wrong(seed: int) -> None:
    faults = ("UNAVAILABLE", "CRASH", "STALL", "TRUNCATE", "BACKEND_BUSY")
    engine = ScriptedEngine(chaos=Chaos(seed=seed, rate=0.6, faults=faults))
    outcomes: list[Outcome] = []
    service = endpoint(engine, outcomes)
    texts: list[str] = []

    async def one(number: int) -> None:
        sink = Sink(delay=0.01 if number % 4 == 0 else 0.0)
        request = with_options(ask(f"number {number}"), first_delay="0.5s", token_delay="0.1s")
        try:
            async with asyncio.timeout(2 if number % 5 == 0 else None):
                await serve(service, request, sink=sink)
        except* (Failure, TimeoutError, Exception):
            pass
        whole = engine.expected(ask(f"number {number}"))
        assert whole.startswith(sink.text)
        grammar.check(sink.events, complete=False, numbered=False)
        texts.append(sink.text)

    async def body() -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(20):
                tasks.create_task(one(number))

    clock.run(body())
    assert len(texts) == 20
    assert engine.active == []
    assert repr(service) == "<Limit 0/2 queue 0/100>"
    assert len(outcomes) == len(engine.records)
    assert {outcome.ending for outcome in outcomes} <= set(Ending)
