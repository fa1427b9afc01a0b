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
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import Token
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import grpc
from google.protobuf.message import Message
from grpc_status import rpc_status
from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.context import Context as OtelContext
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

_PROPAGATED = frozenset(propagate.get_global_textmap().fields)
"""Metadata in which a trace comes along."""

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

    def serve(self, context: Context, method: str, *, is_routine: bool = False) -> Visit:
        """Wraps the work of one call: counts it, traces it and ends it with the right status.

        Args:
            context: the call's context.
            method: full name, such as `forebay.inference.v1.InferenceService/Generate`.
            is_routine: whether the mesh itself calls it every few seconds. It then has a span only where the
                caller traces: a thousand traces of a question nobody asked would hide the others.
        """
        return Visit(self, context, method, is_routine)

    def judged(self) -> Judged:
        """Takes a call into the condition, and takes whether it waits for its turn."""
        return Judged(self, next(self._calls))

    async def tell(self) -> None:
        """Tells of the condition if it has changed."""
        now = (self.condition.is_busy, self.condition.is_degraded)
        if now != self._told:
            self._told = now
            if self.on_condition is not None:
                await self.on_condition()


class Visit:
    """One call at the edge, for `async with`. See `Edge.serve`.

    A class, and so is `Judged`: a generator costs more than most of what it would wrap here.
    """

    __slots__ = (
        "_began",
        "_context",
        "_edge",
        "_is_counted",
        "_is_routine",
        "_method",
        "_token",
        "metadata",
        "span",
    )

    def __init__(self, edge: Edge, context: Context, method: str, is_routine: bool) -> None:
        self._edge = edge
        self._context = context
        self._method = method
        self._is_routine = is_routine
        self._is_counted = False
        self._token: Token[OtelContext] | None = None
        self.span: trace.Span = trace.INVALID_SPAN
        """The call's span."""
        self.metadata: dict[str, str] = {}
        """What the caller sent along, as far as it is text."""

    async def __aenter__(self) -> Visit:
        self.metadata = {
            key: value for key, value in self._context.invocation_metadata() or () if isinstance(value, str)
        }
        self._trace()
        self._began = time.monotonic()
        try:
            self._edge.inflight.enter()
        except Failure as failure:
            await self.__aexit__(type(failure), failure, failure.__traceback__)
            raise
        self._is_counted = True
        return self

    def _trace(self) -> None:
        is_traced = not _PROPAGATED.isdisjoint(self.metadata)
        parent = propagate.extract(self.metadata) if is_traced else OtelContext()
        is_silent = self._is_routine and not trace.get_current_span(parent).get_span_context().is_valid
        telemetry = _SILENT if is_silent else self._edge.telemetry
        if not (is_traced or telemetry.enabled or telemetry.metrics.enabled):
            return  # there is nothing to tell, nothing to pass on, and nobody to find
        self.span = telemetry.tracer.start_span(
            self._method,
            context=parent,
            kind=SpanKind.SERVER,
            attributes={"rpc.system.name": "grpc", "rpc.method": self._method},
            record_exception=False,
            set_status_on_exception=False,
        )
        self._token = otel_context.attach(telemetry.attached(trace.set_span_in_context(self.span, parent)))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        status = "OK"
        try:
            if isinstance(error, asyncio.CancelledError):
                # Not an Exception, so the SDK would leave the span without a status.
                status = "DEADLINE_EXCEEDED" if _is_late(self._context) else "CANCELLED"
                self.span.set_attribute("error.type", status)
                return
            if not isinstance(error, Exception) or isinstance(error, grpc.aio.AbortError):
                return
            failure = self._failure(error)
            status = failure.code.name
            self.span.set_attribute("error.type", failure.reason)
            if spans.ending_of(failure).is_error:
                self.span.set_status(Status(StatusCode.ERROR, failure.reason))
            if isinstance(failure, CallerLeft):
                raise asyncio.CancelledError from failure  # nobody is there to be told more
            await self._context.abort_with_status(rpc_status.to_status(failure.to_status()))
        finally:
            self._leave(status)

    def _failure(self, error: Exception) -> Failure:
        """Returns what a call that raised this ends with."""
        left = _left(self._context)
        if left is not None:
            left.__cause__ = error
            return left
        if isinstance(error, Failure):
            return error
        logger.error("%s failed through a fault of ours", self._method, exc_info=error)
        failure = Internal(
            f"{type(error).__name__} in {self._method}: a fault of Forebay's own; its log has the details"
        )
        failure.__cause__ = error
        return failure

    def _leave(self, status: str) -> None:
        self.span.set_attribute("rpc.response.status_code", status)
        self.span.end()
        found = self._edge.telemetry.metrics
        if found.enabled:
            found.record(
                metrics.SERVER_CALL,
                time.monotonic() - self._began,
                {"rpc.method": self._method, "rpc.response.status_code": status},
            )
        if self._token is not None:
            otel_context.detach(self._token)
        if self._is_counted:
            self._edge.inflight.leave()


