"""Tasks beside a block: each has an owner, and none outlives it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeAlias

from forebay.upstream.tasks import OwnedTasks

Stop: TypeAlias = Callable[[], Awaitable[None]]
"""Ends the ticking and returns when the last tick is over."""


@contextmanager
def _ungrouped() -> Iterator[None]:
    """Raises the first exception of a group alone: a call fails for one reason."""
    try:
        yield
    except BaseExceptionGroup as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from first.__cause__


@asynccontextmanager
async def background() -> AsyncIterator[asyncio.TaskGroup]:
    """Gives a group whose tasks are cancelled, and waited for, at the end of the block."""
    with _ungrouped():
        async with OwnedTasks() as group:
            yield group


@asynccontextmanager
async def ticking(every: float, tick: Callable[[], Awaitable[None]]) -> AsyncIterator[Stop]:
    """Calls `tick` every so many seconds during the block, or until it is stopped.

    A tick is never cut off by `Stop`: it may be writing to a stream.
    """
    over = asyncio.Event()

    async def run() -> None:
        while True:
            try:
                async with asyncio.timeout(every):
                    await over.wait()
            except TimeoutError:
                await tick()
            else:
                return

    with _ungrouped():
        async with asyncio.TaskGroup() as group:
            ticker = group.create_task(run())

            async def stop() -> None:
                over.set()
                await ticker

            try:
                yield stop
            finally:
                over.set()
