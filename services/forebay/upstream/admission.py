"""Who may go in, and in which order, where the server behind would let everyone in and stall.

Ollama and llama-server queue without bound and without saying so. Here a call
gets a slot, a place in a bounded queue that it is told of, or a refusal that
says when to come back.

Order: the more urgent first; within an urgency the callers take turns, so that
one who asks a thousand times waits for a thousand turns and everybody else for
one.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Final, TypeAlias

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import DeadlineExceeded, QueueFull, QueueTimeout
from forebay.kit.pipeline import Call, Layer, Request, Send, Service, Urgency

Tell: TypeAlias = Callable[[int], Awaitable[None]]
"""Takes the number of calls that are ahead."""

_HELD_FIRST_GUESS: Final = 5.0  # seconds; a short chat reply on a small machine
_HELD_WEIGHT: Final = 0.2  # of the latest call in the moving average: about the last ten count


class _Waiter:
    """A call in the queue."""

    def __init__(self, urgency: Urgency, caller: str) -> None:
        self.urgency = urgency
        self.caller = caller
        self.news = asyncio.Event()
        self.granted = False
        self.ahead = -1


class Turns:
    """A queue by urgency, and by turns of the callers within. Knows no clock and waits for nothing."""

    def __init__(self) -> None:
        self._lanes: dict[Urgency, OrderedDict[str, deque[_Waiter]]] = {u: OrderedDict() for u in Urgency}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[_Waiter]:
        """Iterates in the order in which the waiters would be taken if no one came or left."""
        for urgency in Urgency:
            turns = deque(deque(waiting) for waiting in self._lanes[urgency].values())
            while turns:
                waiting = turns.popleft()
                yield waiting.popleft()
                if waiting:
                    turns.append(waiting)

    def add(self, waiter: _Waiter) -> None:
        """Puts a waiter at the end of its caller's line."""
        self._lanes[waiter.urgency].setdefault(waiter.caller, deque()).append(waiter)
        self._count += 1

    def take(self) -> _Waiter | None:
        """Removes and returns the next waiter; its caller goes behind the others."""
        for urgency in Urgency:
            lane = self._lanes[urgency]
            if lane:
                caller, waiting = lane.popitem(last=False)
                waiter = waiting.popleft()
                if waiting:
                    lane[caller] = waiting
                self._count -= 1
                return waiter
        return None

    def remove(self, waiter: _Waiter) -> None:
        """Removes a waiter that leaves."""
        lane = self._lanes[waiter.urgency]
        waiting = lane[waiter.caller]
        waiting.remove(waiter)
        if not waiting:
            del lane[waiter.caller]
        self._count -= 1


