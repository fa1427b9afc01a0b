"""An event loop in which time jumps, so that a test of a 20 s stall takes a millisecond.

Where a real loop would sleep until its next timer, this one moves its clock to
that timer. Where a real loop would sleep for ever, nothing can happen any more
and the test has found a deadlock: that is an error which names the tasks that
wait.

Only what happens inside the loop exists in virtual time. Sockets, pipes,
subprocesses, threads and executors live in real time, so the loop refuses them
with `NotVirtualError` where they are asked for. gRPC does not run here either.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import selectors
import threading
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar, TypeVarTuple

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
P = ParamSpec("P")

_GRACE_STEPS = 16
"""Steps of the loop that tasks get after the test's body, to finish what is already due."""


class DeadlockError(AssertionError):
    """Nothing is due and nothing is ready: the named tasks would wait for ever."""


class LeftoverError(AssertionError):
    """The test ended and tasks that it started are still there."""


class NotVirtualError(RuntimeError):
    """Something was asked of the loop that lives in real time."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock starts at 0 and moves only when nothing is left to do."""

    def __init__(self) -> None:
        self._now = 0.0
        self._home = threading.get_ident()
        super().__init__(_Leap(self))

    def time(self) -> float:
        """Returns the virtual time in seconds."""
        return self._now

    def advance(self, seconds: float | None) -> None:
        """Moves the clock to the next timer. None means that there is no timer.

        Raises:
            DeadlockError: there is no timer.
        """
        if seconds is None:
            waiting = "\n".join(f"  {_describe(task)}" for task in asyncio.all_tasks(self))
            raise DeadlockError(f"nothing is due and nothing is ready at {self._now} s; waiting:\n{waiting}")
        # Whole nanoseconds, the resolution of a loop's clock, keep `time() == 20.3` true after many leaps.
        self._now = round(self._now + seconds, 9)

    def call_soon_threadsafe(
        self,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        """Schedules a callback, from the loop's own thread only."""
        if threading.get_ident() != self._home:
            raise NotVirtualError("another thread called into a virtual loop")
        return super().call_soon_threadsafe(callback, *args, context=context)

    def run_in_executor(self, executor: object, func: object, *args: object) -> NoReturn:
        """Refuses: threads live in real time."""
        raise NotVirtualError("executors live in real time; inject what the thread would do")


class _Leap(selectors.DefaultSelector):
    """A selector that moves the loop's clock instead of sleeping."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def register(self, fileobj: FileDescriptorLike, events: int, data: Any = None) -> selectors.SelectorKey:
        if self.get_map():  # the first one is the loop's own pipe, by which signals wake it
            raise NotVirtualError("sockets and pipes live in real time")
        return super().register(fileobj, events, data)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout != 0:
            self._loop.advance(timeout)
        return ready


def run(body: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine in virtual time and returns its result.

    Raises:
        DeadlockError: the body, or what it waits for, can never go on.
        LeftoverError: the body returned and left tasks behind.
    """

    async def main() -> T:
        result = await body
        own = asyncio.current_task()
        for _ in range(_GRACE_STEPS):
            left = asyncio.all_tasks() - {own}
            if not left:
                return result
            await asyncio.sleep(0)
        raise LeftoverError("tasks are left:\n" + "\n".join(f"  {_describe(task)}" for task in left))

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main())


def virtual(test: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """Makes a plain function of an `async def` test, which runs it in virtual time."""

    @functools.wraps(test)
    def plain(*args: P.args, **kwargs: P.kwargs) -> T:
        return run(test(*args, **kwargs))

    return plain


def now() -> float:
    """Returns the running loop's time in seconds."""
    return asyncio.get_running_loop().time()


def _describe(task: asyncio.Task[Any]) -> str:
    name, where = getattr(task.get_coro(), "__qualname__", "?"), "not begun"
    inner: Any = task.get_coro()
    while (frame := getattr(inner, "cr_frame", None)) is not None:  # down to the await that waits
        where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        inner = inner.cr_await
    return f"{task.get_name()} {name} at {where}"
