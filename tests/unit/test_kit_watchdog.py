"""Watchdog: silence ends a call, slowness of the client does not, and nothing is left running."""

import asyncio
import contextvars
from datetime import timedelta

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import BackendUnavailable, FirstEventTimeout, StreamStalled
from forebay.kit.layers.watchdog import Watchdog
from forebay.kit.pipeline import Call, Request, Send, Service
from forebay.testing import clock, grammar
from forebay.testing.calls import Sink, ask, serve, with_options
from forebay.testing.scripted import Fate, ScriptedCrashError, ScriptedEngine


def watch(service: Service, first: float | None = 20, between: float | None = 5) -> Watchdog:
    return Watchdog(
        service,
        first_event=None if first is None else timedelta(seconds=first),
        between_events=None if between is None else timedelta(seconds=between),
    )


def test_a_call_that_keeps_talking_is_left_alone() -> None:
    engine = ScriptedEngine()
    request = with_options(ask(), first_delay="19s", token_delay="4s")
    sink = clock.run(serve(watch(engine.service), request))
    grammar.check(sink.events, numbered=False)
    assert sink.text == engine.expected(ask())


@pytest.mark.parametrize(("point", "kinds"), [("before", []), ("0", ["started"])])
def test_silence_before_the_first_delta_is_a_first_event_timeout(point: str, kinds: list[str]) -> None:
    engine = ScriptedEngine()
    sink = Sink()

    async def body() -> None:
        with pytest.raises(FirstEventTimeout, match="silent for 20 s before the answer began") as raised:
            await serve(watch(engine.service), with_options(ask(), fault=f"STALL@{point}"), sink=sink)
        assert clock.now() == 20.0
        assert raised.value.metadata == {"silence_seconds": "20"}
        assert raised.value.elsewhere
        assert engine.active == []

    clock.run(body())
    assert sink.kinds == kinds


def test_silence_after_the_first_delta_is_a_stall() -> None:
    engine = ScriptedEngine()
    sink = Sink()

    async def body() -> None:
        with pytest.raises(StreamStalled, match="silent for 5 s in the middle of the answer") as raised:
            await serve(watch(engine.service), with_options(ask(), fault="STALL@3"), sink=sink)
        assert clock.now() == 5.0
        assert not raised.value.elsewhere
        assert engine.active == []

    clock.run(body())
    assert sink.kinds == ["started", "delta", "delta", "delta"]
    assert engine.records[0].fate is Fate.CANCELLED


@pytest.mark.parametrize(
    ("first", "between", "waited"),
    [(20, 5, 0), (20, 5, 4), (20, 5, 18), (5, 20, 0), (5, 20, 4), (None, 5, 60)],
)
def test_each_limit_is_kept_to_the_second_whenever_the_first_delta_came(
    first: float | None, between: float, waited: float
) -> None:
    engine = ScriptedEngine()

    async def body() -> None:
        request = with_options(ask(), fault="STALL@1", first_delay=f"{waited}s")
        with pytest.raises(StreamStalled, match=f"silent for {between} s"):
            await serve(watch(engine.service, first, between), request)
        assert clock.now() == waited + between

    clock.run(body())


def test_progress_is_a_sign_of_life() -> None:
    request = with_options(ask(), first_delay="90s", progress_delay="19s")
    sink = clock.run(serve(watch(ScriptedEngine().service), request))
    assert sink.kinds.count("progress") == 5


def test_progress_that_ends_is_no_longer_a_sign_of_life() -> None:
    async def inner(call: Call[Request], send: Send) -> None:
        for _ in range(3):
            await asyncio.sleep(10)
            await send(pb.GenerateResponse(progress=pb.Progress(stage=pb.Progress.STAGE_LOADING)))
        await asyncio.Event().wait()

    async def body() -> None:
        with pytest.raises(FirstEventTimeout):
            await serve(watch(inner), ask())
        assert clock.now() == 50.0

    clock.run(body())


def test_a_slow_client_is_not_the_backends_silence() -> None:
    sink = clock.run(serve(watch(ScriptedEngine().service, 1, 1), ask(), sink=Sink(delay=3600)))
    grammar.check(sink.events, numbered=False)


def test_silence_is_counted_afresh_after_a_slow_client() -> None:
    async def body() -> None:
        with pytest.raises(StreamStalled):
            await serve(
                watch(ScriptedEngine().service),
                with_options(ask(), fault="STALL@1"),
                sink=Sink(delay=100),
            )
        assert clock.now() == 205.0  # started and a delta of 100 s each, then 5 s of silence

    clock.run(body())


def test_a_limit_of_none_waits_for_ever() -> None:
    request = with_options(ask(token_count=2), first_delay="10h", token_delay="10h")
    sink = clock.run(serve(watch(ScriptedEngine().service, None, None), request))
    assert sink.kinds[-1] == "finished"