class Admission:
    """Slots for calls at once, and a bounded queue before them.

    Args:
        name: the backend's name, for messages.
        slots: calls at once; at least 1.
        queue: calls that may wait; 0 refuses whatever cannot begin at once.
        max_wait: seconds a call may wait; None is without end.
    """

    def __init__(self, *, name: str, slots: int, queue: int, max_wait: float | None = None) -> None:
        if slots < 1 or queue < 0:
            raise ValueError("slots must be at least 1 and queue at least 0")
        self._name = name
        self._slots = slots
        self._queue = queue
        self._max_wait = max_wait
        self._turns = Turns()
        self._held_mean = _HELD_FIRST_GUESS
        self.active = 0
        """Calls that hold a slot."""
        self.admitted = 0
        """Calls that got a slot so far."""
        self.refused = 0
        """Calls that found the queue full so far."""
        self.timed_out = 0
        """Calls that waited too long so far."""
        self.left = 0
        """Calls whose callers left the queue so far."""

    def __repr__(self) -> str:
        return f"<Admission {self._name} {self.active}/{self._slots} queue {len(self._turns)}/{self._queue}>"

    @property
    def slots(self) -> int:
        """Calls at once."""
        return self._slots

    @property
    def waiting(self) -> int:
        """Calls in the queue."""
        return len(self._turns)

    def resize(self, slots: int) -> None:
        """Changes the number of slots, as when the server turns out to have another number."""
        if slots < 1:
            raise ValueError("slots must be at least 1")
        self._slots = slots
        self._grant()

    @asynccontextmanager
    async def hold(self, call: Call[Request], tell: Tell | None = None) -> AsyncIterator[float]:
        """Holds a slot for the block; gives the seconds waited for it.

        Args:
            call: what is to be served.
            tell: is told the place in the queue, first and whenever it changes.

        Raises:
            QueueFull: there is no room to wait in.
            QueueTimeout: the wait was longer than `max_wait`.
            DeadlineExceeded: the caller's deadline passed while it waited.
        """
        clock = asyncio.get_running_loop().time
        begin = clock()
        await self._enter(call, tell)
        entered = clock()
        try:
            yield entered - begin
        finally:
            held = clock() - entered
            self._held_mean += _HELD_WEIGHT * (held - self._held_mean)
            self._leave()

    async def _enter(self, call: Call[Request], tell: Tell | None) -> None:
        if self.active < self._slots and not len(self._turns):
            self.active += 1
            self.admitted += 1
            return
        if len(self._turns) >= self._queue:
            self.refused += 1
            raise QueueFull(
                f"{self._name} serves {self.active} calls and {len(self._turns)} wait; no more can",
                metadata={"backend": self._name, "active": str(self.active), "queued": str(len(self._turns))},
                retry_after=self._retry_after(),
            )
        waiter = _Waiter(call.urgency, call.caller)
        self._turns.add(waiter)
        self._announce()
        try:
            await self._wait(call, waiter, tell)
        except BaseException as error:
            if waiter.granted:
                self._leave()
            else:
                self._turns.remove(waiter)
                self._announce()
            if isinstance(error, asyncio.CancelledError):
                self.left += 1
            raise

    async def _wait(self, call: Call[Request], waiter: _Waiter, tell: Tell | None) -> None:
        remaining = call.remaining()
        own_limit = remaining is None or (self._max_wait is not None and self._max_wait < remaining)
        try:
            async with asyncio.timeout(self._max_wait if own_limit else remaining):
                while True:
                    await waiter.news.wait()
                    waiter.news.clear()
                    if waiter.granted:
                        return
                    if tell is not None:
                        await tell(waiter.ahead)
        except TimeoutError as error:
            self.timed_out += 1
            metadata = {"backend": self._name, "queued": str(len(self._turns))}
            if own_limit:
                raise QueueTimeout(
                    f"the call waited {self._max_wait:g} s for its turn on {self._name}",
                    metadata=metadata,
                    retry_after=self._retry_after(),
                ) from error
            raise DeadlineExceeded(
                f"the deadline passed while the call waited for its turn on {self._name}", metadata=metadata
            ) from error

    def _leave(self) -> None:
        self.active -= 1
        self._grant()

    def _grant(self) -> None:
        moved = False
        while self.active < self._slots and (waiter := self._turns.take()) is not None:
            waiter.granted = True
            waiter.news.set()
            self.active += 1
            self.admitted += 1
            moved = True
        if moved:
            self._announce()

    def _announce(self) -> None:
        for ahead, waiter in enumerate(self._turns):
            if waiter.ahead != ahead:
                waiter.ahead = ahead
                waiter.news.set()

    def _retry_after(self) -> timedelta:
        # The queue moves by `slots` calls in the time one is held; one place is free after that.
        return timedelta(seconds=min(60.0, max(0.25, self._held_mean / self._slots)))


def tell_queued(send: Send) -> Tell:
    """Returns what tells a place in the queue as `progress`."""

    async def tell(ahead: int) -> None:
        stage = pb.Progress(stage=pb.Progress.STAGE_QUEUED, queue_position=ahead)
        await send(pb.GenerateResponse(progress=stage))

    return tell


class Admit:
    """Serves a call when it has a slot; tells it its place in the queue until then.

    Args:
        inner: serves the call while it holds its slot.
        admission: the slots.
    """

    def __init__(self, inner: Service, *, admission: Admission) -> None:
        self._inner = inner
        self._admission = admission

    @classmethod
    def layer(cls, admission: Admission) -> Layer:
        """Returns the layer for `stack`."""
        return lambda inner: cls(inner, admission=admission)

    async def __call__(self, call: Call[Request], send: Send) -> None:
        """Serves the call. See `Admission.hold` for what it raises."""
        told = tell_queued(send) if isinstance(call.request, pb.GenerateRequest) else None
        async with self._admission.hold(call, told):
            await self._inner(call, send)
