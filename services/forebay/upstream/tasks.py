"""A task group for things that run as long as their owner, and end with it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from contextvars import Context
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class OwnedTasks(asyncio.TaskGroup):
    """A `TaskGroup` that cancels its tasks when its block ends, in place of waiting for their ends.

    As in any `TaskGroup`, a task that raises ends the others and the block. What
    the block itself raises comes out as it is, and not in a group.
    """

    def __init__(self) -> None:
        super().__init__()
        self._owned: set[asyncio.Task[Any]] = set()

    def create_task(
        self,
        coro: Generator[Any, None, T]
        | Coroutine[Any, Any, T],  # Any: the type of the standard library's own parameter
        *,
        name: str | None = None,
        context: Context | None = None,
    ) -> asyncio.Task[T]:
        """Starts a task of this group."""
        task = super().create_task(coro, name=name, context=context)
        self._owned.add(task)
        task.add_done_callback(self._owned.discard)
        return task

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._owned:
            task.cancel()
        if isinstance(error, Exception):
            # A group would hide what the block raised from whoever catches it by its class.
            kind, error, trace = None, None, None
        await super().__aexit__(kind, error, trace)
