"""Passes a call on to another Forebay service, and names whatever goes wrong on the way.

The front of the MLX service hands calls to its workers and the orchestrator
hands them to backends; both owe their callers the same: the deadline and the
trace go along, no event is lost, repeated or reordered unnoticed, a lost peer
is a failure whose name says whether a reply was cut, and no call is left
behind. Leaving a grpc.aio stream does not end it: the peer goes on generating
until somebody cancels, so every path out of here cancels.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeAlias, TypeVar

import grpc
import grpc.aio
from grpc_status import rpc_status
from opentelemetry import context as otel_context
from opentelemetry import propagate

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import (
    BackendUnavailable,
    BrokenStream,
    Failure,
    StreamInterrupted,
    from_rpc_error,
    from_status,
)
from forebay.kit.pipeline import Call, Request, Send
from forebay.kit.rpc import CALLER_KEY

Q = TypeVar("Q")
A = TypeVar("A")

Pairs: TypeAlias = Sequence[tuple[str, str]]
"""Metadata to send along: names in lower case, and values."""

_LOST = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
    }
)
"""Codes that the transport makes up by itself when a connection or a stream breaks."""

_TRANSPORT = (grpc.aio.AioRpcError, grpc.aio.UsageError, grpc.aio.InternalError)
"""What grpc.aio raises for a failed call, for a closed channel, and for a batch it could not run."""


async def relay_generate(
    method: grpc.aio.UnaryStreamMultiCallable[pb.GenerateRequest, pb.GenerateResponse],
    request: pb.GenerateRequest,
    call: Call[pb.GenerateRequest],
    send: Send,
    backend: str,
    *,
    metadata: Pairs = (),
) -> None:
    """Forwards a call to a peer's `Generate`, and its events to `send`.

    Args:
        method: the peer's `Generate`.
        request: what to ask; the call's request, or a changed copy of it.
        call: gives the deadline.
        send: takes the events as they come.
        backend: name of the peer, for messages and metadata of failures.
        metadata: what to send along, besides the trace and who asks.

    Raises:
        BackendUnavailable: the peer was lost before its first delta.
        StreamInterrupted: it was lost later; what was sent is a prefix.
        BrokenStream: an event is missing, repeated or out of order, or the stream ended too soon.
        Failure: what the peer raised.
    """
    expected = 0
    committed = finished = False
    try:
        stream = method(request, timeout=call.remaining(), metadata=_metadata(call, metadata))
    except grpc.aio.UsageError as error:  # the channel is closed
        raise failure_of(error, backend, committed=False) from error
    try:
        while True:
            try:
                event = await stream.read()
            except _TRANSPORT as error:
                if finished:  # the reply is whole; how its connection ended is of no use to anyone
                    return
                raise failure_of(error, backend, committed=committed) from error
            except asyncio.CancelledError as error:
                if is_cancelled_here():
                    raise
                if finished:
                    return
                raise lost(backend, "its connection was closed", committed=committed) from error
            if not isinstance(event, pb.GenerateResponse):  # the end of the stream, with status OK
                break
            if finished or event.sequence != expected:
                raise BrokenStream(
                    f"backend {backend}: event {event.sequence} came where "
                    f"{'the end' if finished else expected} was due",
                    metadata={"backend": backend, "expected": str(expected), "got": str(event.sequence)},
                )
            expected += 1
            kind = event.WhichOneof("event")
            finished = kind == "finished"
            committed = committed or finished or kind == "delta"
            await send(event)
    finally:
        stream.cancel()
    if not finished:
        raise BrokenStream(
            f"backend {backend}: the stream ended after {expected} events without being finished",
            metadata={"backend": backend},
        )


async def relay_unary(
    method: grpc.aio.UnaryUnaryMultiCallable[Q, A],
    request: Q,
    call: Call[Request] | None,
    backend: str,
    *,
    metadata: Pairs = (),
) -> A:
    """Forwards a call to a unary method of a peer and returns the answer.

    Args:
        method: the peer's method.
        request: what to ask.
        call: gives the deadline. None has none.
        backend: name of the peer, for messages and metadata of failures.
        metadata: what to send along, besides the trace and who asks.

    Raises:
        BackendUnavailable: the peer was lost.
        Failure: what the peer raised.
    """
    timeout = None if call is None else call.remaining()
    try:
        pending = method(request, timeout=timeout, metadata=_metadata(call, metadata))
    except grpc.aio.UsageError as error:  # the channel is closed
        raise failure_of(error, backend, committed=False) from error
    try:
        return await pending
    except _TRANSPORT as error:
        raise failure_of(error, backend, committed=False) from error
    except asyncio.CancelledError as error:
        if is_cancelled_here():
            raise
        raise lost(backend, "its connection was closed", committed=False) from error
    finally:
        pending.cancel()


def failure_of(error: BaseException, backend: str, *, committed: bool) -> Failure:
    """Returns the failure behind an error of grpc.aio.

    Args:
        error: what a call raised.
        backend: name of the peer.
        committed: whether part of a reply was passed on. A lost peer is then no longer a
            reason to try again, for the caller has read half an answer.
    """
    if not isinstance(error, grpc.aio.AioRpcError):
        return lost(backend, "its connection is closed", committed=committed)
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]  # it has all that is read of a `grpc.Call`
    except ValueError:  # the status in the trailers contradicts the call's: trust the call
        status = None
    named = None if status is None else from_status(status)
    failure = from_rpc_error(error, backend=backend)
    if not committed:
        return failure
    if named is None and error.code() in _LOST:
        return lost(backend, failure.message, committed=True)
    if failure.code is grpc.StatusCode.UNAVAILABLE:
        return lost(backend, failure.message, committed=True, cause=failure.reason)
    return failure


def lost(backend: str, how: str, *, committed: bool, cause: str = "") -> Failure:
    """Returns the failure that a lost peer is: retryable before part of a reply was sent, and not after."""
    metadata = {"backend": backend} | ({"cause": cause} if cause else {})
    if committed:
        return StreamInterrupted(
            f"backend {backend} was lost in the middle of the reply: {how}", metadata=metadata
        )
    return BackendUnavailable(f"backend {backend} was lost: {how}", metadata=metadata)


def _metadata(call: Call[Request] | None, pairs: Pairs) -> grpc.aio.Metadata:
    trace: dict[str, str] = {}
    if otel_context.get_current():  # mostly there is none
        propagate.inject(trace)
    caller = [] if call is None or not call.caller else [(CALLER_KEY, _ascii(call.caller))]
    return grpc.aio.Metadata(*pairs, *caller, *trace.items())


def _ascii(text: str) -> str:
    """Returns text as metadata can carry it: gRPC refuses a call for one foreign character."""
    return text.encode("ascii", "replace").decode()


def is_cancelled_here() -> bool:
    """Whether the cancellation being handled was meant for this task.

    A call whose channel is closed under it raises `CancelledError` too. That is a lost peer, not
    a caller that left, and must not pass for one.
    """
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
