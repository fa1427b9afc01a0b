"""Sends calls for embeddings of several callers to a backend as one, while it is busy with earlier ones.

A text takes an embedding model about as long as the call around it, and a
batch of texts hardly longer than one. Whoever comes alone is served at once;
while calls are in flight those that come wait a few milliseconds for each other.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

from opentelemetry import trace

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import BrokenStream, Draining, Failure, Fault, Internal
from forebay.kit.pipeline import Call, Event, Request, Send, Service, Serving
from forebay.orchestrator.layers.coalesce import Spawn


class Gather:
    """Puts small calls for embeddings together, and gives each caller the answer to their own.

    Only calls that differ in nothing but their texts go together. What is
    wrong with one of them costs the others nothing: it is then asked again by
    itself.

    Args:
        inner: serves a call.
        spawn: starts tasks that no call owns.
        window: how long a call waits for others.
        max_texts: most texts in a call to `inner`. A larger call goes by itself.
        on_gathered: told how many calls went together, for metrics.
    """

    def __init__(
        self,
        inner: Service,
        *,
        spawn: Spawn,
        window: timedelta,
        max_texts: int,
        on_gathered: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._inner = inner
        self._spawn = spawn
        self._window = window.total_seconds()
        self._max_texts = max_texts
        self._on_gathered = on_gathered
        self._lanes: dict[bytes, _Lane] = {}

    def __repr__(self) -> str:
        return f"<Gather {len(self._lanes)} lanes>"

    def __call__(self, call: Call[Request], send: Send) -> Serving:
        """Serves a call.

        Raises:
            Draining: the orchestrator stopped before the answer.
            Failure: as the layers below say.
        """
        request = call.request
        if isinstance(request, pb.EmbedRequest) and len(request.texts) < self._max_texts:
            return self._serve(call, request, send)
        return self._inner(call, send)

    async def _serve(self, call: Call[Request], request: pb.EmbedRequest, send: Send) -> None:
        key = _key(call, request)
        lane = self._lanes.get(key)
        if lane is None:  # nothing like it is in flight, so there is nobody to wait for
            lane = self._lanes[key] = _Lane(running=1)
            try:
                await self._inner(call, send)
            finally:
                self._done(key, lane)
            return
        group = lane.group
        if group is None or group.text_count + len(request.texts) > self._max_texts:
            group = lane.group = _Group()
            lane.running += 1
            group.task = self._spawn(self._run(key, lane, group), f"embeddings {call.request_id}")
            # A task that is cancelled before its first step never reaches its own end.
            group.task.add_done_callback(functools.partial(self._end, key, lane, group))
        member = group.join(call, request)
        try:
            answer = await member.answer
        except asyncio.CancelledError:
            group.leave(member)
            raise
        trace.get_current_span().add_event("forebay.gathered", {"forebay.calls": group.call_count})
        if isinstance(answer, Failure):
            raise answer
        if answer is None:
            await self._inner(call, send)
        else:
            await send(answer)

    async def _run(self, key: bytes, lane: _Lane, group: _Group) -> None:
        await asyncio.sleep(self._window)
        if lane.group is group:
            lane.group = None  # who comes from here on is of the next one
        members = group.close()
        self._on_gathered(len(members))
        answers: list[pb.EmbedResponse] = []

        async def take(event: Event) -> None:
            assert isinstance(event, pb.EmbedResponse), "only embeddings are gathered"
            answers.append(event)

        try:
            await self._inner(_together(members), take)
            if len(answers) != 1:
                raise BrokenStream(f"a backend sent {len(answers)} answers where one was due")
            group.hand_out(answers[0])
        except Failure as failure:
            group.fail(failure)
        except Exception as error:  # noqa: BLE001  # told to everyone in the group; the edge of each logs it
            fault = Internal(f"{type(error).__name__} in gathered embeddings")
            fault.__cause__ = error
            group.fail(fault)

    def _end(self, key: bytes, lane: _Lane, group: _Group, _: asyncio.Task[None]) -> None:
        if lane.group is group:
            lane.group = None
        group.fail(Draining("the orchestrator stops; ask again in a moment"))
        self._done(key, lane)

    def _done(self, key: bytes, lane: _Lane) -> None:
        lane.running -= 1
        if not lane.running:
            del self._lanes[key]


@dataclass(slots=True)
class _Lane:
    """Calls that may go together."""

    running: int
    """Calls in flight or being gathered."""
    group: _Group | None = None
    """The calls that are being gathered now."""


@dataclass(slots=True, eq=False)
class _Member:
    """One caller's part of a group."""

    call: Call[Request]
    request: pb.EmbedRequest
    answer: asyncio.Future[pb.EmbedResponse | Failure | None]
    """None asks the caller's task to ask by itself."""


