"""Slots, turns and refusals."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import DeadlineExceeded, QueueFull, QueueTimeout
from forebay.kit.pipeline import Call, Request, Send, stack
from forebay.testing import clock
from forebay.testing.calls import Sink, ask
from forebay.upstream.admission import Admission, Admit, tell_queued


def call(
    caller: str = "", priority: pb.Priority.ValueType = pb.PRIORITY_UNSPECIFIED, **more: object
) -> Call[Request]:
    request = ask()
    request.routing.priority = priority
    return Call(request=request, caller=caller).with_(**more)


class Holder:
    """Takes slots and notes the order."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.order: list[str] = []

    async def hold(self, name: str, held: Call[Request], seconds: float = 1.0) -> None:
        async with self.admission.hold(held):
            self.order.append(name)
            await asyncio.sleep(seconds)


def in_order(admission: Admission, calls: list[tuple[str, Call[Request]]]) -> list[str]:
    async def body() -> list[str]:
        holder = Holder(admission)
        async with asyncio.TaskGroup() as tasks:
            for name, held in calls:
                tasks.create_task(holder.hold(name, held))
        assert (admission.active, admission.waiting) == (0, 0)
        return holder.order

    return clock.run(body())


def test_callers_take_turns() -> None:
    calls = [(f"greedy{n}", call("greedy")) for n in range(4)] + [
        ("a1", call("a")),
        ("b1", call("b")),
        ("a2", call("a")),
    ]
    order = in_order(Admission(name="b", slots=1, queue=10), calls)
    assert order == ["greedy0", "greedy1", "a1", "b1", "greedy2", "a2", "greedy3"]


def test_the_urgent_go_first() -> None:
    calls = [
        ("first", call()),
        ("batch", call(priority=pb.PRIORITY_BATCH)),
        ("normal", call()),
        ("urgent", call(priority=pb.PRIORITY_INTERACTIVE)),
    ]
    assert in_order(Admission(name="b", slots=1, queue=10), calls) == ["first", "urgent", "normal", "batch"]


def test_slots_are_held_at_once_and_no_more() -> None:
    async def body() -> float:
        admission = Admission(name="b", slots=3, queue=100)
        holder = Holder(admission)
        most = 0

        async def watch() -> None:
            nonlocal most
            while admission.active:
                most = max(most, admission.active)
                await asyncio.sleep(0.1)

        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            for n in range(10):
                tasks.create_task(holder.hold(str(n), call()))
            await asyncio.sleep(0)
            tasks.create_task(watch())
        assert most == 3
        assert admission.admitted == 10
        return loop.time()

    assert clock.run(body()) == pytest.approx(4.0, abs=0.2)


def test_a_full_queue_refuses_with_a_time() -> None:
    async def body() -> None:
        admission = Admission(name="b", slots=1, queue=1)
        holder = Holder(admission)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(holder.hold("a", call()))
            tasks.create_task(holder.hold("b", call()))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert repr(admission) == "<Admission b 1/1 queue 1/1>"
            with pytest.raises(QueueFull) as raised:
                await holder.hold("c", call())
            assert raised.value.retry_after is not None
            assert 0.25 <= raised.value.retry_after.total_seconds() <= 60
            assert raised.value.metadata == {"backend": "b", "active": "1", "queued": "1"}
        assert admission.refused == 1

    clock.run(body())


def test_a_wait_ends_at_its_limit_or_at_the_deadline_whichever_is_first() -> None:
    async def body() -> None:
        admission = Admission(name="b", slots=1, queue=5, max_wait=10)
        holder = Holder(admission)
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(holder.hold("a", call(), seconds=100))
            await asyncio.sleep(0)
            with pytest.raises(QueueTimeout):
                await holder.hold("b", call())
            assert loop.time() == 10
            with pytest.raises(DeadlineExceeded):
                await holder.hold("c", call(deadline=loop.time() + 3))
            assert loop.time() == 13
            with pytest.raises(QueueTimeout):
                await holder.hold("d", call(deadline=loop.time() + 30))
        assert (admission.timed_out, admission.waiting, holder.order) == (3, 0, ["a"])

    clock.run(body())


