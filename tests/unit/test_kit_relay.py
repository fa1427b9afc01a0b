"""Promises of `forebay.kit.relay`, over real channels to a scripted peer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from google.rpc import status_pb2
from grpc_status import rpc_status
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc as rpc
from forebay.kit.failure import (
    BackendUnavailable,
    BrokenStream,
    DeadlineExceeded,
    Draining,
    Failure,
    ModelLoadFailed,
    QueueFull,
    StreamInterrupted,
)
from forebay.kit.pipeline import Call
from forebay.kit.relay import relay_generate, relay_unary

Handler = Callable[[pb.GenerateRequest, grpc.aio.ServicerContext], Awaitable[None]]

STARTED = pb.GenerateResponse(started=pb.Started(backend="peer"))
FINISHED = pb.GenerateResponse(finished=pb.Finished(reason=pb.FINISH_REASON_STOP))


def delta(text: str) -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.Delta(text=text))


def numbered(*events: pb.GenerateResponse) -> list[pb.GenerateResponse]:
    out = []
    for sequence, event in enumerate(events):
        copy = pb.GenerateResponse()
        copy.CopyFrom(event)
        copy.sequence = sequence
        out.append(copy)
    return out


class Peer(rpc.InferenceServiceServicer):
    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.left = asyncio.Event()
        self.metadata: dict[str, str] = {}

    async def Generate(self, request, context):
        self.metadata = dict(context.invocation_metadata())
        try:
            await self.handler(request, context)
        except asyncio.CancelledError:
            self.left.set()
            raise

    async def CountTokens(self, request, context):
        self.metadata = dict(context.invocation_metadata())
        try:
            await self.handler(request, context)
        except asyncio.CancelledError:
            self.left.set()
            raise
        return pb.CountTokensResponse(token_count=7)


class Rig:
    def __init__(self, peer: Peer, channel: grpc.aio.Channel, server: grpc.aio.Server) -> None:
        self.peer, self.channel, self.server = peer, channel, server
        self.stub = rpc.InferenceServiceStub(channel)
        self.sent: list[pb.GenerateResponse] = []
        self.first = asyncio.Event()

    async def send(self, event) -> None:
        self.sent.append(event)
        self.first.set()

    async def generate(self, *, timeout: float | None = None, **more) -> None:
        loop = asyncio.get_running_loop()
        call = Call(
            request=pb.GenerateRequest(model="m"),
            deadline=None if timeout is None else loop.time() + timeout,
            caller="Zo\N{LATIN SMALL LETTER E WITH DIAERESIS}",
        )
        await relay_generate(self.stub.Generate, call.request, call, self.send, "peer", **more)

    async def count(self) -> pb.CountTokensResponse:
        call = Call(request=pb.CountTokensRequest(model="m"))
        return await relay_unary(self.stub.CountTokens, call.request, call, "peer")


@asynccontextmanager
async def rig(handler: Handler) -> AsyncIterator[Rig]:
    server = grpc.aio.server()
    peer = Peer(handler)
    rpc.add_InferenceServiceServicer_to_server(peer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    try:
        yield Rig(peer, channel, server)
    finally:
        await channel.close()
        await server.stop(None)


def writes(*events: pb.GenerateResponse) -> Handler:
    async def handler(request, context):
        for event in events:
            await context.write(event)

    return handler


def writes_then(after: Callable[[grpc.aio.ServicerContext], Awaitable[None]], *events) -> Handler:
    async def handler(request, context):
        for event in events:
            await context.write(event)
        await after(context)

    return handler


async def forever(context) -> None:
    await asyncio.Event().wait()


def fails(failure: Failure):
    async def after(context) -> None:
        await context.abort_with_status(rpc_status.to_status(failure.to_status()))

    return after


def aborts(code: grpc.StatusCode):
    async def after(context) -> None:
        await context.abort(code, "went wrong")

    return after


async def test_events_pass_in_order_and_a_finished_stream_returns():
    async with rig(writes(*numbered(STARTED, delta("a"), delta("b"), FINISHED))) as r:
        await r.generate()
        assert [e.WhichOneof("event") for e in r.sent] == ["started", "delta", "delta", "finished"]


@pytest.mark.parametrize(
    "events",
    [
        [numbered(STARTED, delta("a"), delta("b"), FINISHED)[i] for i in (0, 1, 3)],
        [numbered(STARTED, delta("a"), delta("b"), FINISHED)[i] for i in (0, 1, 1, 2, 3)],
        [numbered(STARTED, delta("a"), delta("b"), FINISHED)[i] for i in (0, 2, 1, 3)],
        numbered(STARTED, FINISHED, FINISHED),
        numbered(STARTED, delta("a")),
        [],
    ],
    ids=["lost", "repeated", "reordered", "after the end", "unfinished", "empty"],
)
async def test_a_stream_that_breaks_the_grammar_is_a_broken_stream(events):
    async with rig(writes(*events)) as r:
        with pytest.raises(BrokenStream) as caught:
            await r.generate()
        assert caught.value.metadata["backend"] == "peer"
        numbers = [e.sequence for e in r.sent]
        assert numbers == list(range(len(numbers)))


async def test_a_failure_of_the_peer_keeps_its_name():
    async with rig(writes_then(fails(QueueFull("full", metadata={"queue": "8"})))) as r:
        with pytest.raises(QueueFull) as caught:
            await r.generate()
        assert caught.value.metadata == {"queue": "8", "backend": "peer"}


async def test_a_named_failure_after_a_delta_keeps_its_name():
    async with rig(writes_then(fails(ModelLoadFailed("no")), *numbered(STARTED, delta("a")))) as r:
        with pytest.raises(ModelLoadFailed):
            await r.generate()


async def test_a_draining_peer_after_a_delta_interrupts_the_stream():
    async with rig(writes_then(fails(Draining("bye")), *numbered(STARTED, delta("a")))) as r:
        with pytest.raises(StreamInterrupted) as caught:
            await r.generate()
        assert caught.value.metadata["cause"] == "DRAINING"


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
async def test_a_peer_lost_before_the_first_delta_is_unavailable(code):
    async with rig(writes_then(aborts(code), *numbered(STARTED))) as r:
        with pytest.raises(BackendUnavailable):
            await r.generate()


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN]
)
async def test_a_peer_lost_after_a_delta_interrupts_the_stream(code):
    async with rig(writes_then(aborts(code), *numbered(STARTED, delta("a")))) as r:
        with pytest.raises(StreamInterrupted):
            await r.generate()
        assert r.sent[-1].delta.text == "a"


async def test_a_connection_lost_after_finished_loses_nothing():
    async with rig(writes_then(aborts(grpc.StatusCode.UNAVAILABLE), *numbered(STARTED, FINISHED))) as r:
        await r.generate()
        assert r.sent[-1].WhichOneof("event") == "finished"


@pytest.mark.parametrize(
    ("events", "kind"),
    [([STARTED], BackendUnavailable), ([STARTED, delta("a")], StreamInterrupted)],
    ids=["before", "after"],
)
async def test_a_channel_closed_under_a_stream_is_a_lost_peer_and_no_cancellation(events, kind):
    async with rig(writes_then(forever, *numbered(*events))) as r:
        task = asyncio.ensure_future(r.generate())
        while len(r.sent) < len(events):
            await asyncio.sleep(0)
        await r.channel.close()
        with pytest.raises(kind):
            await asyncio.wait_for(task, 5)


async def test_a_channel_closed_after_finished_loses_nothing():
    async with rig(writes_then(forever, *numbered(STARTED, FINISHED))) as r:
        task = asyncio.ensure_future(r.generate())
        while len(r.sent) < 2:
            await asyncio.sleep(0)
        await r.channel.close()
        await asyncio.wait_for(task, 5)


async def test_a_closed_channel_is_a_lost_peer():
    async with rig(writes()) as r:
        await r.channel.close()
        with pytest.raises(BackendUnavailable):
            await r.generate()
        with pytest.raises(BackendUnavailable):
            await r.count()


async def test_cancelling_the_caller_cancels_the_peer():
    async with rig(writes_then(forever, *numbered(STARTED, delta("a")))) as r:
        task = asyncio.ensure_future(r.generate())
        await r.first.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(r.peer.left.wait(), 5)


async def test_a_failing_send_cancels_the_peer_and_is_not_renamed():
    class Gone(Exception):
        pass

    async def refuse(event) -> None:
        raise Gone

    async with rig(writes_then(forever, *numbered(STARTED))) as r:
        call = Call(request=pb.GenerateRequest(model="m"))
        with pytest.raises(Gone):
            await relay_generate(r.stub.Generate, call.request, call, refuse, "peer")
        await asyncio.wait_for(r.peer.left.wait(), 5)


async def test_the_deadline_goes_along():
    async with rig(writes_then(forever)) as r:
        with pytest.raises(DeadlineExceeded):
            await r.generate(timeout=0.05)


async def test_the_trace_the_caller_and_metadata_go_along():
    tracer = TracerProvider().get_tracer("test")
    async with rig(writes(*numbered(STARTED, FINISHED))) as r:
        with tracer.start_as_current_span("call") as span:
            await r.generate(metadata=[("x-mine", "1")])
        context = span.get_span_context()
        assert trace.format_trace_id(context.trace_id) in r.peer.metadata["traceparent"]
        assert r.peer.metadata["x-mine"] == "1"
        assert r.peer.metadata["forebay-caller"] == "Zo?"


async def test_a_unary_answer_passes():
    async with rig(writes()) as r:
        assert (await r.count()).token_count == 7


async def test_a_unary_failure_keeps_its_name():
    async with rig(writes_then(fails(QueueFull("full")))) as r:
        with pytest.raises(QueueFull):
            await r.count()


async def test_a_status_that_contradicts_its_trailers_is_classed_by_its_code():
    async def after(context) -> None:
        status = status_pb2.Status(code=5, message="other")
        context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        await context.abort(grpc.StatusCode.UNAVAILABLE, "went wrong")

    async with rig(writes_then(after)) as r:
        with pytest.raises(BackendUnavailable):
            await r.count()


async def test_a_unary_call_without_a_call_has_no_deadline():
    async with rig(writes()) as r:
        answer = await relay_unary(r.stub.CountTokens, pb.CountTokensRequest(model="m"), None, "peer")
        assert answer.token_count == 7


async def test_cancelling_a_unary_caller_cancels_the_peer():
    entered = asyncio.Event()

    async def handler(request, context):
        entered.set()
        await asyncio.Event().wait()

    async with rig(handler) as r:
        task = asyncio.ensure_future(r.count())
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(r.peer.left.wait(), 5)


async def test_a_channel_closed_under_a_unary_call_is_a_lost_peer():
    entered = asyncio.Event()

    async def handler(request, context):
        entered.set()
        await asyncio.Event().wait()

    async with rig(handler) as r:
        task = asyncio.ensure_future(r.count())
        await entered.wait()
        await r.channel.close()
        with pytest.raises(BackendUnavailable):
            await asyncio.wait_for(task, 5)
