"""The conventions for generative AI: what a span says of a request, and what is measured of its answer.

Names follow OpenTelemetry's `gen_ai.*` conventions. What was asked and what
was answered is never among them, and no switch here adds it.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from types import TracebackType

from google.protobuf import duration_pb2
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit import metrics
from forebay.kit.failure import printable
from forebay.kit.metrics import Labels, Metrics
from forebay.kit.pipeline import Call, Event, Request, Send
from forebay.kit.spans import Attributes, ending_of, is_dropped, traced
from forebay.kit.telemetry import Telemetry

_OPERATIONS: dict[type[Request], str] = {
    pb.GenerateRequest: "chat",
    pb.EmbedRequest: "embeddings",
    pb.CountTokensRequest: "count_tokens",
}
_METHODS: dict[type[Request], str] = {
    pb.GenerateRequest: "forebay.inference.v1.InferenceService/Generate",
    pb.EmbedRequest: "forebay.inference.v1.InferenceService/Embed",
    pb.CountTokensRequest: "forebay.inference.v1.InferenceService/CountTokens",
}
_STAGES = {
    pb.Progress.STAGE_QUEUED: "forebay.queued",
    pb.Progress.STAGE_LOADING: "forebay.loading",
    pb.Progress.STAGE_PREFILLING: "forebay.prefilling",
}
_SAMPLING = {"temperature", "top_p", "top_k", "seed", "frequency_penalty", "presence_penalty"}
"""Fields of `Sampling` that the conventions know, under the same names."""

NAME_CHARACTERS = 128
"""Most characters of a model's name on a span: callers choose it."""

PROVIDER = "forebay"
"""Provider of a call that nobody has answered yet."""


def operation(request: Request) -> str:
    """Returns `gen_ai.operation.name`."""
    return _OPERATIONS[type(request)]


def model_name(name: str) -> str:
    """Returns a model's name as spans carry it."""
    return printable(name)[:NAME_CHARACTERS]


def request_attributes(request: Request) -> dict[str, str | bool | int | float]:
    """Returns what a span says of a request: parameters and counts, and no text."""
    attributes: dict[str, str | bool | int | float] = {
        "gen_ai.operation.name": operation(request),
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": model_name(request.model),
    }
    if not isinstance(request, pb.GenerateRequest):
        return attributes
    sampling, limits = request.sampling, request.limits
    for field, value in sampling.ListFields():
        if field.name in _SAMPLING:
            attributes[f"gen_ai.request.{field.name}"] = value
    if limits.HasField("max_output_token_count"):
        attributes["gen_ai.request.max_tokens"] = limits.max_output_token_count
    attributes["gen_ai.request.stream"] = True
    attributes["gen_ai.output.type"] = "json" if request.output_format.WhichOneof("constraint") else "text"
    # Stop sequences are text of the caller's, so only their number is told.
    attributes["forebay.request.stop_sequence_count"] = len(limits.stop_sequences)
    attributes["forebay.request.message_count"] = len(request.messages)
    attributes["forebay.request.tool_count"] = len(request.tools)
    return attributes


