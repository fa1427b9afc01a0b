"""Metrics and spans of a process: what they are called, what they hold, and who may read them."""

from __future__ import annotations

import asyncio
import http.client
import socket
import time
from collections.abc import Iterator
from typing import Any

import grpc.aio
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.metrics.export import MetricExportResult, MetricsData
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit import genai, metrics, process, telemetry
from forebay.kit.config import ServerSettings
from forebay.kit.failure import BackendError, CallerLeft, Internal, InvalidRequest
from forebay.kit.metrics import MOST_MODELS, OTHER, Metrics
from forebay.kit.pipeline import Call, Event, Request
from forebay.kit.push import Pusher
from forebay.kit.spans import Ending, ending_of
from forebay.kit.telemetry import Telemetry, TelemetrySettings
from forebay.testing.calls import ask
from forebay.testing.otlp import OtlpReceiver
from forebay.upstream.errors import UpstreamError
from forebay.upstream.http import Upstream


@pytest.fixture
def measured() -> Iterator[Telemetry]:
    made = telemetry.setup("forebay-mlx", TelemetrySettings(), metrics_address="127.0.0.1:0")
    yield made
    made.shutdown()


def get(found: Telemetry, path: str = "/metrics", **headers: str) -> tuple[int, str]:
    assert found.page is not None
    connection = http.client.HTTPConnection(found.page.address, timeout=10)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def value(text: str, series: str, **labels: str) -> float | None:
    """Returns a sample of a page, found by its name and some of its labels."""
    for line in text.splitlines():
        name, _, rest = line.partition("{")
        if name == series and all(f'{key}="{wanted}"' in rest for key, wanted in labels.items()):
            return float(line.rpartition(" ")[2])
    return None


# Metrics.


def test_every_metric_has_the_name_that_the_catalog_tells(measured: Telemetry) -> None:
    for metric in metrics.CATALOG:
        labels = dict.fromkeys(metric.labels, "x")
        if metric.kind == "counter":
            measured.metrics.add(metric, labels)
        elif metric.kind == "histogram":
            measured.metrics.record(metric, 1, labels)
        else:
            measured.metrics.observe(metric, lambda labels=labels: [(1, labels)])  # type: ignore[misc]  # bound here
    status, text = get(measured)
    assert status == 200
    shown = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")}
    assert shown - {"target_info"} == {series for metric in metrics.CATALOG for series in metric.series}


def test_a_histogram_has_the_buckets_of_the_catalog(measured: Telemetry) -> None:
    measured.metrics.record(metrics.FIRST_TOKEN, 200, {"gen_ai.request.model": "m"})
    _, text = get(measured)
    bucket = "gen_ai_server_time_to_first_token_seconds_bucket"
    assert value(text, bucket, le="160") == 0
    assert value(text, bucket, le="320") == 1


def test_models_that_never_answered_make_no_series_and_those_that_did_not_too_many() -> None:
    found = Metrics()
    assert found.label("made-up") == OTHER
    for number in range(MOST_MODELS + 5):
        found.admit(f"m{number}")
    assert found.label("m0") == "m0"
    assert found.label(f"m{MOST_MODELS}") == OTHER
    assert found.admit("") == OTHER


def test_gauges_of_several_sources_are_shown_together(measured: Telemetry) -> None:
    for name in ("a", "b"):
        measured.metrics.observe(
            metrics.BACKEND_ACTIVE, lambda name=name: [(2, {"forebay.backend": name})]  # type: ignore[misc]  # bound
        )  # fmt: skip
    _, text = get(measured)
    assert value(text, "forebay_backend_calls_active", forebay_backend="a") == 2
    assert value(text, "forebay_backend_calls_active", forebay_backend="b") == 2


# The page.


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:99"])
def test_the_page_is_for_scrapers_of_this_machine(measured: Telemetry, host: str) -> None:
    assert get(measured, Host=host)[0] == 200


@pytest.mark.parametrize(
    "headers",
    [{"Host": "evil.example"}, {"Host": "orchestrator"}, {"Host": "[::1"}, {"Host": ""}, {"Origin": "http://localhost"}],
)  # fmt: skip
def test_the_page_is_not_for_web_pages(measured: Telemetry, headers: dict[str, str]) -> None:
    status, text = get(measured, **headers)
    assert status == 403
    assert "target_info" not in text


def test_there_is_no_other_page(measured: Telemetry) -> None:
    assert get(measured, "/")[0] == 404
    assert get(measured, "/metrics?x=1")[0] == 200


