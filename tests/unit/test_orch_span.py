"""Every attempt has one span, which ends, says how, and holds no text."""

from __future__ import annotations

import asyncio

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import Failure
from forebay.kit.pipeline import Call, Request, Send
from forebay.kit.telemetry import Telemetry, off
from forebay.orchestrator.layers.span import Span
from forebay.testing.calls import Sink, ask, serve, with_options
from forebay.testing.clock import run
from forebay.testing.scripted import ScriptedCrashError, ScriptedEngine


class Spans:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.telemetry = Telemetry(provider.get_tracer("test"), provider)

    def one(self) -> ReadableSpan:
        (span,) = self.exporter.get_finished_spans()
        assert "secret" not in span.to_json()
        return span


@pytest.fixture
def spans() -> Spans:
    return Spans()


def layer(spans: Spans) -> Span:
    return Span(ScriptedEngine().service, telemetry=spans.telemetry, backend="mlx", address="x:1")


def attributes(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


def test_an_attempt_that_works_has_its_counts(spans: Spans) -> None:
    run(serve(layer(spans), ask("secret"), request_id="id", tried=frozenset({"other"})))
    span = spans.one()
    assert span.kind is SpanKind.CLIENT
    assert span.name == "forebay.inference.v1.InferenceService/Generate"
    assert [event.name for event in span.events] == ["forebay.first_delta"]
    assert (
        attributes(span).items()
        >= {
            "rpc.response.status_code": "OK",
            "forebay.backend": "mlx",
            "forebay.attempt": 2,
            "forebay.request.id": "id",
            "gen_ai.request.model": "scripted",
            "gen_ai.usage.output_tokens": 8,
        }.items()
    )


@pytest.mark.parametrize(
    ("fault", "code", "kind", "is_error"),
    [
        ("UNAVAILABLE@before", "UNAVAILABLE", "BACKEND_UNAVAILABLE", True),
        ("STREAM_INTERRUPTED@3", "ABORTED", "STREAM_INTERRUPTED", True),
        ("INVALID_REQUEST", "INVALID_ARGUMENT", "INVALID_REQUEST", False),
        ("CRASH@2", "INTERNAL", "ScriptedCrashError", True),
    ],
)
def test_an_attempt_that_fails_says_how(
    spans: Spans, fault: str, code: str, kind: str, is_error: bool
) -> None:
    with pytest.raises((Failure, ScriptedCrashError)):
        run(serve(layer(spans), with_options(ask("secret"), fault=fault)))
    span = spans.one()
    assert attributes(span)["rpc.response.status_code"] == code
    assert attributes(span)["error.type"] == kind
    assert (span.status.status_code is StatusCode.ERROR) is is_error


def test_an_attempt_that_is_cancelled_says_so(spans: Spans) -> None:
    async def body() -> None:
        async with asyncio.TaskGroup() as group:
            slow = with_options(ask("secret"), first_delay="1h")
            task = group.create_task(serve(layer(spans), slow))
            await asyncio.sleep(1)
            task.cancel()

    run(body())
    assert attributes(spans.one())["rpc.response.status_code"] == "CANCELLED"


def test_what_is_below_sees_the_attempt_as_its_parent(spans: Spans) -> None:
    seen: list[int] = []

    async def inner(call: Call[Request], send: Send) -> None:
        seen.append(trace.get_current_span().get_span_context().span_id)
        await send(pb.EmbedResponse())

    run(
        serve(
            Span(inner, telemetry=spans.telemetry, backend="mlx", address="x:1"), pb.EmbedRequest(model="m")
        )
    )
    span = spans.one()
    assert span.name.endswith("/Embed")
    assert span.context is not None
    assert seen == [span.context.span_id]


def test_without_tracing_events_pass_untouched() -> None:
    sink = Sink()
    quiet = Span(ScriptedEngine().service, telemetry=off(), backend="mlx", address="x:1")
    run(serve(quiet, ask(), sink=sink))
    assert sink.kinds[-1] == "finished"
