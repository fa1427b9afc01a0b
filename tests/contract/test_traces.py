"""One request is one story: a single trace, the right parents, the error on the right span, and no text."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import psutil
import pytest
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider

import llama
import tiny_models
from contract.orchestrator_mesh import Mesh, reason, until
from forebay.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.telemetry import Telemetry
from forebay.testing import grammar
from forebay.testing.calls import ask, with_options
from forebay.testing.client import Client, client
from forebay.testing.otlp import OtlpReceiver, Span
from forebay.testing.processes import ServiceProcess
from forebay.testing.scripted import ScriptedEngine

GENERATE = "forebay.inference.v1.InferenceService/Generate"
SECRET = "swordfish-7391"
TRACE = "0af7651916cd43dd8448eb211c80319c"
TOLERANCE = 20_000_000
"""Nanoseconds by which the clocks of two processes of one machine may seem to differ."""


# The eight endings.


class Counted(SpanProcessor):
    """Counts beginnings and ends of each span."""

    def __init__(self) -> None:
        self.started: Counter[int] = Counter()
        self.ended: Counter[int] = Counter()
        self.spans: list[ReadableSpan] = []

    def on_start(self, span: ReadableSpan, parent_context: object = None) -> None:
        assert span.context is not None
        self.started[span.context.span_id] += 1

    def on_end(self, span: ReadableSpan) -> None:
        assert span.context is not None
        self.ended[span.context.span_id] += 1
        self.spans.append(span)

    def one(self, name: str, kind: str) -> ReadableSpan:
        (found,) = [span for span in self.spans if span.name == name and span.kind.name == kind]
        return found


@dataclass(frozen=True)
class Expected:
    """What the three spans of a call say at its end: `error.type`, and whether it is an error."""

    chat: tuple[str, bool] = ("", False)
    attempt: tuple[str, bool] = ("", False)
    code: str = "OK"
    options: dict[str, str | float] = field(default_factory=dict)
    first_delta: bool = True


CANCELLED = ("CANCELLED", False)
SLOW = {"token_count": 5000, "token_delay": "5ms"}
ENDINGS = {
    "ok": Expected(),
    "error": Expected(
        ("BACKEND_UNAVAILABLE", True), ("BACKEND_UNAVAILABLE", True), "UNAVAILABLE",
        {"fault": "UNAVAILABLE@before"}, first_delta=False,
    ),
    "cancelled before the first token": Expected(
        CANCELLED, CANCELLED, "CANCELLED", {"first_delay": "1h"}, first_delta=False
    ),
    "cancelled after the first token": Expected(CANCELLED, CANCELLED, "CANCELLED", SLOW),
    "task cancelled": Expected(CANCELLED, CANCELLED, "CANCELLED", SLOW),
    "deadline": Expected(
        ("DEADLINE_EXCEEDED", False), CANCELLED, "DEADLINE_EXCEEDED", {"first_delay": "1h"}, first_delta=False
    ),
    "never read": Expected(("DEADLINE_EXCEEDED", False), CANCELLED, "DEADLINE_EXCEEDED", SLOW),
    "peer died": Expected(("STREAM_INTERRUPTED", True), ("STREAM_INTERRUPTED", True), "ABORTED", SLOW),
}  # fmt: skip


async def play(mesh: Mesh, ending: str, request: pb.GenerateRequest) -> None:
    """Makes a call end in a way."""
    # Long enough for a margin before it that is longer than a loaded machine may stall.
    timeout = 2.0 if ending in {"deadline", "never read"} else 20
    call = mesh.client.Generate(request, timeout=timeout)

    async def read() -> None:
        async for event in call:
            if not event.HasField("delta"):
                continue
            if ending == "cancelled after the first token":
                call.cancel()
            elif ending == "task cancelled":
                reading.set()
            elif ending == "peer died":
                dying.set()

    reading, dying = asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        if ending == "task cancelled":
            task = tasks.create_task(read())
            await reading.wait()
            task.cancel()
            return
        if ending == "cancelled before the first token":
            tasks.create_task(_later(call, mesh))
        if ending == "peer died":
            tasks.create_task(_die(dying, mesh))
        try:
            if ending == "never read":
                await call.code()
            else:
                await read()
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            assert ending != "ok"


async def _later(call: grpc.aio.UnaryStreamCall[object, object], mesh: Mesh) -> None:
    await until(lambda: mesh.fleet["a"].active > 0)
    call.cancel()


async def _die(dying: asyncio.Event, mesh: Mesh) -> None:
    await dying.wait()
    up = mesh["a"].up
    assert up is not None
    await up._server.stop(0)


@pytest.mark.parametrize("ending", ENDINGS)
async def test_however_a_call_ends_each_span_ends_once_and_says_how(tmp_path: Path, ending: str) -> None:
    expected = ENDINGS[ending]
    counted = Counted()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(counted)
    telemetry = Telemetry(provider.get_tracer("test"), provider)
    engine = ScriptedEngine(name="a", models=["m"])
    async with Mesh(
        tmp_path, engine, telemetry=telemetry, retry={"max_attempts": 1}, deadline_margin="1s"
    ) as mesh:
        await play(mesh, ending, with_options(ask(SECRET, model="m"), **expected.options))
        await until(
            lambda: any(span.name == GENERATE and span.kind.name == "SERVER" for span in counted.spans)
        )
        server, chat = counted.one(GENERATE, "SERVER"), counted.one("chat m", "CLIENT")
        attempt = counted.one(GENERATE, "CLIENT")
    assert set(counted.started) == set(counted.ended)
    assert {*counted.started.values(), *counted.ended.values()} == {1}
    for span, (error, is_error) in ((chat, expected.chat), (attempt, expected.attempt)):
        assert span.attributes is not None
        assert span.attributes.get("error.type", "") == error, span.name
        assert (span.status.status_code.name == "ERROR") is is_error
    assert server.attributes is not None
    assert server.attributes["rpc.response.status_code"] == expected.code
    assert ("forebay.first_delta" in [event.name for event in chat.events]) is expected.first_delta
    assert SECRET not in "".join(span.to_json() for span in counted.spans)


# Across real processes.


@asynccontextmanager
async def processes(
    folder: Path, otlp: OtlpReceiver, backend: ServiceProcess, framework: str, config: str = ""
) -> AsyncIterator[tuple[Client, ServiceProcess]]:
    """Runs a backend and an orchestrator that report to the receiver, once calls can be served."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(backend)
        (folder / "o.toml").write_text(
            f'[telemetry]\notlp_endpoint = "{otlp.endpoint}"\n{config}[orchestrator]\n'
            f'address = "127.0.0.1:0"\n[[orchestrator.backends]]\nname = "{framework}"\n'
            f'framework = "{framework}"\naddress = "{backend.address}"\n'
        )
        orchestrator = await stack.enter_async_context(
            ServiceProcess(
                "forebay.orchestrator", ["--config", str(folder / "o.toml")], environment=QUICK_EXPORT
            )
        )
        peer = await stack.enter_async_context(client(orchestrator.address, timeout=60))
        fleet = fleet_pb2_grpc.FleetServiceStub(peer.channel)
        async with asyncio.timeout(60):
            while True:
                (found,) = (await fleet.ListBackends(fleet_pb2.ListBackendsRequest())).backends
                if found.state == fleet_pb2.Backend.STATE_ACTIVE and found.models:
                    break
                await asyncio.sleep(0.05)
        yield peer, orchestrator