def test_a_name_that_was_allowed_may_ask() -> None:
    found = telemetry.setup(
        "forebay-x", TelemetrySettings(), metrics_address="127.0.0.1:0", metrics_hosts=("orchestrator",)
    )
    try:
        assert get(found, Host="orchestrator:50250")[0] == 200
        assert get(found, Host="other")[0] == 403
    finally:
        found.shutdown()


def test_a_scraper_that_leaves_costs_nothing(measured: Telemetry) -> None:
    assert measured.page is not None
    host, _, port = measured.page.address.rpartition(":")
    with socket.create_connection((host, int(port))) as half:
        half.sendall(b"GET /metrics HTTP/1.1\r\n")
    assert get(measured)[0] == 200


def test_the_address_must_be_a_port_of_this_machine_unless_that_is_said() -> None:
    for address in ("0.0.0.0:1", "unix:/tmp/x"):
        with pytest.raises(ValueError, match="metrics_address"):
            ServerSettings(metrics_address=address)
    assert ServerSettings(metrics_address="0.0.0.0:1", insecure_listen=True).metrics_address == "0.0.0.0:1"


def test_a_taken_address_ends_the_process_with_one_line(
    measured: Telemetry, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(settings: ServerSettings, telemetry: Telemetry) -> None:
        raise AssertionError("it must not begin to serve")

    assert measured.page is not None
    monkeypatch.setenv("FOREBAY_MLX__METRICS_ADDRESS", measured.page.address)
    monkeypatch.setattr("forebay.kit.logs.setup", lambda settings, *, service: None)
    assert process.main("mlx", ServerSettings, never, []) == process.EX_UNAVAILABLE
    assert f"metrics_address {measured.page.address} cannot be bound" in capsys.readouterr().err


# Where it goes.


async def test_metrics_are_pushed_to_a_collector() -> None:
    async with OtlpReceiver() as otlp:
        settings = TelemetrySettings.model_validate(
            {"otlp_endpoint": otlp.endpoint, "metrics_interval": "100ms"}
        )
        found = telemetry.setup("forebay-x", settings)
        found.metrics.add(metrics.RETRIES, {"forebay.backend": "a", "error.type": "X"}, 3)
        async with asyncio.timeout(15):
            while not otlp.points("forebay.retries"):
                await asyncio.sleep(0.02)
        (point,) = otlp.points("forebay.retries")
        assert (point.service, point.value) == ("forebay-x", 3)
        await asyncio.to_thread(found.shutdown)


class Asked(grpc.aio.ServerInterceptor):
    """Notes which methods were called."""

    def __init__(self) -> None:
        self.methods: list[str] = []

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        self.methods.append(details.method)
        return await continuation(details)


NO_FIGURES = MetricsData(resource_metrics=[])


async def test_a_collector_of_traces_alone_is_asked_once_and_not_pushed_to(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    asked = Asked()
    server = grpc.aio.server(interceptors=[asked])  # without a service for metrics, as a Jaeger
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pusher = Pusher(f"http://127.0.0.1:{port}", timeout=30)
    for _ in range(3):
        assert await asyncio.to_thread(pusher.export, NO_FIGURES) is MetricExportResult.SUCCESS
    assert len(asked.methods) == 1
    assert caplog.messages == [f"127.0.0.1:{port} takes no metrics, as Jaeger does not: only traces go there"]
    pusher.shutdown()
    await server.stop(None)


async def test_a_collector_that_was_away_is_asked_again() -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    pusher = Pusher(f"http://{address}", timeout=1)
    assert await asyncio.to_thread(pusher.export, NO_FIGURES) is MetricExportResult.FAILURE
    server = grpc.aio.server()
    server.add_insecure_port(address)
    await server.start()
    async with asyncio.timeout(60):
        while await asyncio.to_thread(pusher.export, NO_FIGURES) is MetricExportResult.FAILURE:
            pass
    pusher.shutdown()
    await server.stop(None)


def test_a_collector_over_tls_is_not_asked_without_its_certificates() -> None:
    pusher = Pusher("https://127.0.0.1:1", timeout=0.1)
    assert pusher.export(NO_FIGURES) is MetricExportResult.FAILURE
    pusher.shutdown()


@pytest.mark.parametrize("silenced", ["TRACES", "METRICS"])
def test_the_standards_variables_silence_a_signal(monkeypatch: pytest.MonkeyPatch, silenced: str) -> None:
    monkeypatch.setenv(f"OTEL_{silenced}_EXPORTER", "none")
    found = telemetry.setup("x", TelemetrySettings(otlp_endpoint="http://127.0.0.1:1"))
    assert found.enabled is (silenced != "TRACES")
    assert found.metrics.enabled is (silenced != "METRICS")
    found.shutdown()


def test_sampling_is_set_by_the_standards_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    found = telemetry.setup("x", TelemetrySettings(otlp_endpoint="http://127.0.0.1:1"))
    assert not found.tracer.start_span("x").is_recording()
    found.shutdown()


def test_a_dead_collector_of_traces_and_metrics_delays_leaving_by_five_seconds_at_most() -> None:
    with socket.socket() as silent:  # accepts connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        found = telemetry.setup("x", TelemetrySettings(otlp_endpoint=endpoint), metrics_address="127.0.0.1:0")
        found.tracer.start_span("x").end()
        found.metrics.add(metrics.RETRIES, {})
        begin = time.monotonic()
        found.shutdown()
        assert time.monotonic() - begin < 5


def test_outside_of_a_call_there_is_nothing_to_record_with() -> None:
    assert not telemetry.current().enabled


# Spans.


class Spans:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.telemetry = Telemetry(provider.get_tracer("test"), provider)

    def one(self) -> ReadableSpan:
        (span,) = self.exporter.get_finished_spans()
        return span


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (asyncio.CancelledError(), Ending("CANCELLED", "CANCELLED")),
        (InvalidRequest("x"), Ending("INVALID_ARGUMENT", "INVALID_REQUEST")),
        (CallerLeft("x"), Ending("CANCELLED", "CALLER_LEFT")),
        (BackendError("x"), Ending(BackendError.code.name, "BACKEND_ERROR", True)),
        (Internal("x"), Ending("INTERNAL", "INTERNAL", True)),
        (ZeroDivisionError("secret"), Ending("INTERNAL", "ZeroDivisionError", True)),
    ],
)
def test_only_what_the_server_did_wrong_is_its_error(error: BaseException, ending: Ending) -> None:
    assert ending_of(error) == ending


