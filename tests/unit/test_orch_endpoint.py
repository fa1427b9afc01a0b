"""What is known of a backend, and how a call changes it."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta

import pytest

from forebay.fleet.v1 import fleet_pb2
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import (
    BrokenStream,
    Failure,
    FirstEventTimeout,
    InvalidRequest,
    ModelLoadFailed,
    StreamStalled,
)
from forebay.kit.pipeline import Call, Event, Request, Send
from forebay.kit.telemetry import off
from forebay.orchestrator.config import BackendSettings
from forebay.orchestrator.engine import Engine
from forebay.orchestrator.fleet.endpoint import Endpoint, State
from forebay.orchestrator.fleet.feed import Feed
from forebay.orchestrator.stack import endpoint_stack
from forebay.testing.calls import ask, serve, with_options
from forebay.testing.clock import now, virtual
from forebay.testing.script import Script, ScriptedModel
from forebay.testing.scripted import ScriptedEngine


def endpoint(
    *, aliases: dict[str, str] | None = None, engine: ScriptedEngine | None = None, **settings: object
) -> Endpoint:
    made = Endpoint(
        BackendSettings.model_validate(
            {
                "name": "mlx",
                "address": "127.0.0.1:1",
                "breaker": {"jitter": 0, "consecutive_failures": 2},
                **settings,
            }
        ),
        aliases=aliases or {},
        clock=now,
        source=random.Random(0),
        now=lambda: datetime.fromtimestamp(now(), UTC),
    )
    if engine is not None:
        made.service = endpoint_stack(made, channel=engine.service, clock=now, telemetry=off())
    return made


def up(**fields: object) -> Endpoint:
    made = endpoint(**fields)  # type: ignore[arg-type]  # the same arguments
    made.found_serving()
    made.list_models([pb.Model(id="scripted", backend="inner")])
    return made


async def fail(made: Endpoint, failure: str, times: int = 2) -> None:
    for _ in range(times):
        with pytest.raises(Failure):
            await serve(made, with_options(ask(), fault=failure))


@virtual
async def test_a_backend_is_unreachable_until_it_is_found() -> None:
    made = endpoint()
    assert made.state is State.UNREACHABLE
    assert repr(made) == "<Endpoint mlx UNREACHABLE 0s>"
    made.lose("nothing\nlistens")
    assert made.detail == "nothing listens"
    made.found_serving()
    assert made.state is State.ACTIVE
    assert made.detail == ""


@virtual
async def test_a_state_says_when_it_began() -> None:
    made = endpoint()
    await asyncio.sleep(5)
    made.found_serving()
    await asyncio.sleep(5)
    made.found_serving()
    backend = made.to_proto()
    assert backend.state == fleet_pb2.Backend.STATE_ACTIVE
    assert backend.state_change_time.seconds == 5


@virtual
async def test_a_backend_that_says_so_and_a_drained_one_are_both_draining() -> None:
    made = up()
    made.found_not_serving()
    assert (made.state, made.detail) == (State.DRAINING, "it says that it is not serving")
    assert not made.is_listed
    made.found_serving()
    made.drain()
    assert (made.state, made.detail) == (State.DRAINING, "an operator drained it")
    made.lose("gone")
    assert made.state is State.UNREACHABLE
    made.found_serving()
    assert made.state is State.DRAINING
    made.resume()
    assert made.state is State.ACTIVE
    assert made.is_listed


@virtual
async def test_failing_calls_eject_it_and_a_success_brings_it_back() -> None:
    made = up(engine=ScriptedEngine())
    await fail(made, "UNAVAILABLE")
    assert made.state is State.EJECTED
    assert made.detail == "its calls failed: BACKEND_UNAVAILABLE"
    assert repr(made) == "<Endpoint mlx EJECTED 1s>"
    assert made.to_proto().breakers[0].remaining_duration.seconds == 1
    await asyncio.sleep(1)
    half = made.to_proto().breakers[0]
    assert half.state == fleet_pb2.Breaker.STATE_HALF_OPEN
    await serve(made, ask())
    assert made.state is State.ACTIVE
    backend = made.to_proto()
    assert (backend.succeeded_call_count, backend.failed_call_count) == (1, 2)
    assert not backend.breakers


@virtual
async def test_a_model_that_fails_is_kept_from_routing_alone() -> None:
    made = up(engine=ScriptedEngine())
    await fail(made, ModelLoadFailed.reason)
    assert made.state is State.ACTIVE
    assert made.view().refused_models == {"scripted"}
    assert made.to_proto().breakers[0].model == "scripted"


@virtual
async def test_the_callers_faults_leave_it_alone() -> None:
    made = up(engine=ScriptedEngine())
    await fail(made, InvalidRequest.reason, times=9)
    assert made.state is State.ACTIVE
    assert made.to_proto().failed_call_count == 0


@virtual
async def test_a_backend_that_came_back_is_tried_at_once() -> None:
    made = up(engine=ScriptedEngine())
    await fail(made, "UNAVAILABLE")
    made.lose("restarted")
    made.found_serving()
    assert made.view().can_admit
    assert made.state is State.EJECTED


@virtual
async def test_calls_in_progress_and_in_the_queue_are_counted() -> None:
    engine = ScriptedEngine(models=[ScriptedModel(name="scripted", script=Script(first_delay=1.0))])
    made = up(engine=engine, slots=1, queue=4)
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(serve(made, ask()))
        await asyncio.sleep(0.5)
        assert repr(made) == "<Endpoint mlx ACTIVE 1/1 queue 2>"
        assert engine.peak == 1
        view = made.view()
        assert (view.outstanding, view.slots, view.queue) == (3, 1, 4)
        backend = made.to_proto()
        assert (backend.active_call_count, backend.queued_call_count, backend.slot_count) == (1, 2, 1)
    assert made.view().outstanding == 0


@virtual
async def test_speed_is_averaged() -> None:
    engine = ScriptedEngine(
        models=[ScriptedModel(name="scripted", script=Script(first_delay=1.0, token_delay=0.1))]
    )
    made = up(engine=engine)
    assert repr(made) == "<Endpoint mlx ACTIVE 0>"
    await serve(made, ask())
    backend = made.to_proto()
    assert backend.first_delta_duration.ToTimedelta() == timedelta(seconds=1)
    assert backend.output_tokens_per_second == pytest.approx(10.0)
    await serve(made, with_options(ask(), first_delay="2s"))
    assert made.view().first_delta == pytest.approx(1.3)


@virtual
async def test_a_silent_backend_fails_its_calls_and_is_ejected() -> None:
    made = up(engine=ScriptedEngine(), first_event_timeout="20s", between_events_timeout="5s")
    with pytest.raises(FirstEventTimeout):
        await serve(made, with_options(ask(), fault="STALL@before"))
    assert now() == 20.0
    with pytest.raises(StreamStalled):
        await serve(made, with_options(ask(), fault="STALL@3"))
    assert now() == 25.0
    assert made.state is State.EJECTED


@virtual
async def test_without_limits_silence_is_borne() -> None:
    made = up(engine=ScriptedEngine(), first_event_timeout="0s", between_events_timeout="0s")
    await serve(made, with_options(ask(), first_delay="1h"))
    assert now() == 3600.0


@virtual
async def test_a_call_that_is_cancelled_is_counted_out_and_reaches_the_backend() -> None:
    engine = ScriptedEngine()
    made = up(engine=engine)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(serve(made, with_options(ask(), first_delay="1h")))
        await asyncio.sleep(1)
        task.cancel()
    assert made.view().outstanding == 0
    assert not engine.active
    assert made.state is State.ACTIVE


@virtual
async def test_models_carry_our_name_and_the_operators_aliases() -> None:
    made = endpoint(aliases={"small": "Tiny", "big": "absent"})
    theirs = pb.Model(id="tiny:latest", backend="inner")
    made.list_models([theirs])
    assert made.models == (pb.Model(id="tiny:latest", backend="mlx", aliases=["small"]),)
    assert made.find("small") == made.models[0]
    assert theirs.backend == "inner"


@virtual
async def test_changes_are_told_and_repetitions_are_not() -> None:
    told: list[str] = []
    made = endpoint()
    made._on_change = told.append
    made.list_models([pb.Model(id="a")])
    made.list_models([pb.Model(id="a")])
    assert told == ["mlx"]
    made.fail_to_list("no")
    made.fail_to_list("no")
    assert told == ["mlx"] * 2
    made.found_serving()
    assert made.detail == "its models cannot be listed: no"
    assert made.models
    made.list_models([pb.Model(id="a")])
    assert made.detail == ""


# The feed.


@virtual
async def test_a_watcher_sees_every_backend_once_and_then_what_changes() -> None:
    feed = Feed()
    with feed.watch(["a", "b"]) as watcher:
        assert await watcher.next() == ["a", "b"]
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(watcher.next())
            await asyncio.sleep(1)
            assert not waiting.done()
            feed.publish("b")
        assert waiting.result() == ["b"]


@virtual
async def test_a_slow_watcher_blocks_nobody_and_keeps_one_change_a_backend() -> None:
    feed = Feed()
    with feed.watch([]) as slow, feed.watch([]) as other:
        await slow.next()
        await other.next()
        for _ in range(1000):
            feed.publish("a")
            feed.publish("b")
        assert await slow.next() == ["a", "b"]
        assert await other.next() == ["a", "b"]
        assert len(feed) == 2
    assert len(feed) == 0


# Clients' requests without a model, and unary calls.


async def _two(call: Call[Request], send: Send) -> None:
    for _ in range(2):
        await send(pb.EmbedResponse(model=call.request.model))


async def _one(call: Call[Request], send: Send) -> None:
    answers: dict[type[Request], Event] = {
        pb.EmbedRequest: pb.EmbedResponse(model=call.request.model),
        pb.CountTokensRequest: pb.CountTokensResponse(model=call.request.model),
        pb.GenerateRequest: pb.GenerateResponse(started=pb.Started(model=call.request.model)),
    }
    await send(answers[type(call.request)])


@virtual
async def test_a_request_without_a_model_takes_the_default_or_is_refused() -> None:
    def engine(default: str) -> Engine:
        return Engine(fleet=None, service=_one, default_model=default)  # type: ignore[arg-type]  # not asked

    assert (await engine("m").embed(Call(request=pb.EmbedRequest()))).model == "m"
    assert (await engine("m").count_tokens(Call(request=pb.CountTokensRequest(model="n")))).model == "n"
    sink = await serve(lambda call, send: engine("m").generate(call, send), pb.GenerateRequest())  # type: ignore[arg-type]  # one kind
    assert sink.kinds == ["started"]
    with pytest.raises(InvalidRequest) as caught:
        await engine("").embed(Call(request=pb.EmbedRequest()))
    assert caught.value.violations[0][0] == "model"


@virtual
async def test_a_unary_call_has_one_answer() -> None:
    engine = Engine(fleet=None, service=_two, default_model="m")  # type: ignore[arg-type]  # not asked
    with pytest.raises(BrokenStream):
        await engine.embed(Call(request=pb.EmbedRequest()))