class Watched:
    """A `Send` that notes on a span, and for the metrics, what goes by.

    Args:
        span: the span of the call.
        send: where events go.
        clock: gives the time in seconds.
    """

    def __init__(
        self, span: Span, send: Send | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.span = span
        """The span of the call."""
        self._send = send
        self._clock = clock
        self.began = clock()
        self.first_delta: float | None = None
        """Seconds to the first delta."""
        self.backend = ""
        self.model = ""
        """The model that answered."""
        self.finished: pb.Finished | None = None
        self.degradations: list[pb.Degradation] = []
        self.delta_count = 0
        """Deltas so far."""
        self.continued: pb.Continued | None = None
        """The last news that another backend goes on with the reply."""
        self.continuation_count = 0
        """How many there were."""
        self.on_progress: Callable[[pb.Progress], None] | None = None
        """Told of progress."""
        self._last_delta = 0.0
        self._token_count = 0
        self._first_token_count = 0
        self._stage = pb.Progress.STAGE_UNSPECIFIED

    def __call__(self, event: Event) -> Awaitable[None]:
        """Notes an event and passes it on."""
        assert self._send is not None, "an answer that is only noted is not sent"
        # A delta after the first, of which there are thousands a second, is noted in as few steps as can be.
        if (
            self.first_delta is not None
            and isinstance(event, pb.GenerateResponse)
            and event.HasField("delta")
        ):
            self._last_delta = self._clock() - self.began
            self._token_count += event.delta.token_count
            self.delta_count += 1
        else:
            self.note(event)
        return self._send(event)

    def release(self) -> None:
        """Lets go of the span and of where events went. What was noted stays."""
        self.span, self._send, self.on_progress = INVALID_SPAN, None, None

    def note(self, event: Event) -> None:
        """Notes an event."""
        if not isinstance(event, pb.GenerateResponse):
            self._answered(event.backend, event.model)
            return
        kind = event.WhichOneof("event")
        if kind == "delta":
            self._last_delta = self.elapsed()
            self._token_count += event.delta.token_count
            self.delta_count += 1
            if self.first_delta is None:
                self.first_delta = self._last_delta
                self._first_token_count = event.delta.token_count
                self.span.add_event("forebay.first_delta")
        elif kind == "progress":
            self._progress(event.progress)
        elif kind == "started":
            self._answered(event.started.backend, event.started.model)
            self.degradations = list(event.started.degradations)
        elif kind == "finished":
            self.finished = event.finished
        elif kind == "continued":
            self.continued = event.continued
            self.continuation_count += 1

    def _answered(self, backend: str, model: str) -> None:
        self.backend, self.model = backend, model

    def _progress(self, progress: pb.Progress) -> None:
        if self.on_progress is not None:
            self.on_progress(progress)
        # A place in the queue, and a fraction read, change many times; that a stage began is the story.
        if progress.stage == self._stage or progress.stage not in _STAGES:
            return
        self._stage = progress.stage
        attributes = (
            {"forebay.queue.position": progress.queue_position}
            if progress.stage == pb.Progress.STAGE_QUEUED
            else {}
        )
        self.span.add_event(_STAGES[progress.stage], attributes)

    def elapsed(self) -> float:
        """Seconds since the call began."""
        return self._clock() - self.began

    @property
    def output_token_count(self) -> int:
        """Tokens written, as `finished` tells it and else the deltas."""
        told = self.finished.usage.output_token_count if self.finished is not None else 0
        return told or self._token_count

    @property
    def writing_seconds(self) -> float:
        """Seconds from the first delta to the last one so far."""
        return 0.0 if self.first_delta is None else self._last_delta - self.first_delta

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first delta in a second; None if there were too few to tell."""
        tokens = self.output_token_count - self._first_token_count
        seconds = self.writing_seconds
        return tokens / seconds if tokens > 0 and seconds > 0 else None

    def describe(self) -> None:
        """Writes onto the span what is known of the answer."""
        span = self.span
        if not span.is_recording():
            return
        if self.model:
            span.set_attribute("gen_ai.response.model", model_name(self.model))
        if self.backend:
            span.set_attribute("forebay.backend", model_name(self.backend))
        if self.first_delta is not None:
            span.set_attribute("gen_ai.response.time_to_first_chunk", self.first_delta)
        if self.degradations:
            span.set_attribute("forebay.degradations", sorted({_degradation(d) for d in self.degradations}))
        if self._token_count and self.finished is None:
            span.set_attribute("gen_ai.usage.output_tokens", self._token_count)
        if self.finished is not None:
            self._describe_end(span, self.finished)

    def _describe_end(self, span: Span, finished: pb.Finished) -> None:
        usage, timings = finished.usage, finished.timings
        reason = pb.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower()
        span.set_attribute("gen_ai.response.finish_reasons", [reason])
        span.set_attribute("gen_ai.usage.input_tokens", usage.prompt_token_count)
        span.set_attribute("gen_ai.usage.output_tokens", self.output_token_count)
        if usage.cached_token_count:
            span.set_attribute("gen_ai.usage.cache_read.input_tokens", usage.cached_token_count)
        if usage.reasoning_token_count:
            span.set_attribute("gen_ai.usage.reasoning.output_tokens", usage.reasoning_token_count)
        for field, value in timings.ListFields():
            if field.name != "first_delta_duration":  # the conventions have a name for that one
                span.set_attribute(f"forebay.{field.name.removesuffix('_duration')}.seconds", _seconds(value))


def served(
    telemetry: Telemetry, span: Span, call: Call[Request], send: Send | None = None
) -> AbstractContextManager[Watched]:
    """Watches an answer at the edge of the process that serves it, and measures it.

    Args:
        telemetry: of this process.
        span: the server's span of the call.
        call: what is asked for.
        send: where events go; None for a method with one answer, which is then noted.
    """
    return _Served(telemetry, span, call, send)


class _Served:
    """A block in which an answer is watched."""

    __slots__ = ("_call", "_telemetry", "_watched")

    def __init__(self, telemetry: Telemetry, span: Span, call: Call[Request], send: Send | None) -> None:
        self._telemetry = telemetry
        self._call = call
        self._watched = Watched(span, send)

    def __enter__(self) -> Watched:
        return self._watched

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._watched.describe()
        telemetry = self._telemetry
        if telemetry.metrics.enabled:
            _record_served(telemetry.metrics, telemetry.provider, self._call, self._watched, error)


def _record_served(
    found: Metrics, provider: str, call: Call[Request], watched: Watched, error: BaseException | None
) -> None:
    model = found.admit(watched.model) if watched.model else found.label(call.request.model)
    of_operation = _of_operation(model, provider, operation(call.request), _error_type(error))
    found.record(metrics.REQUEST, watched.elapsed(), of_operation)
    if watched.first_delta is not None:
        found.record(metrics.FIRST_TOKEN, watched.first_delta, _of_model(model, provider))
    if (rate := watched.tokens_per_second) is not None and watched.finished is not None:
        found.record(metrics.PER_TOKEN, 1 / rate, _of_model(model, provider))
        found.record(metrics.RATE, rate, _of_model(model))
    for degradation in watched.degradations:
        found.add(metrics.DEGRADATIONS, {"forebay.degradation": _degradation(degradation)})
    _count_tokens(found, model, watched)


def _error_type(error: BaseException | None) -> str:
    return "" if error is None else ending_of(error).error_type


def _count_tokens(found: Metrics, model: str, watched: Watched) -> None:
    if watched.output_token_count:
        found.add(metrics.TOKENS, _of_model(model, kind="output"), watched.output_token_count)
    if watched.finished is None:
        return
    usage, timings = watched.finished.usage, watched.finished.timings
    found.add(metrics.TOKENS, _of_model(model, kind="input"), usage.prompt_token_count)
    found.add(metrics.TOKENS, _of_model(model, kind="input_cached"), usage.cached_token_count)
    # Both, so that a cache that never hits shows a share of 0 and not nothing.
    is_hit = usage.cached_token_count > 0
    found.add(metrics.CACHE, _HIT, int(is_hit))
    found.add(metrics.CACHE, _MISS, int(not is_hit))
    if timings.HasField("queue_duration"):
        found.record(metrics.QUEUE_WAIT, _seconds(timings.queue_duration), _of_model(model))
    if timings.HasField("prefill_duration"):
        found.record(metrics.PREFILL, _seconds(timings.prefill_duration), _of_model(model))


def requested(
    telemetry: Telemetry,
    call: Call[Request],
    send: Send,
    *,
    framework: Callable[[str], str],
    clock: Callable[[], float] = time.monotonic,
) -> AbstractContextManager[Watched]:
    """Gives a request its span, which covers all attempts on it, and measures it.

    Args:
        telemetry: of this process.
        call: the request.
        send: where events go.
        framework: returns the framework behind a backend.
        clock: gives the time in seconds.
    """
    return _Requested(telemetry, call, send, framework, clock)


class _Spanned(ABC):
    """A block with a span of its own, in which an answer is watched."""

    __slots__ = ("_call", "_clock", "_send", "_span", "_telemetry", "_watched")

    def __init__(
        self,
        telemetry: Telemetry,
        call: Call[Request],
        send: Send | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._telemetry = telemetry
        self._call = call
        self._send = send
        self._clock = clock
        self._span = traced(telemetry.tracer, SpanKind.CLIENT, self._describe)

    def __enter__(self) -> Watched:
        self._watched = Watched(self._span.__enter__(), self._send, clock=self._clock)
        return self._watched

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            self._tell(error)
        finally:
            self._span.__exit__(kind, error, where)

    @abstractmethod
    def _describe(self) -> tuple[str, Attributes]:
        """Returns the span's name and its first attributes."""

    @abstractmethod
    def _tell(self, error: BaseException | None) -> None:
        """Writes down how the block ended."""


class _Requested(_Spanned):
    """A block with the span of a request."""

    __slots__ = ("_framework",)

    def __init__(
        self,
        telemetry: Telemetry,
        call: Call[Request],
        send: Send,
        framework: Callable[[str], str],
        clock: Callable[[], float],
    ) -> None:
        super().__init__(telemetry, call, send, clock)
        self._framework = framework

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, where)
        finally:
            self._watched.release()

    def _tell(self, error: BaseException | None) -> None:
        watched, found = self._watched, self._telemetry.metrics
        if not (found.enabled or watched.span.is_recording()):
            return
        provider = self._framework(watched.backend) if watched.backend else PROVIDER
        watched.span.set_attribute("gen_ai.provider.name", provider)
        watched.describe()
        if found.enabled:
            _record_requested(found, provider, self._call, watched, error)

    def _describe(self) -> tuple[str, Attributes]:
        request = self._call.request
        name = f"{operation(request)} {model_name(request.model)}"
        return name, request_attributes(request) | {"forebay.request.id": self._call.request_id}