def test_a_unary_call_has_the_first_limit() -> None:
    request = with_options(pb.EmbedRequest(model="scripted", texts=["a"]), first_delay="30s")

    async def body() -> None:
        with pytest.raises(FirstEventTimeout):
            await serve(watch(ScriptedEngine().service), request)
        sink = await serve(watch(ScriptedEngine().service, 31), request)
        assert sink.kinds == ["EmbedResponse"]

    clock.run(body())


def test_the_failure_waits_until_the_service_has_let_go() -> None:
    engine = ScriptedEngine()

    async def body() -> None:
        with pytest.raises(StreamStalled):
            await serve(watch(engine.service), with_options(ask(), fault="STALL@1", unwind_delay="7s"))
        assert clock.now() == 12.0
        assert engine.active == []

    clock.run(body())


def test_what_the_service_makes_of_the_cancellation_does_not_hide_the_silence() -> None:
    async def inner(call: Call[Request], send: Send) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as error:
            raise ConnectionResetError("the stream was cut") from error

    async def body() -> None:
        with pytest.raises(FirstEventTimeout) as raised:
            await serve(watch(inner), ask())
        assert isinstance(raised.value.__cause__, ConnectionResetError)

    clock.run(body())


def test_tasks_of_the_service_are_ended_and_no_group_comes_out() -> None:
    ended: list[str] = []

    async def reader(send: Send) -> None:
        try:
            await send(pb.GenerateResponse(delta=pb.Delta(text="x")))
            await asyncio.Event().wait()
        finally:
            ended.append("reader")

    async def inner(call: Call[Request], send: Send) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(reader(send))
            tasks.create_task(asyncio.Event().wait())

    async def body() -> None:
        with pytest.raises(StreamStalled):
            await serve(watch(inner), ask())

    clock.run(body())
    assert ended == ["reader"]


def test_an_event_that_comes_after_the_alarm_is_not_passed_on() -> None:
    sink = Sink()

    async def inner(call: Call[Request], send: Send) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await send(pb.GenerateResponse(delta=pb.Delta(text="too late")))

    async def body() -> None:
        with pytest.raises(FirstEventTimeout):
            await serve(watch(inner), ask(), sink=sink)

    clock.run(body())
    assert sink.events == []


@pytest.mark.parametrize("seconds", [0, 0.5, 3, 6, 8.5, 30])
def test_a_caller_who_leaves_is_a_cancellation_in_every_phase(seconds: float) -> None:
    engine = ScriptedEngine()
    request = with_options(ask(), load_delay="1s", first_delay="5s", token_delay="1s", fault="STALL@5")

    async def body() -> None:
        call = asyncio.create_task(serve(watch(engine.service, None, None), request))
        await asyncio.sleep(seconds)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert clock.now() == seconds
        assert engine.active == []

    clock.run(body())


def test_a_caller_who_leaves_as_the_alarm_rings_is_a_cancellation() -> None:
    engine = ScriptedEngine()

    async def body() -> None:
        call = asyncio.create_task(serve(watch(engine.service), with_options(ask(), fault="STALL@before")))
        asyncio.get_running_loop().call_later(20, call.cancel)
        with pytest.raises(asyncio.CancelledError):
            await call

    clock.run(body())


def test_a_caller_who_leaves_while_the_client_is_slow_is_a_cancellation() -> None:
    engine = ScriptedEngine()

    async def body() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(4):
                await serve(watch(engine.service, 1, 1), ask(), sink=Sink(delay=10))

    clock.run(body())
    assert engine.records[0].fate is Fate.CANCELLED


def test_failures_and_crashes_of_the_service_come_out_as_they_are() -> None:
    async def body() -> None:
        with pytest.raises(BackendUnavailable):
            await serve(watch(ScriptedEngine().service), ask(model="fail:UNAVAILABLE@2"))
        with pytest.raises(ScriptedCrashError):
            await serve(watch(ScriptedEngine().service), ask(model="fail:CRASH@2"))

    clock.run(body())


def test_a_timeout_of_the_services_own_is_not_ours() -> None:
    async def inner(call: Call[Request], send: Send) -> None:
        async with asyncio.timeout(3):
            await asyncio.Event().wait()

    async def body() -> None:
        with pytest.raises(TimeoutError):
            await serve(watch(inner), ask())
        assert clock.now() == 3.0

    clock.run(body())


def test_the_service_runs_in_the_callers_context() -> None:
    seen: contextvars.ContextVar[str] = contextvars.ContextVar("seen", default="")

    async def inner(call: Call[Request], send: Send) -> None:
        seen.set(seen.get() + " inside")

    async def body() -> str:
        seen.set("outside")
        await watch(inner)(Call(request=ask()), Sink())
        return seen.get()

    assert clock.run(body()) == "outside inside"