QUICK_EXPORT = {"OTEL_BSP_SCHEDULE_DELAY": "100"}


async def traced(peer: Client, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    """Returns a reply to a caller that has a trace of its own."""
    metadata = grpc.aio.Metadata(("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01"))
    return [event async for event in peer.inference.Generate(request, timeout=60, metadata=metadata)]


def chain(spans: list[Span]) -> list[Span]:
    """Returns the spans from the root down, which must be a single line without a branch."""
    below = {span.parent: span for span in spans}
    assert len(below) == len(spans), [(span.service, span.name, span.parent) for span in spans]
    line = [below["00f067aa0ba902b7"]]
    while (found := below.get(line[-1].span_id)) is not None:
        line.append(found)
    assert len(line) == len(spans)
    for outer, inner in itertools.pairwise(line):
        assert outer.start - TOLERANCE <= inner.start <= inner.end <= outer.end + TOLERANCE
    return line


def says_nothing_of(spans: list[Span], *texts: str) -> None:
    shown = repr(spans)
    for text in texts:
        assert text
        assert text not in shown


async def killed_in_the_middle(peer: Client, request: pb.GenerateRequest, service: psutil.Process) -> None:
    (worker,) = [each for each in service.children(recursive=True) if "worker" in " ".join(each.cmdline())]
    killed = False
    async with peer.stream(request) as stream:
        async for event in stream:
            if event.HasField("delta") and not killed:
                killed = True  # more deltas may be on their way already
                worker.kill()


@pytest.mark.mlx
async def test_a_chat_through_orchestrator_service_and_worker_is_one_trace(tmp_path: Path) -> None:
    pytest.importorskip("mlx.core", reason="MLX has no build for this machine")
    tiny_models.build_random(tmp_path / "models" / "tiny", context=8192, plain=True)
    (tmp_path / "m.toml").write_text(
        f'[mlx]\nmodel_folders = ["{tmp_path / "models"}"]\npreload = ["tiny"]\nfetch_default_model = false\n'
        f'cache_dir = "{tmp_path / "cache"}"\nhuggingface_cache = false\n'
    )
    async with OtlpReceiver() as otlp:
        mlx = ServiceProcess(
            "forebay.mlx_service",
            ["--config", str(tmp_path / "m.toml"), "--address", "127.0.0.1:0"],
            environment={**QUICK_EXPORT, "FOREBAY_TELEMETRY__OTLP_ENDPOINT": otlp.endpoint},
        )
        async with processes(tmp_path, otlp, mlx, "mlx") as (peer, _):
            request = ask(f"{SECRET} " * 40, model="tiny")
            request.limits.max_output_token_count = 20
            request.limits.stop_sequences.append("no-such-stop")
            request.sampling.temperature = 0
            events = await traced(peer, request)
            spans = chain(await otlp.wait_for(6, trace_id=TRACE))
            assert [(span.service.removeprefix("forebay-"), span.kind) for span in spans] == [
                ("orchestrator", "SERVER"),
                ("orchestrator", "CLIENT"),
                ("orchestrator", "CLIENT"),
                ("mlx", "SERVER"),
                ("mlx", "CLIENT"),
                ("mlx-worker", "SERVER"),
            ]
            chat, worker = spans[1], spans[-1]
            assert chat.name == "chat tiny"
            assert (
                chat.attributes.items()
                >= {
                    "gen_ai.operation.name": "chat",
                    "gen_ai.provider.name": "mlx",
                    "gen_ai.request.model": "tiny",
                    "gen_ai.response.model": "tiny",
                    "gen_ai.request.max_tokens": 20,
                    "gen_ai.request.temperature": 0.0,
                    "gen_ai.response.finish_reasons": ("length",),
                    "gen_ai.usage.input_tokens": events[-1].finished.usage.prompt_token_count,
                    "gen_ai.usage.output_tokens": 20,
                    "forebay.backend": "mlx",
                }.items()
            )
            first = chat.attributes["gen_ai.response.time_to_first_chunk"]
            assert isinstance(first, float)
            assert 0 < first <= (chat.end - chat.start) / 1e9
            assert "forebay.route" in [name for name, _ in chat.events]
            assert {"forebay.prefilling", "forebay.first_delta"} <= {name for name, _ in worker.events}
            parts = [
                worker.attributes[f"forebay.{name}.seconds"] for name in ("queue", "prefill", "generation")
            ]
            # What the worker tells of its time fits into its span, and its span into the request's.
            assert (
                sum(part for part in parts if isinstance(part, float))
                <= (worker.end - worker.start + TOLERANCE) / 1e9
            )
            says_nothing_of(spans, SECRET, grammar.text(events), "no-such-stop")

            # And a worker that is killed in the middle: the error is on the way to it, and on nothing else.
            request.limits.max_output_token_count = 6000
            request.limits.ClearField("stop_sequences")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await killed_in_the_middle(peer, request, psutil.Process(mlx.pid))
            assert reason(caught.value) == "STREAM_INTERRUPTED"
            broken = [span for span in await otlp.wait_for(11) if span.trace_id != TRACE]
            assert len(broken) == 5
            assert {span.service for span in broken} == {"forebay-orchestrator", "forebay-mlx"}
            assert {(span.status, span.attributes["error.type"]) for span in broken} == {
                ("ERROR", "STREAM_INTERRUPTED")
            }
            lowest = max(broken, key=lambda span: span.start)
            assert (lowest.service, lowest.kind) == ("forebay-mlx", "CLIENT")


@pytest.mark.llama
@pytest.mark.skipif(llama.find() is None, reason=llama.MISSING)
async def test_a_chat_through_orchestrator_bridge_and_llama_server_is_one_trace(tmp_path: Path) -> None:
    model = llama.write_scripted(tmp_path / "says.gguf", ["the", " mill", " turns"])
    with llama.llama_server(tmp_path, "--alias", "says", "-c", "2048", "-np", "1", model=model) as server:
        async with OtlpReceiver() as otlp:
            bridge = ServiceProcess(
                "forebay.openai_bridge",
                ["--address", "127.0.0.1:0"],
                folder=tmp_path,
                environment={
                    **QUICK_EXPORT,
                    "FOREBAY_TELEMETRY__OTLP_ENDPOINT": otlp.endpoint,
                    "FOREBAY_OPENAI__BASE_URL": server.url,
                },
            )
            async with processes(tmp_path, otlp, bridge, "openai") as (peer, _):
                request = ask(SECRET, model="says")
                events = await traced(peer, request)
                assert grammar.text(events) == "the mill turns"
                await otlp.wait_for(1, "POST /v1/chat/completions", trace_id=TRACE)
                spans = await otlp.wait_for(5, trace_id=TRACE)
                by_id = {span.span_id: span for span in spans}
                (http,) = [span for span in spans if span.name == "POST /v1/chat/completions"]
                assert (http.service, http.kind, http.status) == ("forebay-openai", "CLIENT", "UNSET")
                assert http.attributes["http.response.status_code"] == 200
                assert by_id[http.parent].kind == "SERVER"
                line = chain([span for span in spans if not span.attributes.get("http.request.method")])
                assert [span.service for span in line] == ["forebay-orchestrator"] * 3 + ["forebay-openai"]
                assert line[1].attributes["gen_ai.provider.name"] == "openai"
                says_nothing_of(spans, SECRET, "mill")
                # What the bridge asks by itself all the time is nobody's trace.
                assert {span.trace_id for span in otlp.spans()} == {TRACE}