def _record_requested(
    found: Metrics, provider: str, call: Call[Request], watched: Watched, error: BaseException | None
) -> None:
    model = found.admit(watched.model) if watched.model else found.label(call.request.model)
    name = operation(call.request)
    found.record(
        metrics.OPERATION, watched.elapsed(), _of_operation(model, provider, name, _error_type(error))
    )
    if watched.first_delta is not None:
        found.record(metrics.FIRST_CHUNK, watched.first_delta, _of_model(model, provider))
    if watched.finished is not None:
        usage = watched.finished.usage
        found.record(metrics.USAGE, usage.prompt_token_count, _of_model(model, provider, name, "input"))
        found.record(metrics.USAGE, watched.output_token_count, _of_model(model, provider, name, "output"))


def attempted(
    telemetry: Telemetry, call: Call[Request], send: Send | None, *, backend: str, address: str
) -> AbstractContextManager[Watched]:
    """Gives one attempt on a backend or a worker its span, the parent of the span over there.

    Args:
        telemetry: of this process.
        call: the attempt.
        send: where events go; None for a method with one answer, which is then noted.
        backend: who is asked.
        address: where it listens.
    """
    return _Attempted(telemetry, call, send, backend, address)


class _Attempted(_Spanned):
    """A block with the span of an attempt."""

    __slots__ = ("_address", "_backend")

    def __init__(
        self, telemetry: Telemetry, call: Call[Request], send: Send | None, backend: str, address: str
    ) -> None:
        super().__init__(telemetry, call, send)
        self._backend = backend
        self._address = address

    def _tell(self, error: BaseException | None) -> None:
        watched, found = self._watched, self._telemetry.metrics
        if not (found.enabled or watched.span.is_recording()):
            return
        code = "OK" if error is None else ending_of(error).code
        watched.backend = ""  # the name over there is not always ours, which is on the span
        watched.describe()
        watched.span.set_attribute("rpc.response.status_code", code)
        if found.enabled:
            found.record(
                metrics.CLIENT_CALL, watched.elapsed(), _of_attempt(self._method, code, self._backend)
            )
            if self._call.tried and code == "OK":
                found.add(metrics.FALLBACKS, {"forebay.backend": self._backend})

    @property
    def _method(self) -> str:
        return _METHODS[type(self._call.request)]

    def _describe(self) -> tuple[str, Attributes]:
        call = self._call
        return self._method, {
            "rpc.system.name": "grpc",
            "rpc.method": self._method,
            "gen_ai.request.model": model_name(call.request.model),
            "forebay.request.id": call.request_id,
            "forebay.attempt": len(call.tried) + 1,
            "forebay.backend": self._backend,
            **_place(self._address),
        }


