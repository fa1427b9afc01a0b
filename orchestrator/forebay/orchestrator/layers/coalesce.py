"""Lets identical calls in flight share one reply."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Literal, Protocol

from opentelemetry import trace

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import Draining, Failure, Internal
from forebay.kit.pipeline import Call, Event, Request, Send, Service, Serving
from forebay.orchestrator import replies

WINDOW = 64
"""Events by which a flight may be ahead of the quickest of those who follow it. One slow client then slows
its backend down as it does without a flight, and two do so only if both are slow."""

LONGEST_LOG = 2**22
"""Bytes of a reply after which nobody can join it any more: it is kept until its last reader is done."""


class Spawn(Protocol):
    """Starts a task that belongs to the orchestrator, and not to a call."""

    def __call__(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        """Starts it."""


class Coalesce:
    """Makes one call of several identical ones, and gives each caller the whole reply.

    Who comes late gets at once what was already said. The reply is made by a
    task of its own, so whoever leaves leaves alone; with the last one it is
    cancelled. Only replies are shared that would be the same anyway.

    Args:
        inner: the service that makes the replies.
        spawn: starts the task of a reply.
        when: `asked` shares what callers allow to be kept, `always` all that is repeatable, `never` nothing.
        longest: deadline of a shared reply; each caller's own deadline ends only their part in it.
        weights: returns what is known of the weights behind a model's name.
        is_shared: whether callers share with each other; if not, each shares with themselves.
        on_join: told of each call that joined another, for metrics.
    """

    def __init__(
        self,
        inner: Service,
        *,
        spawn: Spawn,
        when: Literal["asked", "always", "never"] = "asked",
        longest: timedelta,
        weights: Callable[[str], str] = lambda model: "",
        is_shared: bool = False,
        on_join: Callable[[Call[Request]], None] | None = None,
    ) -> None:
        self._inner = inner
        self._spawn = spawn
        self._when = when
        self._longest = longest.total_seconds()
        self._weights = weights
        self._is_shared = is_shared
        self._on_join = on_join
        self._flights: dict[bytes, _Flight] = {}

    def __repr__(self) -> str:
        return f"<Coalesce {len(self._flights)} flights>"

    def __call__(self, call: Call[Request], send: Send) -> Serving:
        """Serves a call.

        Raises:
            Draining: the orchestrator stopped in the middle of the reply.
        """
        request = call.request
        if isinstance(request, pb.GenerateRequest) and self._may_share(request):
            return self._share(call, request, send)
        return self._inner(call, send)

    async def _share(self, call: Call[Request], request: pb.GenerateRequest, send: Send) -> None:
        # Urgency is part of the key: an urgent call must not wait in a less urgent one's place.
        caller = "" if self._is_shared else f"caller {call.caller}"
        key = replies.reply_key(
            request, caller=f"{call.urgency.name} {caller}", weights=self._weights(request.model)
        )
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight()
            deadline = asyncio.get_running_loop().time() + self._longest
            flight.task = self._spawn(
                self._fly(key, flight, call.with_(deadline=deadline)), f"reply {call.request_id}"
            )
            # A task that is cancelled before its first step never reaches its own end.
            flight.task.add_done_callback(lambda _: self._end(key, flight, _stopped()))
        else:
            trace.get_current_span().add_event("forebay.coalesced", {"forebay.events": len(flight.log)})
            if self._on_join is not None:
                self._on_join(call)
        try:
            await flight.follow(call.request_id, send)
        finally:
            if flight.is_abandoned:
                self._land(key, flight)
                flight.task.cancel()

    def _may_share(self, request: pb.GenerateRequest) -> bool:
        if self._when == "never" or not replies.is_repeatable(request):
            return False
        if self._when == "always":
            return request.routing.cache != pb.CACHE_POLICY_BYPASS
        return replies.is_asked_for(request)

    async def _fly(self, key: bytes, flight: _Flight, call: Call[Request]) -> None:
        failure: Failure | None = _stopped()
        try:
            await self._inner(call, lambda event: self._take(key, flight, event))
            failure = None
        except Failure as error:
            failure = error
        except Exception as error:  # noqa: BLE001  # told to everyone who follows; the edge of each logs it
            failure = Internal(f"{type(error).__name__} in a shared reply")
            failure.__cause__ = error
        finally:
            self._end(key, flight, failure)

    async def _take(self, key: bytes, flight: _Flight, event: Event) -> None:
        assert isinstance(event, pb.GenerateResponse), "only replies are shared"
        flight.add(event)
        if flight.bytes > LONGEST_LOG:
            self._land(key, flight)
        await flight.wait_for_followers()

    def _end(self, key: bytes, flight: _Flight, failure: Failure | None) -> None:
        self._land(key, flight)
        flight.end(failure)

    def _land(self, key: bytes, flight: _Flight) -> None:
        """Lets nobody join any more."""
        if self._flights.get(key) is flight:
            del self._flights[key]


class _Follower:
    """One caller's place in a reply."""

    __slots__ = ("place", "wake")

    def __init__(self) -> None:
        self.place = 0
        self.wake = asyncio.Event()


class _Flight:
    """A reply that several callers read while it is made."""

    task: asyncio.Task[None]

    def __init__(self) -> None:
        self.log: list[pb.GenerateResponse] = []
        self.bytes = 0
        self._followers: dict[_Follower, None] = {}
        self._is_over = False
        self._failure: Failure | None = None
        self._read = asyncio.Event()

    @property
    def is_abandoned(self) -> bool:
        """Whether it goes on and nobody reads it."""
        return not self._followers and not self._is_over

    def add(self, event: pb.GenerateResponse) -> None:
        """Takes the next event of the reply."""
        self.log.append(event)
        self.bytes += event.ByteSize()
        self._wake()

    def end(self, failure: Failure | None) -> None:
        """The reply is over. Only the first end counts."""
        if not self._is_over:
            self._is_over, self._failure = True, failure
            self._wake()

    async def wait_for_followers(self) -> None:
        """Returns when the quickest reader is near."""
        while self._followers and len(self.log) - max(each.place for each in self._followers) > WINDOW:
            self._read.clear()
            await self._read.wait()

    async def follow(self, request_id: str, send: Send) -> None:
        """Sends the reply from its beginning to its end."""
        follower = _Follower()
        self._followers[follower] = None
        try:
            while True:
                while follower.place < len(self.log):
                    event = self.log[follower.place]
                    follower.place += 1
                    self._read.set()
                    # News of a queue or of a load is old by the time it is read later.
                    if event.HasField("progress") and follower.place < len(self.log):
                        continue
                    await send(_own(event, request_id))
                if self._is_over:
                    break
                follower.wake.clear()
                await follower.wake.wait()
        finally:
            del self._followers[follower]
            self._read.set()
        if self._failure is not None:
            raise self._failure.own()

    def _wake(self) -> None:
        for follower in self._followers:
            follower.wake.set()


def _stopped() -> Draining:
    return Draining("the orchestrator stops; ask again in a moment")


def _own(event: pb.GenerateResponse, request_id: str) -> pb.GenerateResponse:
    """Returns a copy, for the edge numbers the events of each stream."""
    mine = pb.GenerateResponse()
    mine.CopyFrom(event)
    if mine.HasField("started"):
        mine.started.request_id = request_id
    return mine
