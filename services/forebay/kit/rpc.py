"""The edge: the only code in a service that sees gRPC.

It gives every call an identity, a deadline and a span, checks the request,
numbers the events, turns a `Failure` into a status and counts calls in flight.
Handlers are coroutines that write, never generators: grpc.aio does not close a
generator whose caller left, so its clean-up would run late and in another task.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast

import grpc
from google.protobuf.message import Message
from grpc_status import rpc_status
from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.trace import SpanKind, Status, StatusCode

from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc
from forebay.kit import genai, metrics, spans, validation
from forebay.kit import telemetry as kit_telemetry
from forebay.kit.condition import Condition
from forebay.kit.engine import InferenceEngine, ModelEngine
from forebay.kit.failure import (
    CallerLeft,
    DeadlineExceeded,
    Draining,
    Failure,
    Fault,
    Internal,
    InvalidRequest,
)
from forebay.kit.pipeline import Call, Event, Request
from forebay.kit.telemetry import Telemetry
from forebay.models.v1 import models_pb2 as models_pb
from forebay.models.v1 import models_pb2_grpc

logger = logging.getLogger(__name__)

CALLER_KEY = "forebay-caller"
"""Metadata key in which one process of the mesh tells the next who asks."""

INFERENCE_SERVICE = "forebay.inference.v1.InferenceService"
MODEL_SERVICE = "forebay.models.v1.ModelService"

RequestT = TypeVar("RequestT", pb.GenerateRequest, pb.EmbedRequest, pb.CountTokensRequest)
AnswerT = TypeVar("AnswerT", bound=Message)

_SILENT = kit_telemetry.off()

_GONE = (grpc.aio.InternalError, grpc.aio.UsageError, asyncio.InvalidStateError)
"""What a write raises when there is nobody to write to any more."""

# The stubs' type for a context names both stacks; only the aio one is ever given.
Context = grpc.aio.ServicerContext[Any, Any]


class InFlight:
    """Counts the calls that are being served, and says when there are none.

    gRPC's own `stop(grace)` would wait for open health watches too, which every
    orchestrator holds on every backend for ever.
    """

    def __init__(self) -> None:
        self._count = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False
        """True once new calls are refused."""

    def __repr__(self) -> str:
        return f"<InFlight {self._count}{' draining' if self.draining else ''}>"

    @property
    def count(self) -> int:
        """Calls being served now."""
        return self._count

    def enter(self) -> None:
        """Counts a call in.

        Raises:
            Draining: the process is stopping.
        """
        if self.draining:
            raise Draining("this service is stopping: ask another one, or again in a moment")
        self._count += 1
        self._idle.clear()

    def leave(self) -> None:
        """Counts a call out."""
        self._count -= 1
        if self._count == 0:
            self._idle.set()

    async def wait_idle(self, timeout: float) -> bool:
        """Waits until no call is served, at most `timeout` seconds; returns whether that came true."""
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


class Edge:
    """What every handler does around its own work.

    Args:
        inflight: counter of this process.
        telemetry: tracer of this process.
    """

    def __init__(self, inflight: InFlight, telemetry: Telemetry | None = None) -> None:
        self.inflight = inflight
        self.condition = Condition()
        self.on_condition: Callable[[], Awaitable[None]] | None = None
        """Told when the condition has changed."""
        self._told = (False, False)
        self._calls = itertools.count()
        self.telemetry = telemetry or kit_telemetry.off()
        self.telemetry.metrics.observe(metrics.ACTIVE, lambda: [(inflight.count, {})])

    @asynccontextmanager
    async def serve(
        self, context: Context, method: str, *, is_routine: bool = False
    ) -> AsyncIterator[trace.Span]:
        """Wraps the work of one call: counts it, traces it and ends it with the right status.

        Args:
            context: the call's context.
            method: full name, such as `forebay.inference.v1.InferenceService/Generate`.
            is_routine: whether the mesh itself calls it every few seconds. It then has a span only where the
                caller traces: a thousand traces of a question nobody asked would hide the others.
        """
        metadata = {
            key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)
        }
        parent = propagate.extract(metadata)
        is_silent = is_routine and not trace.get_current_span(parent).get_span_context().is_valid
        telemetry = _SILENT if is_silent else self.telemetry
        span = telemetry.tracer.start_span(
            method,
            context=parent,
            kind=SpanKind.SERVER,
            attributes={"rpc.system.name": "grpc", "rpc.method": method},
            record_exception=False,
            set_status_on_exception=False,
        )
        token = otel_context.attach(telemetry.attached(trace.set_span_in_context(span, parent)))
        began = time.monotonic()
        status = "OK"
        counted = False
        try:
            try:
                self.inflight.enter()
                counted = True
                yield span
            except Failure as failure:
                raise _left(context) or failure from failure
            except (asyncio.CancelledError, grpc.aio.AbortError):
                raise
            except Exception as error:
                if left := _left(context):
                    raise left from error
                logger.exception("%s failed through a fault of ours", method)
                raise Internal(
                    f"{type(error).__name__} in {method}: a fault of Forebay's own; its log has the details"
                ) from error
        except asyncio.CancelledError:
            # Not an Exception, so the SDK would leave the span without a status.
            status = "DEADLINE_EXCEEDED" if _is_late(context) else "CANCELLED"
            span.set_attribute("error.type", status)
            raise
        except Failure as failure:
            status = failure.code.name
            span.set_attribute("error.type", failure.reason)
            if spans.ending_of(failure).is_error:
                span.set_status(Status(StatusCode.ERROR, failure.reason))
            if isinstance(failure, CallerLeft):
                raise asyncio.CancelledError from failure  # nobody is there to be told more
            await context.abort_with_status(rpc_status.to_status(failure.to_status()))
        finally:
            span.set_attribute("rpc.response.status_code", status)
            span.end()
            self.telemetry.metrics.record(
                metrics.SERVER_CALL,
                time.monotonic() - began,
                {"rpc.method": method, "rpc.response.status_code": status},
            )
            otel_context.detach(token)
            if counted:
                self.inflight.leave()

    @asynccontextmanager
    async def judged(self) -> AsyncIterator[Callable[[bool], Awaitable[None]]]:
        """Takes a call into the condition; gives what is to be told whether it waits for its turn."""
        call = next(self._calls)

        async def waits(is_waiting: bool) -> None:
            if is_waiting:
                self.condition.wait(call)
            else:
                self.condition.go_on(call)
            await self._tell()

        try:
            yield waits
            self.condition.end(failed=False)
        except Failure as failure:
            if failure.fault is Fault.BACKEND:
                self.condition.end(failed=True)
            raise
        finally:
            await waits(False)

    async def _tell(self) -> None:
        now = (self.condition.is_busy, self.condition.is_degraded)
        if now != self._told:
            self._told = now
            if self.on_condition is not None:
                await self.on_condition()


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Serves an engine as `forebay.inference.v1.InferenceService`.

    Args:
        engine: what does the work.
        edge: what is around every call.
        model_required: whether a request must name its model. The orchestrator has a default.
    """

    def __init__(self, engine: InferenceEngine, edge: Edge, *, model_required: bool = True) -> None:
        self._engine = engine
        self._edge = edge
        self._model_required = model_required

    async def Generate(  # type: ignore[override]  # stubs know only generators, see the module's docstring
        self, request: pb.GenerateRequest, context: Context
    ) -> None:
        """Streams a reply."""
        sequence = 0
        is_waiting = False

        async def send(event: Event) -> None:
            nonlocal sequence, is_waiting
            numbered = cast("pb.GenerateResponse", event)
            numbered.sequence = sequence
            sequence += 1
            if is_waiting or numbered.HasField("progress"):
                queued = numbered.progress.stage == pb.Progress.STAGE_QUEUED
                if queued != is_waiting:
                    is_waiting = queued
                    await waits(queued)
            try:  # as in `write`, without another coroutine for each event
                await context.write(numbered)
            except _GONE as error:
                raise CallerLeft("the caller left") from error

        async with (
            self._edge.serve(context, f"{INFERENCE_SERVICE}/Generate") as span,
            self._edge.judged() as waits,
        ):
            call = self._call(request, context, span)
            with genai.served(self._edge.telemetry, span, cast("Call[Request]", call), send) as watched:
                await self._engine.generate(call, watched)

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        """Embeds a batch of texts."""
        async with self._edge.serve(context, f"{INFERENCE_SERVICE}/Embed") as span, self._edge.judged():
            call = self._call(request, context, span)
            with genai.served(self._edge.telemetry, span, cast("Call[Request]", call)) as watched:
                answer = await self._engine.embed(call)
                watched.note(answer)
                return answer

    async def CountTokens(self, request: pb.CountTokensRequest, context: Context) -> pb.CountTokensResponse:
        """Counts the tokens of a conversation."""
        async with self._edge.serve(context, f"{INFERENCE_SERVICE}/CountTokens") as span:
            call = self._call(request, context, span)
            with genai.served(self._edge.telemetry, span, cast("Call[Request]", call)) as watched:
                answer = await self._engine.count_tokens(call)
                watched.note(answer)
                return answer

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """Lists the models that can be served now."""
        async with self._edge.serve(context, f"{INFERENCE_SERVICE}/ListModels", is_routine=True):
            return await self._engine.list_models(request)

    def _call(self, request: RequestT, context: Context, span: trace.Span) -> Call[RequestT]:
        _refuse(validation.violations(request, model_required=self._model_required))
        call = new_call(request, context)
        span.set_attribute("forebay.request.id", call.request_id)
        return call


