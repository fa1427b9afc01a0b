"""A collector for tests: what a service exports, as it comes over the wire."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeAlias

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.metrics.v1 import metrics_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

Value: TypeAlias = str | bool | int | float | bytes | tuple["Value", ...] | None
"""Value of an attribute."""

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One span. Times are in nanoseconds since 1970."""

    name: str
    """Its name."""
    service: str
    """Who exported it."""
    trace_id: str
    """Its trace, in hexadecimal."""
    span_id: str
    """Its own identifier, in hexadecimal."""
    parent: str
    """The identifier of the span above it; empty at the root."""
    kind: str
    """`SERVER`, `CLIENT`, `INTERNAL`, `PRODUCER` or `CONSUMER`."""
    attributes: Mapping[str, Value]
    """Its attributes."""
    status: str
    """`UNSET`, `OK` or `ERROR`."""
    status_text: str
    """What the status says."""
    events: tuple[tuple[str, Mapping[str, Value]], ...]
    """Its events: name and attributes."""
    start: int
    """When it began."""
    end: int
    """When it ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The latest value of one metric with one set of attributes."""

    name: str
    """The metric's name."""
    service: str
    """Who exported it."""
    attributes: Mapping[str, Value]
    """What tells it from the metric's other points."""
    value: float
    """A counter's or gauge's value, or a histogram's sum."""
    count: int
    """A histogram's count; 0 for others."""
    traces: frozenset[str] = frozenset()
    """Traces that its exemplars name, in hexadecimal."""


class OtlpReceiver:
    """Takes spans and metrics over OTLP. Use it with `async with`.

    `endpoint` is what goes into a service's `otlp_endpoint`.
    """

    def __init__(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._spans: list[Span] = []
        self._points: list[Point] = []
        self._arrived = asyncio.Event()
        self.endpoint = ""
        """Where exporters send to."""

    async def __aenter__(self) -> Self:
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(  # type: ignore[no-untyped-call]  # no stubs
            _Traces(self._take_spans), self._server
        )
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(  # type: ignore[no-untyped-call]  # no stubs
            _Metrics(self._take_points), self._server
        )
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self.endpoint = f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._server.stop(None)

    def spans(self, name: str = "", *, trace_id: str = "") -> list[Span]:
        """Returns the spans that have arrived, in the order in which they began.

        Args:
            name: only spans of that name; empty is any.
            trace_id: only spans of that trace; empty is any.
        """
        found = [s for s in self._spans if name in ("", s.name) and trace_id in ("", s.trace_id)]
        return sorted(found, key=lambda span: span.start)

    def points(self, name: str = "") -> list[Point]:
        """Returns the latest export's points of the metric of that name; empty is any."""
        return [point for point in self._points if name in ("", point.name)]

    async def wait_for(
        self, count: int, name: str = "", *, trace_id: str = "", timeout: float = 15.0
    ) -> list[Span]:
        """Waits for spans and returns them.

        Args:
            count: how many at least.
            name: only spans of that name; empty is any.
            trace_id: only spans of that trace; empty is any.
            timeout: most seconds to wait.

        Raises:
            AssertionError: they did not arrive in time.
        """
        try:
            async with asyncio.timeout(timeout):
                while len(found := self.spans(name, trace_id=trace_id)) < count:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError as error:
            names = [span.name for span in self.spans()]
            raise AssertionError(
                f"{count} spans {name} did not arrive within {timeout} s; there are {names}"
            ) from error
        return found

    def _take_spans(self, request: trace_service_pb2.ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            service = str(_attributes(resource.resource.attributes).get("service.name", ""))
            for scope in resource.scope_spans:
                self._spans.extend(_span(span, service) for span in scope.spans)
        self._arrived.set()

    def _take_points(self, request: metrics_service_pb2.ExportMetricsServiceRequest) -> None:
        self._points = [
            point
            for resource in request.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in _points(
                metric, str(_attributes(resource.resource.attributes).get("service.name", ""))
            )
        ]
        self._arrived.set()


class _Traces(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, take: Callable[[trace_service_pb2.ExportTraceServiceRequest], None]) -> None:
        self._take = take

    async def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: Context
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self._take(request)
        return trace_service_pb2.ExportTraceServiceResponse()


class _Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, take: Callable[[metrics_service_pb2.ExportMetricsServiceRequest], None]) -> None:
        self._take = take

    async def Export(
        self, request: metrics_service_pb2.ExportMetricsServiceRequest, context: Context
    ) -> metrics_service_pb2.ExportMetricsServiceResponse:
        self._take(request)
        return metrics_service_pb2.ExportMetricsServiceResponse()


def _span(span: trace_pb2.Span, service: str) -> Span:
    return Span(
        name=span.name,
        service=service,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        attributes=_attributes(span.attributes),
        status=trace_pb2.Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_"),
        status_text=span.status.message,
        events=tuple((event.name, _attributes(event.attributes)) for event in span.events),
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
    )


def _points(metric: metrics_pb2.Metric, service: str) -> list[Point]:
    found: list[tuple[metrics_pb2.NumberDataPoint | metrics_pb2.HistogramDataPoint, float, int]] = []
    for number in (*metric.sum.data_points, *metric.gauge.data_points):
        value = float(number.as_int if number.WhichOneof("value") == "as_int" else number.as_double)
        found.append((number, value, 0))
    found.extend((each, each.sum, each.count) for each in metric.histogram.data_points)
    return [
        Point(
            name=metric.name,
            service=service,
            attributes=_attributes(point.attributes),
            value=value,
            count=count,
            traces=frozenset(exemplar.trace_id.hex() for exemplar in point.exemplars),
        )
        for point, value, count in found
    ]


def _attributes(pairs: Iterable[common_pb2.KeyValue]) -> dict[str, Value]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: common_pb2.AnyValue) -> Value:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return tuple(_value(item) for item in value.array_value.values)
    found: Value = getattr(value, kind) if kind is not None else None
    return found