# Labels come from few values, and a call needs a dozen sets of them: each is made once. No one changes them.


@lru_cache(maxsize=1024)
def _of_attempt(method: str, code: str, backend: str) -> Labels:
    return {"rpc.method": method, "rpc.response.status_code": code, "forebay.backend": backend}


@lru_cache(maxsize=1024)
def _of_model(model: str, provider: str = "", operation: str = "", kind: str = "") -> Labels:
    """Returns the labels that are not empty."""
    named = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": provider,
        "gen_ai.request.model": model,
        "gen_ai.token.type": kind,
    }
    return {name: value for name, value in named.items() if value}


@lru_cache(maxsize=1024)
def _of_operation(model: str, provider: str, operation: str, error_type: str) -> Labels:
    return {**_of_model(model, provider, operation), "error.type": error_type}


_HIT = {"forebay.cache": "prefix", "forebay.cache.result": "hit"}
_MISS = {"forebay.cache": "prefix", "forebay.cache.result": "miss"}


def is_watched(telemetry: Telemetry) -> bool:
    """Whether anybody learns of what is watched within the span around: no span and no metric may need it."""
    return telemetry.metrics.enabled or not is_dropped(telemetry.tracer)


def _place(address: str) -> dict[str, str | int]:
    """Returns an address as the conventions want it."""
    host, _, port = address.rpartition(":")
    if address.startswith("unix:") or not port.isdigit():
        return {"server.address": address.removeprefix("unix:")}
    return {"server.address": host.strip("[]"), "server.port": int(port)}


def _degradation(degradation: pb.Degradation) -> str:
    try:
        return pb.DegradationKind.Name(degradation.kind).removeprefix("DEGRADATION_KIND_").lower()
    except ValueError:  # a kind of a newer peer
        return metrics.OTHER


def _seconds(duration: duration_pb2.Duration) -> float:
    return duration.ToTimedelta().total_seconds()
