"""Virtual time behaves like time, and refuses what cannot live in it."""

import asyncio
import contextvars
import socket
import threading
import time

import pytest

from forebay.testing import clock


def test_time_begins_at_zero_and_leaps_over_sleeps() -> None:
    async def body() -> float:
        assert clock.now() == 0.0
        await asyncio.sleep(3600)
        return clock.now()

    real = time.monotonic()
    assert clock.run(body()) == 3600.0
    assert time.monotonic() - real < 5


def test_timers_fire_in_order_of_their_time() -> None:
    seen: list[tuple[str, float]] = []

    async def after(seconds: float, name: str) -> None:
        await asyncio.sleep(seconds)
        seen.append((name, clock.now()))

    async def body() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(after(0.3, "c"))
            tasks.create_task(after(0.1, "a"))
            tasks.create_task(after(0.2, "b"))

    clock.run(body())
    assert seen == [("a", 0.1), ("b", 0.2), ("c", 0.3)]


def test_many_leaps_do_not_drift() -> None:
    async def body() -> float:
        for _ in range(10_000):
            await asyncio.sleep(0.1)
        return clock.now()

    assert clock.run(body()) == 1000.0


def test_timeouts_are_virtual() -> None:
    async def body() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(20):
                await asyncio.Event().wait()
        return clock.now()

    assert clock.run(body()) == 20.0


def test_deadlock_is_an_error_that_names_who_waits() -> None:
    async def waits_for_ever() -> None:
        await asyncio.Event().wait()

    async def body() -> None:
        await asyncio.sleep(1)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(waits_for_ever(), name="the-stuck-one")

    with pytest.raises(clock.DeadlockError, match=r"at 1.0 s(.|\n)*the-stuck-one .*_for_ever at .*\.py:\d+"):
        clock.run(body())


def test_tasks_left_behind_are_an_error() -> None:
    async def forgotten() -> None:
        await asyncio.sleep(1000)

    async def body() -> None:
        body.keep = asyncio.create_task(forgotten(), name="forgotten-one")  # type: ignore[attr-defined]  # keeps it alive

    with pytest.raises(clock.LeftoverError, match="forgotten-one"):
        clock.run(body())


def test_tasks_that_are_just_ending_are_no_leftovers() -> None:
    async def ending() -> None:
        for _ in range(3):
            await asyncio.sleep(0)

    async def body() -> int:
        body.keep = asyncio.create_task(ending())  # type: ignore[attr-defined]  # keeps it alive
        return 7

    assert clock.run(body()) == 7


def test_what_the_body_raises_comes_out() -> None:
    async def body() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        clock.run(body())


def test_executors_are_refused() -> None:
    async def body() -> None:
        await asyncio.to_thread(time.time)

    with pytest.raises(clock.NotVirtualError, match="executors"):
        clock.run(body())


def test_sockets_are_refused() -> None:
    async def body() -> None:
        with socket.socket() as server:
            server.setblocking(False)
            server.bind(("127.0.0.1", 0))
            server.listen()
            await asyncio.get_running_loop().sock_accept(server)

    with pytest.raises(clock.NotVirtualError, match="sockets"):
        clock.run(body())


def test_calls_from_other_threads_are_refused() -> None:
    refused: list[Exception] = []

    async def body() -> None:
        loop = asyncio.get_running_loop()

        def other() -> None:
            try:
                loop.call_soon_threadsafe(print)
            except clock.NotVirtualError as error:
                refused.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    clock.run(body())
    assert len(refused) == 1


def test_a_threadsafe_call_from_the_loops_thread_is_scheduled_in_its_context() -> None:
    value: contextvars.ContextVar[int] = contextvars.ContextVar("value", default=0)

    async def body() -> int:
        loop = asyncio.get_running_loop()
        seen = loop.create_future()
        context = contextvars.copy_context()
        context.run(value.set, 5)
        loop.call_soon_threadsafe(lambda: seen.set_result(value.get()), context=context)
        return int(await seen)

    assert clock.run(body()) == 5


@clock.virtual
async def test_the_decorator_runs_a_test_in_virtual_time() -> None:
    await asyncio.sleep(100)
    assert clock.now() == 100.0


@pytest.mark.parametrize("seconds", [1, 5])
@clock.virtual
async def test_the_decorator_keeps_fixtures_and_parameters(seconds: int, tmp_path: object) -> None:
    await asyncio.sleep(seconds)
    assert clock.now() == seconds
    assert tmp_path is not None