class Judged:
    """One call in the condition of its process, for `async with`. See `Edge.judged`."""

    __slots__ = ("_call", "_edge")

    def __init__(self, edge: Edge, call: int) -> None:
        self._edge = edge
        self._call = call

    async def __aenter__(self) -> Judged:
        return self

    async def waits(self, is_waiting: bool) -> None:
        """Takes in whether the call waits for its turn."""
        if is_waiting:
            self._edge.condition.wait(self._call)
        else:
            self._edge.condition.go_on(self._call)
        await self._edge.tell()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if error is None:
            self._edge.condition.end(failed=False)
        elif isinstance(error, Failure) and error.fault is Fault.BACKEND:
            self._edge.condition.end(failed=True)
        await self.waits(False)


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
            if TYPE_CHECKING:
                assert isinstance(event, pb.GenerateResponse)
            event.sequence = sequence
            sequence += 1
            if is_waiting or event.HasField("progress"):
                queued = event.progress.stage == pb.Progress.STAGE_QUEUED
                if queued != is_waiting:
                    is_waiting = queued
                    await judged.waits(queued)
            try:  # as in `write`, without another coroutine for each event
                await context.write(event)
            except _GONE as error:
                raise CallerLeft("the caller left") from error

        async with (
            self._edge.serve(context, f"{INFERENCE_SERVICE}/Generate") as visit,
            self._edge.judged() as judged,
        ):
            call = self._call(request, context, visit)
            with genai.served(self._edge.telemetry, visit.span, cast("Call[Request]", call), send) as watched:
                await self._engine.generate(call, watched)

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        """Embeds a batch of texts."""
        async with self._edge.serve(context, f"{INFERENCE_SERVICE}/Embed") as visit, self._edge.judged():
            call = self._call(request, context, visit)
            with genai.served(self._edge.telemetry, visit.span, cast("Call[Request]", call)) as watched:
                answer = await self._engine.embed(call)
                watched.note(answer)
                return answer

    async def CountTokens(self, request: pb.CountTokensRequest, context: Context) -> pb.CountTokensResponse:
        """Counts the tokens of a conversation."""
        async with self._edge.serve(context, f"{INFERENCE_SERVICE}/CountTokens") as visit:
            call = self._call(request, context, visit)
            with genai.served(self._edge.telemetry, visit.span, cast("Call[Request]", call)) as watched:
                answer = await self._engine.count_tokens(call)
                watched.note(answer)
                return answer

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """Lists the models that can be served now."""
        async with self._edge.serve(context, f"{INFERENCE_SERVICE}/ListModels", is_routine=True):
            return await self._engine.list_models(request)

    def _call(self, request: RequestT, context: Context, visit: Visit) -> Call[RequestT]:
        _refuse(validation.violations(request, model_required=self._model_required))
        call = new_call(request, context, visit.metadata)
        visit.span.set_attribute("forebay.request.id", call.request_id)
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


def new_call(request: RequestT, context: Context, metadata: Mapping[str, str]) -> Call[RequestT]:
    """Returns the call that a request, its context and what came along with it make."""
    remaining = cast("float | None", context.time_remaining())  # None without a deadline, whatever stubs say
    deadline = None if remaining is None else asyncio.get_running_loop().time() + remaining
    return Call(
        request=request,
        request_id=request.request_id or str(uuid.uuid4()),
        deadline=deadline,
        caller=_caller(context, metadata),
    )


def caller(context: Context) -> str:
    """Returns who asks: what the caller proved to be, and within that what they say, else the peer's host.

    A token or a certificate is proof, where the address asks for one; a name in
    `forebay-caller` is not, so it only tells the callers behind one proof apart
    and can never be taken for another one's.
    """
    return _caller(
        context,
        {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)},
    )


def _caller(context: Context, metadata: Mapping[str, str]) -> str:
    claimed = metadata.get(CALLER_KEY, "")
    proven = ""
    if (token := metadata.get("authorization")) is not None:
        proven = f"token:{hashlib.sha256(token.encode()).hexdigest()[:16]}"
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
