"""OpenTelemetry: off unless an endpoint is set, and never in the way of a call or of leaving.

The spans are our own code, at the edge (`kit.rpc`) and where calls leave
(`kit.genai`): the instrumentation for grpc.aio breaks handlers that write, and
leaves the spans of cancelled calls open. Trace context passes through even
where tracing is off.

Traces and metrics go to a collector when one is named; metrics are also shown
to Prometheus where a process has an address for that.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import cast

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from prometheus_client import CollectorRegistry
from pydantic import Field

from forebay.kit.config import Duration, Settings
from forebay.kit.metrics import Metrics, Page
from forebay.kit.push import Pusher

EXIT_SECONDS = 4.0
"""Most time spent on the last spans. The SDK alone would wait 30 s for a collector that is gone; an exit
that takes longer than 5 s is taken for a hang."""


_KEY = otel_context.create_key("forebay.telemetry")


class TelemetrySettings(Settings):
    """Where traces and metrics go."""

    otlp_endpoint: str = Field(
        default="",
        description="OTLP gRPC endpoint, such as `http://127.0.0.1:4317`. Empty takes "
        "OTEL_EXPORTER_OTLP_ENDPOINT, and is off where that is unset too. OTEL_TRACES_SAMPLER sets sampling.",
    )
    export_timeout: Duration = Field(
        default=timedelta(seconds=2),
        description="How long one export may take before what it holds is dropped.",
    )
    metrics_interval: Duration = Field(
        default=timedelta(seconds=15),
        description="Time between two exports of metrics to the OTLP endpoint. The pages for Prometheus "
        "(`metrics_address` of each service) need no endpoint and no interval.",
    )


class Telemetry:
    """The tracer and the metrics of a process, and the way to end them.

    Args:
        tracer: makes spans.
        provider: where they go; None records none.
        metrics: what the process measures; None measures nothing.
        name: what the process is to the conventions for generative AI: `gen_ai.provider.name`.
        page: the page for Prometheus, if there is one.
        ends: what ends the rest.
    """

    def __init__(
        self,
        tracer: trace.Tracer,
        provider: TracerProvider | None = None,
        *,
        metrics: Metrics | None = None,
        name: str = "forebay",
        page: Page | None = None,
        ends: Sequence[Callable[[], object]] = (),
    ) -> None:
        self.tracer = tracer
        self.metrics = metrics or Metrics()
        self.provider = name
        self.page = page
        self._provider = provider
        self._ends = tuple(ends) if provider is None else (provider.shutdown, *ends)

    @property
    def enabled(self) -> bool:
        """Whether spans are recorded."""
        return self._provider is not None

    def attached(self, context: Context) -> Context:
        """Returns a context in which `current` finds this telemetry."""
        return otel_context.set_value(_KEY, self, context)

    def shutdown(self) -> None:
        """Exports what is left, for at most `EXIT_SECONDS` altogether, and stops."""
        if self.page is not None:
            self.page.close()
        # Threads, because the SDK's own shutdowns have no bound that reaches an export in progress.
        threads = [threading.Thread(target=end, name="telemetry-shutdown", daemon=True) for end in self._ends]
        until = time.monotonic() + EXIT_SECONDS
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))


def off() -> Telemetry:
    """Returns telemetry that records nothing."""
    return Telemetry(trace.NoOpTracerProvider().get_tracer("forebay"))


_OFF = off()


def current() -> Telemetry:
    """Returns the telemetry of the process that serves the call in progress; outside of calls it is off.

    So what a service does by itself, such as asking its framework for news every few seconds, makes
    no traces.
    """
    found = cast("Telemetry | None", otel_context.get_value(_KEY))
    return _OFF if found is None else found


def setup(
    service_name: str,
    settings: TelemetrySettings,
    *,
    metrics_address: str | None = None,
    metrics_hosts: Sequence[str] = (),
) -> Telemetry:
    """Starts telemetry for this process.

    Args:
        service_name: `service.name` of the resource, such as `forebay-orchestrator`.
        settings: where to send spans and metrics.
        metrics_address: where to show metrics to Prometheus; None shows none.
        metrics_hosts: names by which Prometheus may ask there, besides those of this machine.

    Raises:
        OSError: `metrics_address` cannot be bound.
    """
    traces, pushed = _endpoint(settings, "TRACES"), _endpoint(settings, "METRICS")
    if not (traces or pushed or metrics_address):
        return off()
    resource = Resource.create(
        {
            "service.name": service_name,
            "service.namespace": "forebay",
            "service.instance.id": str(uuid.uuid4()),
        }
    )
    timeout = settings.export_timeout.total_seconds()
    readers: list[MetricReader] = []
    page = None
    if metrics_address:
        registry = CollectorRegistry()
        page = Page(registry, metrics_address, metrics_hosts)
        readers.append(PrometheusMetricReader(scope_info_enabled=False, registry=registry))
    if pushed:
        interval = settings.metrics_interval.total_seconds() * 1000
        pusher = Pusher(pushed, timeout=timeout)
        readers.append(PeriodicExportingMetricReader(pusher, interval, timeout * 1000))
    meters = MeterProvider(readers, resource=resource, shutdown_on_exit=False) if readers else None
    provider = None
    if traces:
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        spans = OTLPSpanExporter(endpoint=traces, insecure=not traces.startswith("https://"), timeout=timeout)
        provider.add_span_processor(BatchSpanProcessor(spans))
    tracers = provider or trace.NoOpTracerProvider()
    return Telemetry(
        tracers.get_tracer("forebay"),
        provider,
        metrics=Metrics(meters.get_meter("forebay")) if meters is not None else None,
        name=service_name.removeprefix("forebay-"),
        page=page,
        ends=[] if meters is None else [meters.shutdown],
    )


def _endpoint(settings: TelemetrySettings, signal: str) -> str:
    """Returns where a signal goes: nowhere if OTEL_TRACES_EXPORTER, or that of the metrics, is `none`."""
    if os.environ.get(f"OTEL_{signal}_EXPORTER", "").strip() == "none":
        return ""
    return (
        settings.otlp_endpoint
        or os.environ.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
        or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
        or ""
    )
