"""What is not recorded costs nothing, and the trace goes on with its parent's decision."""

from __future__ import annotations

import gc
import random
import statistics
import weakref

import pytest
from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler
from opentelemetry.trace import SpanKind

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit import genai, spans
from forebay.kit.pipeline import Call, Event, Request
from forebay.kit.telemetry import Telemetry, off
from forebay.orchestrator.fleet.performance import Window
from forebay.testing.calls import ask


class Traces:
    """A tracer, and what it exported."""

    def __init__(self, root: Sampler) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler=ParentBased(root=root), shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.telemetry = Telemetry(provider.get_tracer("test"), provider)

    @property
    def names(self) -> list[str]:
        return [span.name for span in self.exporter.get_finished_spans()]


def untold() -> tuple[str, spans.Attributes]:
    raise AssertionError("nobody sees this span, and it was described")


async def nowhere(event: Event) -> None:
    """Takes an event."""


def sent_along() -> dict[str, str]:
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier


def test_below_a_span_that_is_not_recorded_nothing_is_described_and_the_decision_goes_along() -> None:
    traces = Traces(ALWAYS_OFF)
    tracer = traces.telemetry.tracer
    edge = tracer.start_span("edge")
    token = otel_context.attach(trace.set_span_in_context(edge))
    try:
        with spans.traced(tracer, SpanKind.CLIENT, untold) as span:
            assert span is edge
            assert not genai.is_watched(traces.telemetry)
            parent = sent_along()["traceparent"]
    finally:
        otel_context.detach(token)
    assert parent.split("-")[1] == f"{edge.get_span_context().trace_id:032x}"
    assert not int(parent.rpartition("-")[2], 16) & trace.TraceFlags.SAMPLED
    assert traces.names == []


def test_a_reply_that_outlives_the_span_of_who_asked_first_has_spans_of_its_own() -> None:
    traces = Traces(ALWAYS_ON)
    tracer = traces.telemetry.tracer
    edge = tracer.start_span("edge")
    edge.end()
    token = otel_context.attach(trace.set_span_in_context(edge))
    try:
        assert genai.is_watched(traces.telemetry)
        with spans.traced(tracer, SpanKind.CLIENT, lambda: ("attempt", {})):
            pass
    finally:
        otel_context.detach(token)
    assert traces.names == ["edge", "attempt"]


def test_a_callers_decision_is_taken_anew_by_the_first_span_here() -> None:
    traces = Traces(ALWAYS_ON)
    parent = propagate.extract({"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"})
    token = otel_context.attach(parent)
    try:
        with spans.traced(traces.telemetry.tracer, SpanKind.CLIENT, lambda: ("attempt", {})):
            pass
    finally:
        otel_context.detach(token)
    assert traces.names == ["attempt"]


async def test_what_was_watched_keeps_neither_the_stream_nor_the_span() -> None:
    class Stream:
        async def __call__(self, event: Event) -> None:
            """Takes an event."""

    stream = Stream()
    gone = weakref.ref(stream)
    call: Call[Request] = Call(request=ask(model="m"))
    with genai.requested(off(), call, stream, framework=lambda name: "x") as watched:
        await watched(pb.GenerateResponse(delta=pb.Delta(text="x", token_count=3)))
    del stream
    gc.collect()
    assert gone() is None
    assert watched.output_token_count == 3


def test_a_call_is_copied_whole_and_has_no_field_that_it_has_not() -> None:
    call: Call[Request] = Call(request=ask(model="m"), caller="me", tokens=3.0)
    copy = call.with_(deadline=5.0, tried=frozenset({"a"}))
    assert copy == Call(
        request=call.request,
        request_id=call.request_id,
        deadline=5.0,
        caller="me",
        tried=frozenset({"a"}),
        tokens=3.0,
    )
    assert call.deadline is None
    with pytest.raises(TypeError, match="no dead_line"):
        call.with_(dead_line=5.0)


def test_a_window_knows_its_quantiles_whatever_comes_and_goes() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    source = random.Random(seed)
    window, kept, now = Window(span=10.0, most=8), list[tuple[float, float]](), 0.0
    for _ in range(400):
        now += source.choice((0.0, 0.5, 4.0))
        window.age(now)
        kept = [(at, value) for at, value in kept if at > now - 10.0]
        value = source.choice((0.0, 1.0, source.random()))
        window.add(now, value)
        kept = [*kept, (now, value)][-8:]
        values = sorted(value for _, value in kept)
        assert len(window) == len(kept)
        assert window.quantile(0.5) == values[(len(values) - 1) // 2]
        assert window.quantile(1.0) == values[-1]
        assert window.mean() == pytest.approx(statistics.fmean(values))