async def nowhere(event: Event) -> None:
    """Takes an event."""


async def test_a_requests_parameters_are_on_its_span_and_its_words_are_not() -> None:
    spans = Spans()
    request = ask("the secret prompt", model="m\n" * 100)
    request.sampling.temperature = 0.5
    request.sampling.top_k = 7
    request.sampling.logit_bias[3] = 1.0
    request.limits.max_output_token_count = 9
    request.limits.stop_sequences.append("the secret stop")
    request.output_format.json_schema = '{"title": "the secret schema"}'
    call: Call[Request] = Call(request=request)
    with genai.requested(spans.telemetry, call, nowhere, framework=lambda name: "mlx") as watched:
        await watched(
            pb.GenerateResponse(progress=pb.Progress(stage=pb.Progress.STAGE_QUEUED, queue_position=2))
        )
        await watched(
            pb.GenerateResponse(progress=pb.Progress(stage=pb.Progress.STAGE_QUEUED, queue_position=1))
        )
        await watched(pb.GenerateResponse(progress=pb.Progress(stage=pb.Progress.STAGE_LOADING)))
        started = pb.Started(backend="b", model="m")
        started.degradations.add(kind=pb.DEGRADATION_KIND_OPTION_IGNORED, detail="the secret option")
        started.degradations.add(kind=99)  # type: ignore[arg-type]  # a newer peer's
        await watched(pb.GenerateResponse(started=started))
        await watched(pb.GenerateResponse(delta=pb.Delta(text="the secret answer", token_count=2)))
        finished = pb.Finished(reason=pb.FINISH_REASON_STOP, stop_sequence="the secret stop")
        finished.usage.prompt_token_count = 5
        finished.usage.cached_token_count = 3
        finished.usage.reasoning_token_count = 1
        finished.usage.output_token_count = 2
        finished.timings.load_duration.FromMilliseconds(1500)
        await watched(pb.GenerateResponse(finished=finished))
    span = spans.one()
    assert "secret" not in span.to_json()
    assert span.name.startswith("chat m")
    assert len(span.name) < 150
    assert "\n" not in span.name
    assert [event.name for event in span.events] == [
        "forebay.queued", "forebay.loading", "forebay.first_delta"
    ]  # fmt: skip
    found = dict(span.attributes or {})
    assert (
        found.items()
        >= {
            "gen_ai.provider.name": "mlx",
            "gen_ai.request.temperature": 0.5,
            "gen_ai.request.top_k": 7,
            "gen_ai.request.max_tokens": 9,
            "gen_ai.request.stream": True,
            "gen_ai.output.type": "json",
            "gen_ai.response.finish_reasons": ("stop",),
            "gen_ai.usage.cache_read.input_tokens": 3,
            "gen_ai.usage.reasoning.output_tokens": 1,
            "forebay.load.seconds": 1.5,
            "forebay.degradations": ("option_ignored", "other"),
        }.items()
    )


