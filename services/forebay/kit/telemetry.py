"""OpenTelemetry: off unless an endpoint is set, and never in the way of a call or of leaving.

The spans are our own code, at the edge (`kit.rpc`): the instrumentation
for grpc.aio breaks handlers that write, and leaves the spans of cancelled calls
open. Trace context passes through even where tracing is off.
"""

from __future__ import annotations

import os
import threading
from datetime import timedelta

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from pydantic import Field

from forebay.kit.config import Duration, Settings

EXIT_SECONDS = 4.0
"""Most time spent on the last spans. The SDK alone would wait 30 s for a collector that is gone; an exit
that takes longer than 5 s is taken for a hang."""


class TelemetrySettings(Settings):
    """Where traces go."""

    otlp_endpoint: str = Field(
        default="",
        description="OTLP gRPC endpoint, such as `http://127.0.0.1:4317`. Empty takes "
        "OTEL_EXPORTER_OTLP_ENDPOINT, and is off where that is unset too. OTEL_TRACES_SAMPLER sets sampling.",
    )
    export_timeout: Duration = Field(
        default=timedelta(seconds=2), description="How long one export may take before its spans are dropped."
    )


class Telemetry:
    """The tracer of a process, and the way to end it."""

    def __init__(self, tracer: trace.Tracer, provider: TracerProvider | None = None) -> None:
        self.tracer = tracer
        self._provider = provider

    @property
    def enabled(self) -> bool:
        """Whether spans are recorded."""
        return self._provider is not None

    def shutdown(self) -> None:
        """Exports what is left, for at most `EXIT_SECONDS`, and stops."""
        if self._provider is None:
            return
        # A thread, because the SDK's own shutdown has no bound that reaches an export in progress.
        thread = threading.Thread(target=self._provider.shutdown, name="telemetry-shutdown", daemon=True)
        thread.start()
        thread.join(EXIT_SECONDS)


def off() -> Telemetry:
    """Returns telemetry that records nothing."""
    return Telemetry(trace.NoOpTracerProvider().get_tracer("forebay"))


def setup(service_name: str, settings: TelemetrySettings) -> Telemetry:
    """Starts telemetry for this process.

    Args:
        service_name: `service.name` of the resource, such as `forebay-orchestrator`.
        settings: where to send spans.
    """
    endpoint = (
        settings.otlp_endpoint
        or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    )
    if not endpoint:
        return off()
    exporter = OTLPSpanExporter(
        endpoint=endpoint,
        insecure=not endpoint.startswith("https://"),
        timeout=settings.export_timeout.total_seconds(),
    )
    resource = Resource.create({"service.name": service_name, "service.namespace": "forebay"})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Telemetry(provider.get_tracer("forebay"), provider)