def test_who_leaves_the_queue_frees_its_place_and_who_leaves_a_slot_frees_that() -> None:
    async def body() -> None:
        admission = Admission(name="b", slots=1, queue=5)
        holder = Holder(admission)
        tasks = [asyncio.create_task(holder.hold(name, call(name), seconds=50)) for name in "abc"]
        await asyncio.sleep(1)
        tasks[1].cancel()
        await asyncio.sleep(0)
        assert (admission.waiting, admission.left) == (1, 1)
        tasks[0].cancel()
        await asyncio.sleep(1)
        assert holder.order == ["a", "c"]
        # A slot that was granted to a call that is cancelled before it runs is not lost.
        late = asyncio.create_task(holder.hold("d", call("d")))
        await asyncio.sleep(1)
        tasks[2].cancel()
        await asyncio.sleep(0)
        late.cancel()
        await asyncio.gather(*tasks, late, return_exceptions=True)
        assert (admission.active, admission.waiting) == (0, 0)

    clock.run(body())


def test_places_are_told_first_and_whenever_they_change() -> None:
    async def body() -> None:
        admission = Admission(name="b", slots=1, queue=5)
        sinks = [Sink() for _ in range(3)]

        async def inner(_: Call[Request], send: Send) -> None:
            await asyncio.sleep(1)
            await send(pb.GenerateResponse(started=pb.Started()))

        service = stack(Admit.layer(admission), around=inner)
        async with asyncio.TaskGroup() as tasks:
            for sink in sinks:
                tasks.create_task(service(call(), sink))
        places = [
            [
                e.progress.queue_position
                for e in sink.events
                if isinstance(e, pb.GenerateResponse) and e.HasField("progress")
            ]
            for sink in sinks
        ]
        assert places == [[], [0], [1, 0]]
        assert sinks[2].kinds[-1] == "started"

    clock.run(body())


def test_a_unary_call_is_admitted_in_silence() -> None:
    async def body() -> None:
        admission = Admission(name="b", slots=1, queue=5)

        async def inner(_: Call[Request], send: Send) -> None:
            await asyncio.sleep(1)

        service = Admit(inner, admission=admission)
        sink = Sink()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(2):
                tasks.create_task(service(Call(request=pb.EmbedRequest(texts=["a"])), sink))
        assert sink.events == []

    clock.run(body())


def test_more_slots_are_given_at_once_and_fewer_as_calls_end() -> None:
    async def body() -> None:
        admission = Admission(name="b", slots=1, queue=5)
        holder = Holder(admission)
        async with asyncio.TaskGroup() as tasks:
            for n in range(4):
                tasks.create_task(holder.hold(str(n), call(), seconds=10))
            await asyncio.sleep(1)
            admission.resize(3)
            assert (admission.slots, admission.active, admission.waiting) == (3, 3, 1)
            admission.resize(1)
            await asyncio.sleep(9.5)  # the first has ended, and two still hold the one slot
            assert (admission.active, admission.waiting) == (2, 1)
        assert len(holder.order) == 4
        with pytest.raises(ValueError, match="at least 1"):
            admission.resize(0)

    clock.run(body())


def test_the_wait_is_told_to_who_holds() -> None:
    async def body() -> None:
        admission = Admission(name="b", slots=1, queue=5)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(Holder(admission).hold("a", call(), seconds=4))
            await asyncio.sleep(1)
            async with admission.hold(call(), tell_queued(Sink())) as waited:
                assert waited == pytest.approx(3)

    clock.run(body())


@pytest.mark.parametrize(("slots", "queue"), [(0, 1), (1, -1)])
def test_numbers_that_make_no_sense_are_refused(slots: int, queue: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        Admission(name="b", slots=slots, queue=queue)


def test_a_teller_that_fails_gives_its_place_back() -> None:
    async def body() -> None:
        admission = Admission(name="b", slots=1, queue=5)

        async def gone(_: int) -> None:
            raise ConnectionError

        tell: Callable[[int], Awaitable[None]] = gone
        async with admission.hold(call()):
            with pytest.raises(ConnectionError):
                async with admission.hold(call(), tell):
                    pass
            assert (admission.waiting, admission.left) == (0, 0)

    clock.run(body())
