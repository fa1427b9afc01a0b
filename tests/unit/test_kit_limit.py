"""Limit: so many at once, so many in line, and a permit never gets lost."""

import asyncio
from datetime import timedelta

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import BackendUnavailable, QueueFull
from forebay.kit.layers.limit import Limit
from forebay.kit.pipeline import Call, Event, Request, Send
from forebay.testing import clock, grammar
from forebay.testing.calls import Sink, ask, message, serve, with_options
from forebay.testing.scripted import Fate, ScriptedEngine

ONE_SECOND = {"first_delay": "1s"}


def slow(priority: pb.Priority.ValueType = pb.PRIORITY_UNSPECIFIED, **options: str) -> pb.GenerateRequest:
    request = with_options(ask(), **(options or ONE_SECOND))
    request.routing.priority = priority
    return request


async def settle() -> None:
    """Lets everything that is due happen."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_no_more_calls_run_at_once_than_there_are_slots() -> None:
    engine = ScriptedEngine()
    limit = Limit(engine.service, slots=3, queue=10)

    async def body() -> float:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(9):
                tasks.create_task(serve(limit, slow()))
        return clock.now()

    assert clock.run(body()) == 3.0
    assert engine.peak == 3
    assert repr(limit) == "<Limit 0/3 queue 0/10>"


def test_a_call_with_a_free_slot_is_told_of_no_queue() -> None:
    sink = clock.run(serve(Limit(ScriptedEngine().service, slots=1, queue=0), ask()))
    grammar.check(sink.events, numbered=False)
    assert "progress" not in sink.kinds


def test_who_waits_is_told_its_place_and_every_step_forward() -> None:
    limit = Limit(ScriptedEngine().service, slots=1, queue=10)

    async def body() -> Sink:
        last = Sink()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(3):
                tasks.create_task(serve(limit, slow()))
            await settle()
            tasks.create_task(serve(limit, slow(), sink=last))
        return last

    last = clock.run(body())
    grammar.check(last.events, numbered=False)
    queued = [e.progress for e in last.events if e.WhichOneof("event") == "progress"]
    assert {p.stage for p in queued} == {pb.Progress.STAGE_QUEUED}
    assert [p.queue_position for p in queued] == [2, 1, 0]


def test_an_urgent_call_goes_first_and_the_others_are_told() -> None:
    order: list[str] = []

    async def inner(call: Call[Request], send: Send) -> None:
        order.append(call.request_id)
        await asyncio.sleep(1)

    limit = Limit(inner, slots=1, queue=10)

    async def body() -> Sink:
        batch = Sink()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(serve(limit, slow(), request_id="running"))
            await settle()
            tasks.create_task(serve(limit, slow(pb.PRIORITY_BATCH), sink=batch, request_id="batch"))
            await settle()
            tasks.create_task(serve(limit, slow(), request_id="normal"))
            tasks.create_task(serve(limit, slow(), request_id="normal too"))
            tasks.create_task(serve(limit, slow(pb.PRIORITY_INTERACTIVE), request_id="interactive"))
            await settle()
            assert repr(limit) == "<Limit 1/1 queue 4/10>"
        return batch

    batch = clock.run(body())
    assert order == ["running", "interactive", "normal", "normal too", "batch"]
    places = [e.progress.queue_position for e in batch.events if e.WhichOneof("event") == "progress"]
    assert places[0] == 0
    assert places[-4:] == [3, 2, 1, 0]


def test_a_full_queue_turns_away_at_once_and_says_when_to_come_back() -> None:
    limit = Limit(ScriptedEngine().service, slots=2, queue=2, name="mlx")

    async def body() -> QueueFull:
        for _ in range(8):  # the limit has seen calls of 4 s
            await serve(limit, slow(first_delay="4s"))
        async with asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(serve(limit, slow(first_delay="4s")))
            await settle()
            since = clock.now()
            with pytest.raises(QueueFull, match="mlx is full: 2 calls run and 2 wait") as refused:
                await serve(limit, slow())
            assert clock.now() == since
        return refused.value

    failure = clock.run(body())
    assert failure.metadata == {"active": "2", "waiting": "2"}
    assert failure.retry_after is not None
    assert timedelta(seconds=6) < failure.retry_after < timedelta(seconds=9)  # two turns of nearly 4 s


def test_without_a_queue_nobody_waits() -> None:
    limit = Limit(ScriptedEngine().service, slots=1, queue=0)

    async def body() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(serve(limit, slow()))
            await settle()
            with pytest.raises(QueueFull):
                await serve(limit, slow())

    clock.run(body())


def test_a_permit_is_held_to_the_last_event_even_for_a_slow_client() -> None:
    limit = Limit(ScriptedEngine().service, slots=1, queue=4)

    async def body() -> list[float]:
        begun: list[float] = []

        async def note(event: Event) -> None:
            begun.append(clock.now())

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(serve(limit, ask(token_count=4), sink=Sink(delay=1)))  # 6 events
            await settle()
            tasks.create_task(limit(Call(request=pb.EmbedRequest(model="scripted", texts=["a"])), note))
        return begun

    assert clock.run(body()) == [6.0]


def test_a_unary_call_waits_without_progress() -> None:
    limit = Limit(ScriptedEngine().service, slots=1, queue=4)

    async def body() -> Sink:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(serve(limit, slow()))
            await settle()
            counted = tasks.create_task(
                serve(limit, pb.CountTokensRequest(model="scripted", messages=[message("a b c")]))
            )
        return counted.result()

    assert clock.run(body()).kinds == ["CountTokensResponse"]


def test_a_failed_call_gives_its_permit_back() -> None:
    limit = Limit(ScriptedEngine().service, slots=1, queue=0)

    async def body() -> None:
        for _ in range(3):
            with pytest.raises(BackendUnavailable):
                await serve(limit, ask(model="fail:UNAVAILABLE@2"))
        await serve(limit, ask())

    clock.run(body())
    assert limit.active == 0


def test_a_waiter_that_leaves_leaves_the_queue_and_the_others_step_up() -> None:
    engine = ScriptedEngine()
    limit = Limit(engine.service, slots=1, queue=4)

    async def body() -> Sink:
        behind = Sink()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(serve(limit, slow()))
            await settle()
            leaver = tasks.create_task(serve(limit, slow()))
            await settle()
            tasks.create_task(serve(limit, slow(), sink=behind))
            await settle()
            leaver.cancel()
            await settle()
            assert limit.waiting == 1
        return behind

    behind = clock.run(body())
    places = [e.progress.queue_position for e in behind.events if e.WhichOneof("event") == "progress"]
    assert places == [1, 0]
    assert [record.fate for record in engine.records] == [Fate.COMPLETED] * 2
    assert limit.active == 0


def test_a_waiter_that_leaves_as_its_turn_comes_passes_the_turn_on() -> None:
    engine = ScriptedEngine()
    limit = Limit(engine.service, slots=1, queue=4)

    async def body() -> None:
        release = asyncio.Event()

        async def inner(call: Call[Request], send: Send) -> None:
            await release.wait()

        blocked = Limit(inner, slots=1, queue=4)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(serve(blocked, ask()))
            await settle()
            leaver = tasks.create_task(serve(blocked, ask()))
            await settle()
            heir = tasks.create_task(serve(blocked, ask()))
            await settle()
            release.set()
            for _ in range(3):  # the holder ends and grants; the leaver has not run yet
                if blocked.waiting == 1:
                    break
                await asyncio.sleep(0)
            leaver.cancel()
            await heir
            assert leaver.cancelled()
        assert repr(blocked) == "<Limit 0/1 queue 0/4>"

    clock.run(body())
    assert limit.active == 0


def test_a_waiter_whose_client_cannot_take_progress_leaves_the_queue() -> None:
    limit = Limit(ScriptedEngine().service, slots=1, queue=4)

    async def body() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(serve(limit, slow()))
            await settle()
            with pytest.raises(ConnectionResetError):
                await serve(limit, slow(), sink=Sink(error=ConnectionResetError()))
            assert limit.waiting == 0

    clock.run(body())
    assert limit.active == 0


@pytest.mark.parametrize("phase", range(60))
def test_cancelling_at_any_step_loses_no_permit(phase: int) -> None:
    engine = ScriptedEngine()
    limit = Limit(engine.service, slots=2, queue=8)

    async def body() -> None:
        async with asyncio.TaskGroup() as tasks:
            calls = [tasks.create_task(serve(limit, slow(token_delay="1ms"))) for _ in range(6)]
            for _ in range(phase):
                await asyncio.sleep(0 if phase % 2 else 0.0007)
            for call in calls[phase % 3 :: 2]:
                call.cancel()
        await serve(limit, ask())

    clock.run(body())
    assert repr(limit) == "<Limit 0/2 queue 0/8>"
    assert engine.active == []


@pytest.mark.parametrize(("slots", "queue"), [(0, 1), (1, -1)])
def test_a_limit_that_lets_nobody_through_is_refused(slots: int, queue: int) -> None:
    with pytest.raises(ValueError, match="slots must be at least 1"):
        Limit(ScriptedEngine().service, slots=slots, queue=queue)
