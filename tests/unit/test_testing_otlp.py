"""The OTLP receiver shows what was exported, as it came over the wire."""

import asyncio

import pytest
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode

from forebay.testing.otlp import OtlpReceiver


async def test_spans_arrive_with_all_that_they_hold() -> None:
    async with OtlpReceiver() as receiver:
        provider = TracerProvider(resource=Resource.create({"service.name": "forebay-test"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(receiver.endpoint, insecure=True)))
        tracer = provider.get_tracer("test")
        with (
            tracer.start_as_current_span("outer", kind=SpanKind.SERVER) as outer,
            tracer.start_as_current_span("inner", kind=SpanKind.CLIENT) as inner,
        ):
            inner.set_attributes({"text": "a", "number": 3, "yes": True, "many": ["a", "b"]})
            inner.add_event("happened", {"n": 1.5})
            inner.set_status(Status(StatusCode.ERROR, "why"))
        await asyncio.to_thread(provider.shutdown)  # it blocks until the receiver, on this loop, has answered
        found = await receiver.wait_for(2)
    assert [span.name for span in found] == ["outer", "inner"]
    top, below = found
    assert top.parent == ""
    assert below.parent == top.span_id
    assert below.trace_id == top.trace_id == trace.format_trace_id(outer.get_span_context().trace_id)
    assert (top.kind, below.kind, below.service) == ("SERVER", "CLIENT", "forebay-test")
    assert below.attributes == {"text": "a", "number": 3, "yes": True, "many": ("a", "b")}
    assert below.events == (("happened", {"n": 1.5}),)
    assert (top.status, below.status, below.status_text) == ("UNSET", "ERROR", "why")
    assert top.start <= below.start <= below.end <= top.end
    assert receiver.spans("inner", trace_id=below.trace_id) == [below]
    assert receiver.spans("other") == []


async def test_spans_that_do_not_arrive_fail_the_test_by_name() -> None:
    async with OtlpReceiver() as receiver:
        with pytest.raises(AssertionError, match="2 spans Generate did not arrive"):
            await receiver.wait_for(2, "Generate", timeout=0.05)


async def test_metrics_arrive_as_their_latest_points() -> None:
    async with OtlpReceiver() as receiver:
        reader = PeriodicExportingMetricReader(
            OTLPMetricExporter(receiver.endpoint, insecure=True), export_interval_millis=3_600_000
        )
        provider = MeterProvider([reader], resource=Resource.create({"service.name": "forebay-test"}))
        meter = provider.get_meter("test")
        meter.create_counter("calls").add(3, {"backend": "a"})
        meter.create_gauge("depth").set(1.5)
        histogram = meter.create_histogram("seconds")
        for value in (1.0, 2.0):
            histogram.record(value)
        await asyncio.to_thread(provider.shutdown)
    (calls,) = receiver.points("calls")
    assert (calls.value, calls.attributes, calls.service) == (3.0, {"backend": "a"}, "forebay-test")
    assert [point.value for point in receiver.points("depth")] == [1.5]
    assert [(p.value, p.count) for p in receiver.points("seconds")] == [(3.0, 2)]
    assert len(receiver.points()) == 3
