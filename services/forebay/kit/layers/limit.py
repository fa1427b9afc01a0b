"""How many calls may run at once, and how many may wait.

Plain lists and events instead of a semaphore: the queue is short, a waiter
wants to know its place, and who goes next depends on urgency.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import math
from dataclasses import dataclass, field
from datetime import timedelta

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import QueueFull
from forebay.kit.pipeline import Call, Request, Send, Service

_FIRST_GUESS = 1.0
"""Seconds a call is thought to take before any was seen: short, so that a caller who is turned away
from a fresh service comes back soon."""

_WEIGHT = 0.25
"""Weight of the latest call in the average: four calls after a change, two thirds of it are seen."""


@dataclass(order=True, slots=True)
class _Waiter:
    """One call in the queue, ordered by whose turn comes first."""

    urgency: int
    number: int
    moved: asyncio.Event = field(compare=False, default_factory=asyncio.Event)
    granted: bool = field(compare=False, default=False)


class Limit:
    """Lets a number of calls run and a number of calls wait, the more urgent ones in front.

    A permit is held until the inner service returns, so to the last event. A
    call to `Generate` that has to wait is told its place by `progress` events.

    Args:
        inner: the service to protect.
        slots: most calls at once; at least 1.
        queue: most calls that wait; 0 turns away whatever cannot run at once.
        name: what is full, for the message to people.
    """

    def __init__(self, inner: Service, *, slots: int, queue: int, name: str = "service") -> None:
        if slots < 1 or queue < 0:
            raise ValueError(f"slots must be at least 1 and queue at least 0, not {slots} and {queue}")
        self._inner = inner
        self._name = name
        self.slots = slots
        self.queue = queue
        self.active = 0
        """Calls that run now."""
        self._waiters: list[_Waiter] = []
        self._numbers = itertools.count()
        self._seconds = _FIRST_GUESS

    @property
    def waiting(self) -> int:
        """Calls that wait now."""
        return len(self._waiters)

    def __repr__(self) -> str:
        return f"<Limit {self.active}/{self.slots} queue {self.waiting}/{self.queue}>"

    def resize(self, *, slots: int, queue: int, inner: Service | None = None) -> None:
        """Changes how many calls may run and wait from now on. Those that do, go on.

        Args:
            slots: most calls at once; at least 1.
            queue: most calls that wait.
            inner: what serves the calls that begin to run from now on; None leaves it as it is.
        """
        self.slots, self.queue = slots, queue
        if inner is not None:
            self._inner = inner
        while self._waiters and self.active < self.slots:
            self.active += 1
            self._grant()

    async def __call__(self, call: Call[Request], send: Send) -> None:
        """Serves a call when it is its turn.

        Raises:
            QueueFull: there is no room to wait in.
        """
        if self.active < self.slots:
            self.active += 1
        else:
            await self._wait(call, send)
        clock = asyncio.get_running_loop().time
        since = clock()
        try:
            await self._inner(call, send)
        finally:
            self._seconds += _WEIGHT * (clock() - since - self._seconds)
            self._release()

    async def _wait(self, call: Call[Request], send: Send) -> None:
        """Returns holding a permit."""
        if len(self._waiters) >= self.queue:
            raise self._full()
        waiter = _Waiter(call.urgency, next(self._numbers))
        bisect.insort(self._waiters, waiter)
        self._wake_from(bisect.bisect(self._waiters, waiter))
        told = -1
        try:
            while not waiter.granted:
                waiter.moved.clear()
                place = bisect.bisect_left(self._waiters, waiter)
                if place != told and isinstance(call.request, pb.GenerateRequest):
                    told = place
                    await send(_queued(place))
                else:
                    await waiter.moved.wait()
        except BaseException:
            if waiter.granted:  # the turn came in the moment in which the caller left: it is the next one's
                self._release()
            else:
                place = bisect.bisect_left(self._waiters, waiter)
                del self._waiters[place]
                self._wake_from(place)
            raise

    def _release(self) -> None:
        """Hands a permit to who is next, or keeps it for who comes."""
        if self._waiters and self.active <= self.slots:
            self._grant()
        else:
            self.active -= 1

    def _grant(self) -> None:
        waiter = self._waiters.pop(0)
        waiter.granted = True
        waiter.moved.set()
        self._wake_from(0)

    def _wake_from(self, place: int) -> None:
        for waiter in self._waiters[place:]:
            waiter.moved.set()

    def _full(self) -> QueueFull:
        turns = math.ceil((len(self._waiters) + 1) / self.slots)
        return QueueFull(
            f"{self._name} is full: {self.active} calls run and {self.waiting} wait; try again later",
            metadata={"active": str(self.active), "waiting": str(self.waiting)},
            retry_after=timedelta(seconds=turns * self._seconds),
        )


def _queued(place: int) -> pb.GenerateResponse:
    return pb.GenerateResponse(progress=pb.Progress(stage=pb.Progress.STAGE_QUEUED, queue_position=place))
