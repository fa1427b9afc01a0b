"""A request upstream whose slot is counted busy for as long as it is.

LM Studio reads a prompt to its end even if the caller has left. So until the
first byte of a reply, the request is a task of its own: a caller who leaves
then leaves it behind, with its socket and its slot, and it ends itself when
LM Studio begins to answer, which it stops at once when the socket closes.
Later a caller who leaves closes the socket there and then.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TypeAlias

from forebay.kit.failure import Draining
from forebay.upstream.framing import SseEvent
from forebay.upstream.tasks import OwnedTasks

Open: TypeAlias = Callable[[], AbstractAsyncContextManager[AsyncIterator[SseEvent]]]
"""Opens a stream of events."""


@dataclass(slots=True)
class Flight:
    """A reply that has begun. Leaving the block closes its socket and gives its slot back."""

    events: AsyncIterator[SseEvent]
    held: AsyncExitStack

    async def __aenter__(self) -> AsyncIterator[SseEvent]:
        return self.events

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.held.aclose()


async def take_off(tasks: OwnedTasks, held: AsyncExitStack, opening: Open, *, patient: bool = True) -> Flight:
    """Returns a reply when its first event is there.

    Args:
        tasks: owner of requests whose callers left.
        held: what the request holds; it is closed when the request is over, and not before.
        opening: sends the request.
        patient: whether to wait for a server that reads the prompt to its end. False closes the socket
            as soon as the caller leaves.

    Raises:
        UpstreamError: the server refused.
        Failure: it did not answer.
    """
    landed: asyncio.Future[Flight] = asyncio.get_running_loop().create_future()
    begun = asyncio.Event()
    task = tasks.create_task(_open(held, opening, landed, begun))
    try:
        return await asyncio.shield(landed)
    except asyncio.CancelledError:
        if not patient or not begun.is_set():
            task.cancel()
        if not begun.is_set():
            await held.aclose()  # a task that is cancelled before its first step closes nothing
        elif not landed.done():
            landed.cancel()
        elif landed.exception() is None:
            await landed.result().held.aclose()
        raise


async def _open(
    held: AsyncExitStack, opening: Open, landed: asyncio.Future[Flight], begun: asyncio.Event
) -> None:
    begun.set()
    try:
        events = await held.enter_async_context(opening())
        first = await anext(events, None)
    except asyncio.CancelledError:
        await held.aclose()
        if not landed.done():
            landed.set_exception(Draining("the bridge is stopping"))
        raise
    except Exception as error:  # noqa: BLE001  # it is not lost: the caller gets it
        await held.aclose()
        if not landed.done():
            landed.set_exception(error)
            landed.exception()  # the caller may leave before it looks
        return
    if landed.done():
        await held.aclose()
    else:
        landed.set_result(Flight(_from(first, events), held))


async def _from(first: SseEvent | None, rest: AsyncIterator[SseEvent]) -> AsyncIterator[SseEvent]:
    if first is not None:
        yield first
    async for event in rest:
        yield event