class ModelServicer(models_pb2_grpc.ModelServiceServicer):
    """Serves an engine as `forebay.models.v1.ModelService`.

    Args:
        models: what does the work.
        edge: what is around every call.
    """

    def __init__(self, models: ModelEngine, edge: Edge) -> None:
        self._models = models
        self._edge = edge

    async def GetModel(
        self, request: models_pb.GetModelRequest, context: Context
    ) -> models_pb.GetModelResponse:
        """Describes one model."""
        async with self._edge.serve(context, f"{MODEL_SERVICE}/GetModel"):
            _require_model(request.model)
            return await self._models.get_model(request)

    async def LoadModel(  # type: ignore[override]  # stubs know only generators
        self, request: models_pb.LoadModelRequest, context: Context
    ) -> None:
        """Loads a model and streams how far it is."""

        async def send(event: models_pb.LoadModelResponse) -> None:
            await write(context, event)

        async with self._edge.serve(context, f"{MODEL_SERVICE}/LoadModel"):
            _require_model(request.model)
            _refuse(validation.load_violations(request))
            await self._models.load_model(request, send)

    async def PullModel(  # type: ignore[override]  # stubs know only generators
        self, request: models_pb.PullModelRequest, context: Context
    ) -> None:
        """Fetches a model and streams how far it is."""

        async def send(event: models_pb.PullModelResponse) -> None:
            await write(context, event)

        async with self._edge.serve(context, f"{MODEL_SERVICE}/PullModel"):
            _require_model(request.model)
            await self._models.pull_model(request, send)

    async def UnloadModel(
        self, request: models_pb.UnloadModelRequest, context: Context
    ) -> models_pb.UnloadModelResponse:
        """Removes a model from memory."""
        async with self._edge.serve(context, f"{MODEL_SERVICE}/UnloadModel"):
            _require_model(request.model)
            return await self._models.unload_model(request)

    async def DeleteModel(
        self, request: models_pb.DeleteModelRequest, context: Context
    ) -> models_pb.DeleteModelResponse:
        """Removes a model from disk."""
        async with self._edge.serve(context, f"{MODEL_SERVICE}/DeleteModel"):
            _require_model(request.model)
            return await self._models.delete_model(request)


