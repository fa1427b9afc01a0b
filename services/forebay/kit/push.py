"""Pushes metrics to a collector that takes them.

An endpoint for OTLP need not take every signal: a Jaeger takes traces alone.
It is asked once, instead of being told in vain at every interval, with an
error in the log each time.
"""

from __future__ import annotations

import logging
from urllib.parse import urlsplit

import grpc
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.sdk.metrics.export import MetricExportResult, MetricsData

logger = logging.getLogger(__name__)

_LATER = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}


class Pusher(OTLPMetricExporter):
    """Exports metrics until the collector has said that it knows of none.

    Args:
        endpoint: where the collector listens, such as `http://127.0.0.1:4317`.
        timeout: seconds that one export may take.
    """

    def __init__(self, endpoint: str, *, timeout: float) -> None:
        is_plain = not endpoint.startswith("https://")
        super().__init__(endpoint=endpoint, insecure=is_plain, timeout=timeout)
        self._collector = urlsplit(endpoint).netloc or endpoint
        self._seconds = timeout
        # Over TLS it may want certificates that only the exporter knows of.
        self._is_asked = not is_plain
        self._is_refused = False

    def export(
        self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: object
    ) -> MetricExportResult:
        """Sends metrics, unless nobody takes them."""
        if not self._is_asked:
            self._ask()
        if self._is_refused:
            return MetricExportResult.SUCCESS
        return super().export(metrics_data, timeout_millis, **kwargs)

    def _ask(self) -> None:
        """Finds out whether the collector takes metrics. One that does not answer is asked again."""
        code = grpc.StatusCode.OK
        with grpc.insecure_channel(self._collector) as channel:
            stub = metrics_service_pb2_grpc.MetricsServiceStub(channel)  # type: ignore[no-untyped-call]  # no stubs
            try:
                stub.Export(metrics_service_pb2.ExportMetricsServiceRequest(), timeout=self._seconds)
            except grpc.RpcError as error:
                code = error.code()
        self._is_asked = code not in _LATER
        self._is_refused = code is grpc.StatusCode.UNIMPLEMENTED
        if self._is_refused:
            logger.info("%s takes no metrics, as Jaeger does not: only traces go there", self._collector)
