"""Calls, services and layers: the grammar every stack in Forebay is written in.

A service is given a call and pushes its events to `send`; it has served the
call when it returns. Events are pushed and not yielded because grpc.aio does
not close a generator it abandons: a layer written as a generator learns of a
cancellation in another task, or never. In a coroutine the same task gets
`CancelledError` at its `await`, so `async with` unwinds in order and whatever
a call holds, it holds to its last event and no longer.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from forebay.inference.v1 import inference_pb2 as pb

Request: TypeAlias = pb.GenerateRequest | pb.EmbedRequest | pb.CountTokensRequest
"""What a call can ask for. Each kind has `model`, `routing` and `request_id`."""

Event: TypeAlias = pb.GenerateResponse | pb.EmbedResponse | pb.CountTokensResponse
"""What a call can be answered with. `Embed` and `CountTokens` are streams of one event."""

Request_co = TypeVar("Request_co", bound=Request, covariant=True)

Send: TypeAlias = Callable[[Event], Awaitable[None]]
"""Passes an event towards the client. Returns when there is room for the next one."""


class Urgency(IntEnum):
    """How urgent a call is; lower goes first. Mirrors `Priority` of the proto in sortable order."""

    INTERACTIVE = 0
    NORMAL = 1
    BATCH = 2


_URGENCIES = {
    pb.PRIORITY_INTERACTIVE: Urgency.INTERACTIVE,
    pb.PRIORITY_BATCH: Urgency.BATCH,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """That a call goes on with a reply which another backend began."""

    weights: str
    """Digest of the weights that wrote it so far. Empty is not known."""
    needs_same_weights: bool
    """Whether only those weights may go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[Request_co]):
    """One request on its way through a stack.

    A layer never changes a call; it passes on a changed copy made by `with_`.
    """

    request: Request_co
    """What is asked for."""
    request_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    """Identifies the call in logs, spans and answers."""
    deadline: float | None = None
    """When the caller stops waiting, on the clock of the running loop, in seconds. None is never."""
    caller: str = ""
    """Who asks, for fair turns and isolation: an authenticated name, else the peer's address."""
    tried: frozenset[str] = frozenset()
    """Names of backends that have failed this call, so that the next attempt goes elsewhere."""
    on_route: Callable[[str], None] | None = None
    """Told which backend each attempt goes to, before it goes there."""
    tokens: float = 0.0
    """Tokens that it may need to have read and written, roughly. 0.0 is not known."""
    resumption: Resumption | None = None
    """Set if the request's `continue_from` is part of a reply that the caller has already read."""

    @property
    def urgency(self) -> Urgency:
        """How urgent the call is."""
        if isinstance(self.request, pb.CountTokensRequest):
            return Urgency.INTERACTIVE
        return _URGENCIES.get(self.request.routing.priority, Urgency.NORMAL)

    def remaining(self) -> float | None:
        """Seconds until the deadline, never below 0; None if there is none."""
        if self.deadline is None:
            return None
        return max(0.0, self.deadline - asyncio.get_running_loop().time())

    def with_(self, **changes: object) -> Call[Request_co]:
        """Returns a copy with the named fields changed."""
        # What `dataclasses.replace` does, in a third of its time: a call is copied twice on its way.
        copy = object.__new__(type(self))
        for name in _FIELDS:
            object.__setattr__(copy, name, changes.pop(name) if name in changes else getattr(self, name))
        if changes:
            raise TypeError(f"a call has no {', '.join(changes)}")
        return copy


_FIELDS = Call.__slots__


Serving: TypeAlias = Coroutine[Any, Any, None]
"""A call that is being served. A layer that has nothing to do for it gives on the inner service's own, for
each event wakes every coroutine between the edge and the backend."""


class Service(Protocol):
    """Serves a call, pushing its events to `send`, and returns when it is done.

    Raises:
        forebay.kit.failure.Failure: the call failed; what was sent is a prefix of an answer.
    """

    def __call__(self, call: Call[Request], send: Send) -> Serving:
        """Serves one call."""


Layer: TypeAlias = Callable[[Service], Service]
"""Wraps a service in another that may wait, refuse, repeat or redirect its calls."""


def stack(*layers: Layer, around: Service) -> Service:
    """Wraps `around`; the first layer listed sees a call first."""
    service = around
    for layer in reversed(layers):
        service = layer(service)
    return service
