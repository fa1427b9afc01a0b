"""Loads that outlive their callers, watchers that tell, and tasks that end with their owner."""

import asyncio

import pytest

from forebay.kit.failure import BackendUnavailable, Draining, ModelLoadFailed
from forebay.testing import clock
from forebay.upstream.presence import watch_presence
from forebay.upstream.singleflight import Report, SingleFlight
from forebay.upstream.stats import Latency, Stats
from forebay.upstream.tasks import OwnedTasks


def test_eight_callers_make_one_flight_and_all_hear_of_it() -> None:
    async def body() -> None:
        begun = 0

        async def begin(report: Report[str]) -> int:
            nonlocal begun
            begun += 1
            for step in ("one", "two"):
                report(step)
                await asyncio.sleep(1)
            return 7

        async with OwnedTasks() as tasks:
            flights: SingleFlight[str, str, int] = SingleFlight(tasks)
            heard: list[list[str]] = [[] for _ in range(8)]

            def hear(n: int) -> object:
                async def progress(step: str) -> None:
                    heard[n].append(step)

                return progress

            callers = [asyncio.create_task(flights.join("k", begin, progress=hear(n))) for n in range(8)]  # type: ignore[arg-type]  # a coroutine function
            await asyncio.sleep(1.5)
            assert "k" in flights
            late: list[str] = []

            async def progress(step: str) -> None:
                late.append(step)

            assert await flights.join("k", begin, progress=progress) == 7
            assert await asyncio.gather(*callers) == [7] * 8
            assert begun == 1
            assert heard == [["one", "two"]] * 8
            assert late == ["two"]
            assert "k" not in flights
            assert await flights.join("k", begin) == 7
            assert begun == 2

    clock.run(body())


def test_a_flight_goes_on_when_every_caller_left() -> None:
    async def body() -> None:
        done = False

        async def begin(_: Report[str]) -> None:
            nonlocal done
            await asyncio.sleep(10)
            done = True

        async with OwnedTasks() as tasks:
            flights: SingleFlight[str, str, None] = SingleFlight(tasks)
            callers = [asyncio.create_task(flights.join("k", begin)) for _ in range(3)]
            await asyncio.sleep(1)
            for caller in callers:
                caller.cancel()
            await asyncio.gather(*callers, return_exceptions=True)
            await asyncio.sleep(10)
            assert done

    clock.run(body())


def test_a_failure_reaches_every_caller_and_the_next_flight_is_new() -> None:
    async def body() -> None:
        async def begin(_: Report[str]) -> None:
            await asyncio.sleep(1)
            raise ModelLoadFailed("no")

        async def silent(_: str) -> None:
            raise AssertionError

        async with OwnedTasks() as tasks:
            flights: SingleFlight[str, str, None] = SingleFlight(tasks)
            callers = [asyncio.create_task(flights.join("k", begin, progress=silent)) for _ in range(2)]
            results = await asyncio.gather(*callers, return_exceptions=True)
            assert [type(result) for result in results] == [ModelLoadFailed] * 2
            with pytest.raises(ModelLoadFailed):
                await flights.join("k", begin)
            lonely = asyncio.create_task(flights.join("k", begin))
            await asyncio.sleep(0.5)
            lonely.cancel()
            await asyncio.sleep(1)  # it fails with nobody there, and that disturbs nobody
            assert "k" not in flights

    clock.run(body())


def test_a_flight_that_is_ended_with_its_owner_says_so() -> None:
    async def body() -> None:
        async def begin(_: Report[str]) -> None:
            await asyncio.sleep(1000)

        async with OwnedTasks() as tasks:
            caller = asyncio.create_task(SingleFlight[str, str, None](tasks).join("k", begin))
            await asyncio.sleep(1)
        with pytest.raises(Draining):
            await caller

    clock.run(body())


def test_tasks_end_with_their_owner() -> None:
    async def body() -> None:
        ended: list[str] = []

        async def work(name: str) -> None:
            try:
                await asyncio.sleep(1000)
            finally:
                ended.append(name)

        async def own() -> None:
            async with OwnedTasks() as tasks:
                tasks.create_task(work("a"))
                tasks.create_task(work("b"), name="b")
                await asyncio.sleep(1)
                raise KeyError

        with pytest.raises(KeyError):  # it comes out as it is, and in no group
            await own()
        assert sorted(ended) == ["a", "b"]

    clock.run(body())


def test_a_task_that_fails_ends_its_owner_and_a_cancelled_owner_is_cancelled() -> None:
    async def body() -> None:
        async def fail() -> None:
            raise ValueError

        async def own_failing() -> None:
            async with OwnedTasks() as tasks:
                tasks.create_task(fail())
                await asyncio.sleep(1000)

        with pytest.raises(ExceptionGroup) as raised:
            await own_failing()
        assert raised.group_contains(ValueError)

        async def own() -> None:
            async with OwnedTasks() as tasks:
                tasks.create_task(asyncio.sleep(1000))
                await asyncio.sleep(1000)

        owner = asyncio.create_task(own())
        await asyncio.sleep(1)
        owner.cancel()
        with pytest.raises(asyncio.CancelledError):
            await owner

    clock.run(body())


def test_presence_is_told_once_a_change_and_one_lost_probe_is_none() -> None:
    async def body() -> None:
        answers = iter("xx..x.xxyy.")
        told: list[tuple[bool, str]] = []

        async def probe() -> None:
            answer = next(answers, ".")
            if answer != ".":
                raise BackendUnavailable(f"why {answer}")

        async def change(ready: bool, detail: str) -> None:
            told.append((ready, detail))

        task = asyncio.create_task(watch_presence(probe, change, name="b", interval=1, patience=2))
        await asyncio.sleep(20)
        task.cancel()
        assert told == [(False, "why x"), (True, ""), (False, "why x"), (False, "why y"), (True, "")]

    clock.run(body())


def test_quantiles_are_those_of_the_latest_samples() -> None:
    latency = Latency(window=4)
    assert latency.quantile(0.5) is None
    for seconds in (9.0, 1.0, 2.0, 3.0, 4.0):
        latency.add(seconds)
    assert [latency.quantile(q) for q in (0.0, 0.25, 0.5, 0.75, 0.76, 1.0)] == [1, 1, 2, 3, 4, 4]
    assert latency.count == 5


def test_stats_count_outcomes() -> None:
    stats = Stats()
    stats.count("ok")
    stats.count("ok")
    stats.count("QUEUE_FULL")
    stats.first_delta.add(0.5)
    snapshot = stats.snapshot()
    assert (snapshot.outcomes, snapshot.first_delta_median, snapshot.whole_median) == (
        {"ok": 2, "QUEUE_FULL": 1},
        0.5,
        None,
    )