@dataclass(slots=True, eq=False)
class _Group:
    """Calls that go to a backend as one."""

    task: asyncio.Task[None] = field(init=False)
    text_count: int = 0
    call_count: int = 0
    _members: list[_Member] = field(default_factory=list)

    def join(self, call: Call[Request], request: pb.EmbedRequest) -> _Member:
        """Adds a call."""
        member = _Member(call, request, asyncio.get_running_loop().create_future())
        self._members.append(member)
        self.text_count += len(request.texts)
        self.call_count += 1
        return member

    def leave(self, member: _Member) -> None:
        """Takes a caller out who left. A group that nobody waits for any more is given up."""
        if all(each.answer.done() for each in self._members):
            self.task.cancel()

    def close(self) -> list[_Member]:
        """Returns who is in the group. Who left before is not."""
        self._members = [member for member in self._members if not member.answer.done()]
        self.call_count = len(self._members)
        return self._members

    def hand_out(self, whole: pb.EmbedResponse) -> None:
        """Gives everyone the answer to their own texts.

        Raises:
            BrokenStream: there are not as many embeddings as texts.
        """
        if len(whole.embeddings) != sum(len(member.request.texts) for member in self._members):
            raise BrokenStream(
                f"a backend sent {len(whole.embeddings)} embeddings for another number of texts",
                metadata={"backend": whole.backend},
            )
        frame = pb.EmbedResponse()
        frame.CopyFrom(whole)
        for name in ("embeddings", "failures", "usage"):
            frame.ClearField(name)
        begin = 0
        for member in self._members:
            end = begin + len(member.request.texts)
            answer = _part(frame, whole, begin, end)
            # Alone it gets the failure that a call of its own would have got.
            is_whole = member.request.allow_partial or not answer.failures
            _settle(member, answer if is_whole else None)
            begin = end

    def fail(self, failure: Failure) -> None:
        """Tells everyone who has no answer yet, or has them ask alone where one of them may be the cause."""
        may_be_one = len(self._members) > 1 and failure.fault is Fault.CALLER
        for member in self._members:
            _settle(member, None if may_be_one else failure.own())


def _settle(member: _Member, answer: pb.EmbedResponse | Failure | None) -> None:
    if not member.answer.done():  # the caller may have left
        member.answer.set_result(answer)


def _key(call: Call[Request], request: pb.EmbedRequest) -> bytes:
    """Returns what two calls must have in common to go together."""
    frame = pb.EmbedRequest()
    frame.CopyFrom(request)
    for name in ("texts", "request_id", "allow_partial"):
        frame.ClearField(name)
    frame.routing.ClearField("cache")  # decided above
    return call.urgency.name.encode() + b" " + frame.SerializeToString(deterministic=True)


def _together(members: list[_Member]) -> Call[Request]:
    """Returns the call that asks for everybody's texts."""
    first = members[0]
    if len(members) == 1:
        return first.call
    request = pb.EmbedRequest()
    request.CopyFrom(first.request)
    for member in members[1:]:
        request.texts.extend(member.request.texts)
    request.allow_partial = True
    deadlines = [member.call.deadline for member in members]
    callers = {member.call.caller for member in members}
    return first.call.with_(
        request=request,
        # As long as anybody waits; each caller's own deadline ends only their part in it.
        deadline=None if None in deadlines else max(each for each in deadlines if each is not None),
        caller=first.call.caller if len(callers) == 1 else "",
    )


def _part(frame: pb.EmbedResponse, whole: pb.EmbedResponse, begin: int, end: int) -> pb.EmbedResponse:
    """Returns a part of an answer as an answer."""
    answer = pb.EmbedResponse()
    answer.CopyFrom(frame)
    answer.embeddings.extend(whole.embeddings[begin:end])
    for failure in whole.failures:
        if begin <= failure.index < end:
            answer.failures.add(index=failure.index - begin, reason=failure.reason, message=failure.message)
    if begin == 0 and end == len(whole.embeddings):
        answer.usage.CopyFrom(whole.usage)
        return answer
    counts = [embedding.token_count for embedding in answer.embeddings]
    if all(counts):  # else the tokens of a part are not known, and a guess would pass for a count
        answer.usage.prompt_token_count = sum(counts)
    return answer