async def test_what_came_of_a_broken_answer_is_still_told() -> None:
    spans = Spans()
    call: Call[Request] = Call(request=ask(model="m"), tried=frozenset({"a"}))

    async def broken() -> None:
        with genai.attempted(spans.telemetry, call, nowhere, backend="b", address="unix:/run/x") as watched:
            await watched(pb.GenerateResponse(delta=pb.Delta(text="x", token_count=4)))
            raise BackendError("gone")

    with pytest.raises(BackendError):
        await broken()
    found = dict(spans.one().attributes or {})
    assert found["gen_ai.usage.output_tokens"] == 4
    assert found["server.address"] == "/run/x"
    assert found["forebay.attempt"] == 2
    assert found["error.type"] == "BACKEND_ERROR"


async def test_what_is_served_is_measured(measured: Telemetry) -> None:
    call: Call[Request] = Call(request=ask(model="m"))
    span = trace.INVALID_SPAN
    with genai.served(measured, span, call, nowhere) as watched:
        await watched(pb.GenerateResponse(started=pb.Started(backend="b", model="m")))
        await watched(pb.GenerateResponse(delta=pb.Delta(text="x", token_count=1)))
        await asyncio.sleep(0.002)
        await watched(pb.GenerateResponse(delta=pb.Delta(text="x", token_count=9)))
        finished = pb.Finished()
        finished.usage.prompt_token_count = 5
        finished.usage.cached_token_count = 4
        finished.usage.output_token_count = 10
        finished.timings.queue_duration.FromMilliseconds(50)
        finished.timings.prefill_duration.FromMilliseconds(70)
        await watched(pb.GenerateResponse(finished=finished))
    with pytest.raises(BackendError), genai.served(measured, span, Call(request=ask(model="made-up"))):
        raise BackendError("x")
    with genai.served(measured, span, Call(request=pb.EmbedRequest(model="m"))) as watched:
        watched.note(pb.EmbedResponse(backend="b", model="m"))
    _, text = get(measured)
    duration = "gen_ai_server_request_duration_seconds_count"
    assert value(text, duration, gen_ai_operation_name="chat", gen_ai_request_model="m", error_type="") == 1
    assert value(text, duration, gen_ai_request_model=OTHER, error_type="BACKEND_ERROR") == 1
    assert value(text, duration, gen_ai_operation_name="embeddings", gen_ai_provider_name="mlx") == 1
    assert value(text, "forebay_tokens_total", gen_ai_token_type="output") == 10
    assert value(text, "forebay_tokens_total", gen_ai_token_type="input_cached") == 4
    assert value(text, "forebay_cache_lookups_total", forebay_cache_result="hit") == 1
    assert value(text, "forebay_queue_duration_seconds_sum", gen_ai_request_model="m") == 0.05
    assert value(text, "forebay_prefill_duration_seconds_sum") == 0.07
    assert value(text, "forebay_generation_rate_per_second_count") == 1
    assert "made-up" not in text


# To a framework.


async def test_a_call_to_a_framework_has_a_span_and_carries_the_trace() -> None:
    seen: list[str | None] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers.get("traceparent"))
        assert "baggage" not in request.headers
        return web.json_response({}, status=200 if request.method == "POST" else 404)

    app = web.Application()
    app.router.add_post("/api/chat", answer)
    app.router.add_get("/api/show/{name}", answer)
    spans = Spans()
    allowed = ("POST /api/chat", "GET /api/show/{}")
    async with TestServer(app) as server, Upstream(str(server.make_url("")), allowed=allowed, name="o") as up:
        await up.post_json("/api/chat", json={})  # what a bridge asks by itself
        token = otel_context.attach(spans.telemetry.attached(otel_context.get_current()))
        try:
            await up.post_json("/api/chat", json={"prompt": "secret"})
            with pytest.raises(UpstreamError):
                await up.get_json("/api/show/{}", "secret")
        finally:
            otel_context.detach(token)
    chat, show = spans.exporter.get_finished_spans()
    assert [chat.name, show.name] == ["POST /api/chat", "GET /api/show/{}"]
    assert chat.context is not None
    assert seen[0] is None
    assert seen[1] is not None
    assert seen[1].split("-")[2] == f"{chat.context.span_id:016x}"
    assert (chat.attributes or {})["http.response.status_code"] == 200
    assert (show.attributes or {})["error.type"] == "UpstreamError"
    assert show.status.status_code.name == "ERROR"
    assert "secret" not in chat.to_json() + show.to_json()