def new_call(request: RequestT, context: Context) -> Call[RequestT]:
    """Returns the call that a request and its context make."""
    remaining = cast("float | None", context.time_remaining())  # None without a deadline, whatever stubs say
    deadline = None if remaining is None else asyncio.get_running_loop().time() + remaining
    return Call(
        request=request,
        request_id=request.request_id or str(uuid.uuid4()),
        deadline=deadline,
        caller=caller(context),
    )


def caller(context: Context) -> str:
    """Returns who asks: what the caller proved to be, and within that what they say, else the peer's host.

    A token or a certificate is proof, where the address asks for one; a name in
    `forebay-caller` is not, so it only tells the callers behind one proof apart
    and can never be taken for another one's.
    """
    claimed = proven = ""
    for key, value in context.invocation_metadata() or ():
        if key == CALLER_KEY and isinstance(value, str):
            claimed = value
        elif key == "authorization" and isinstance(value, str):
            proven = f"token:{hashlib.sha256(value.encode()).hexdigest()[:16]}"
    for identity in context.peer_identities() or ():
        proven = f"certificate:{identity.decode('utf-8', 'replace')}"
        break
    if proven:
        return f"{proven}/{claimed}" if claimed else proven
    if claimed:
        return claimed
    kind, _, rest = context.peer().partition(":")
    return f"{kind}:{rest.rpartition(':')[0]}" if kind in {"ipv4", "ipv6"} else kind


async def write(context: Context, event: Message) -> None:
    """Writes an event to the caller, and waits until there is room for the next.

    Raises:
        CallerLeft: there is nobody to write to any more. grpc raises `ExecuteBatchError` in a handler that is
            writing when its caller cancels, and `UsageError` after that; both mean the same.
    """
    try:
        await context.write(event)
    except _GONE as error:
        raise CallerLeft("the caller left") from error


def _left(context: Context) -> Failure | None:
    """Returns the failure to report if the call is over on the caller's side, whatever else went wrong."""
    task = asyncio.current_task()
    # grpc cancels the handler's task before the context says so.
    cancelling = task is not None and task.cancelling() > 0
    if not (cancelling or context.cancelled() or context.done()):
        return None
    if _is_late(context):
        return DeadlineExceeded("the caller's deadline passed")
    return CallerLeft("the caller left")


def _is_late(context: Context) -> bool:
    remaining = cast("float | None", context.time_remaining())  # None without a deadline, whatever stubs say
    return remaining is not None and remaining <= 0


def _refuse(found: Sequence[validation.Violation]) -> None:
    if found:
        raise InvalidRequest(
            "; ".join(f"{path}: {text}" for path, text in found[:3])
            + (f"; and {len(found) - 3} more" if len(found) > 3 else ""),
            violations=found,
        )


def _require_model(model: str) -> None:
    if not model:
        raise InvalidRequest(
            "model: name a model; ListModels lists them", violations=[("model", "name a model")]
        )
