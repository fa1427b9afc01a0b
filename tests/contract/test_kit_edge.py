"""The edge and the server, met as a caller meets them: over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc
from forebay.kit import rpc
from forebay.kit.channel import connect
from forebay.kit.config import ServerSettings
from forebay.kit.engine import SendLoad, SendPull
from forebay.kit.failure import BackendError, CallerLeft, ContextExceeded, Failure, ModelNotFound, QueueFull
from forebay.kit.pipeline import Call, Send
from forebay.kit.server import Serving, StartError, serving
from forebay.kit.telemetry import Telemetry
from forebay.models.v1 import models_pb2 as models_pb
from forebay.models.v1 import models_pb2_grpc

Generate = Callable[[Call[pb.GenerateRequest], Send], Awaitable[None]]


def started() -> pb.GenerateResponse:
    return pb.GenerateResponse(started=pb.Started(backend="here", model="m"))


def delta(text: str = "x") -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.Delta(text=text))


def finished() -> pb.GenerateResponse:
    return pb.GenerateResponse(finished=pb.Finished(reason=pb.FINISH_REASON_STOP))


async def three(call: Call[pb.GenerateRequest], send: Send) -> None:
    for event in (started(), delta(), finished()):
        await send(event)


class Engine:
    """An engine whose one interesting method is given."""

    def __init__(self, generate: Generate = three) -> None:
        self._generate = generate
        self.calls: list[Call[Any]] = []

    async def generate(self, call: Call[pb.GenerateRequest], send: Send) -> None:
        self.calls.append(call)
        await self._generate(call, send)

    async def embed(self, call: Call[pb.EmbedRequest]) -> pb.EmbedResponse:
        self.calls.append(call)
        return pb.EmbedResponse(embeddings=[pb.Embedding(values=[1.0])])

    async def count_tokens(self, call: Call[pb.CountTokensRequest]) -> pb.CountTokensResponse:
        return pb.CountTokensResponse(token_count=3)

    async def list_models(self, request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[pb.Model(id="m")])

    async def get_model(self, request: models_pb.GetModelRequest) -> models_pb.GetModelResponse:
        return models_pb.GetModelResponse(model=pb.Model(id=request.model))

    async def load_model(self, request: models_pb.LoadModelRequest, send: SendLoad) -> None:
        await send(models_pb.LoadModelResponse(loaded=models_pb.ModelLoaded()))

    async def pull_model(self, request: models_pb.PullModelRequest, send: SendPull) -> None:
        await send(models_pb.PullModelResponse(pulled=models_pb.ModelPulled()))

    async def unload_model(self, request: models_pb.UnloadModelRequest) -> models_pb.UnloadModelResponse:
        return models_pb.UnloadModelResponse(model=pb.Model(id=request.model))

    async def delete_model(self, request: models_pb.DeleteModelRequest) -> models_pb.DeleteModelResponse:
        return models_pb.DeleteModelResponse()


def settings(**changes: Any) -> ServerSettings:
    return ServerSettings(**{"address": "127.0.0.1:0", "notice": timedelta(0), **changes})


@asynccontextmanager
async def mesh(
    engine: Engine, *, telemetry: Telemetry | None = None, **changes: Any
) -> AsyncIterator[tuple[Serving, inference_pb2_grpc.InferenceServiceAsyncStub, grpc.aio.Channel]]:
    async with serving(settings(**changes), inference=engine, models=engine, telemetry=telemetry) as up:
        await up.set_ready(True)
        async with connect(up.address) as channel:
            yield up, inference_pb2_grpc.InferenceServiceStub(channel), channel


def ask(**changes: Any) -> pb.GenerateRequest:
    message = pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="hi")])
    return pb.GenerateRequest(**{"model": "m", "messages": [message], **changes})


def detail(error: grpc.aio.AioRpcError, kind: Any) -> Any:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # it has the methods of a Call
    assert status is not None
    for item in status.details:
        if item.Is(kind.DESCRIPTOR):
            found = kind()
            item.Unpack(found)
            return found
    return None


async def test_events_are_numbered_without_gap() -> None:
    async with mesh(Engine()) as (_, stub, _channel):
        assert [event.sequence async for event in stub.Generate(ask())] == [0, 1, 2]


async def test_a_malformed_request_names_every_field() -> None:
    async with mesh(Engine()) as (_, stub, _channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(pb.GenerateRequest(sampling=pb.Sampling(top_k=0))).read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    bad = detail(caught.value, error_details_pb2.BadRequest)
    assert [v.field for v in bad.field_violations] == ["model", "messages", "sampling.top_k"]
    assert detail(caught.value, error_details_pb2.ErrorInfo).reason == "INVALID_REQUEST"


async def test_many_mistakes_are_summed_up() -> None:
    request = pb.GenerateRequest(limits=pb.GenerationLimits(stop_sequences=["", "", ""]))
    async with mesh(Engine()) as (_, stub, _channel):
        with pytest.raises(grpc.aio.AioRpcError, match="and 2 more"):
            await stub.Generate(request).read()


async def test_a_failure_before_the_first_event_is_a_typed_status() -> None:
    async def refuse(call: Call[pb.GenerateRequest], send: Send) -> None:
        raise QueueFull("full", metadata={"limit": "3"}, retry_after=timedelta(seconds=1.5))

    async with mesh(Engine(refuse)) as (_, stub, _channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(ask()).read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    info = detail(caught.value, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain, dict(info.metadata)) == ("QUEUE_FULL", "forebay", {"limit": "3"})
    retry = detail(caught.value, error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToTimedelta() == timedelta(seconds=1.5)


async def test_what_was_sent_before_a_failure_arrives() -> None:
    async def half(call: Call[pb.GenerateRequest], send: Send) -> None:
        await send(started())
        await send(delta())
        raise ContextExceeded("too long")

    async with mesh(Engine(half)) as (_, stub, _channel):
        stream = stub.Generate(ask())
        got = [await stream.read(), await stream.read()]
        with pytest.raises(grpc.aio.AioRpcError, match="too long"):
            await stream.read()
    assert [event.WhichOneof("event") for event in got] == ["started", "delta"]  # type: ignore[union-attr]


async def test_a_fault_of_ours_is_internal_and_keeps_its_text_at_home(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def crash(call: Call[pb.GenerateRequest], send: Send) -> None:
        raise RuntimeError("the secret prompt")

    async with mesh(Engine(crash)) as (_, stub, _channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(ask()).read()
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "RuntimeError" in str(caught.value.details())
    assert "secret" not in str(caught.value.details())
    assert any(record.levelno == logging.ERROR for record in caplog.records)


async def test_cancelling_while_nothing_is_sent_cancels_the_engine() -> None:
    entered, left = asyncio.Event(), asyncio.Event()

    async def wait(call: Call[pb.GenerateRequest], send: Send) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    async with mesh(Engine(wait)) as (up, stub, _channel):
        stream = stub.Generate(ask())
        await entered.wait()
        assert up.inflight.count == 1
        stream.cancel()
        async with asyncio.timeout(1):
            await left.wait()
            assert await up.inflight.wait_idle(1)


async def test_cancelling_while_the_engine_writes_ends_it_in_the_same_task() -> None:
    ended: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
    tasks: list[asyncio.Task[Any] | None] = []

    async def pour(call: Call[pb.GenerateRequest], send: Send) -> None:
        tasks.append(asyncio.current_task())
        try:
            await send(started())
            while True:
                await send(delta("x" * 1000))
        except BaseException as error:
            tasks.append(asyncio.current_task())
            ended.set_result(error)
            raise

    async with mesh(Engine(pour)) as (up, stub, _channel):
        stream = stub.Generate(ask())
        for _ in range(5):
            await stream.read()
        stream.cancel()
        async with asyncio.timeout(2):
            await ended
            assert await up.inflight.wait_idle(1)
    assert tasks[0] is tasks[1]


@pytest.mark.parametrize(
    "error", [grpc.aio.InternalError("batch"), grpc.aio.UsageError("finished"), asyncio.InvalidStateError()]
)
async def test_whatever_grpc_raises_at_a_writer_whose_caller_left_means_that(error: Exception) -> None:
    class Gone:
        async def write(self, event: object) -> None:
            raise error

    with pytest.raises(CallerLeft):
        await rpc.write(Gone(), delta())  # type: ignore[arg-type]  # only its write is used


async def test_an_error_after_the_caller_left_is_not_ours(caplog: pytest.LogCaptureFixture) -> None:
    async def clumsy(call: Call[pb.GenerateRequest], send: Send) -> None:
        await send(started())
        try:
            await asyncio.Event().wait()
        finally:
            raise RuntimeError("clean-up failed because the caller is gone")

    async with mesh(Engine(clumsy)) as (up, stub, _channel):
        stream = stub.Generate(ask())
        await stream.read()
        stream.cancel()
        assert await up.inflight.wait_idle(2)
    assert not [record for record in caplog.records if record.name == "forebay.kit.rpc"]


async def test_a_slow_reader_holds_the_engine_back() -> None:
    sent = 0

    async def pour(call: Call[pb.GenerateRequest], send: Send) -> None:
        nonlocal sent
        await send(started())
        for _ in range(10_000):
            await send(delta("x" * 1024))
            sent += 1

    async with mesh(Engine(pour)) as (_, stub, _channel):
        stream = stub.Generate(ask())
        await stream.read()
        before = -1
        async with asyncio.timeout(10):
            while before != sent:  # until the engine stands still
                before = sent
                await asyncio.sleep(0.2)
        assert sent < 2000
        stream.cancel()


async def test_the_callers_deadline_reaches_the_engine_and_ends_the_call() -> None:
    left = asyncio.Event()

    async def wait(call: Call[pb.GenerateRequest], send: Send) -> None:
        remaining = call.remaining()
        assert remaining is not None
        assert 0 < remaining <= 0.3
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    async with mesh(Engine(wait)) as (_, stub, _channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(ask(), timeout=0.3).read()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        async with asyncio.timeout(1):
            await left.wait()


async def test_a_call_carries_who_asks_and_its_id() -> None:
    engine = Engine()
    async with mesh(engine) as (_, stub, _channel):
        [event async for event in stub.Generate(ask(request_id="abc"))]
        [event async for event in stub.Generate(ask(), metadata=(("forebay-caller", "anna"),))]
    first, second = engine.calls
    assert (first.request_id, first.caller, first.deadline) == ("abc", "ipv4:127.0.0.1", None)
    assert second.caller == "anna"
    assert second.request_id not in {"", "abc"}


async def test_unary_methods_answer() -> None:
    async with mesh(Engine()) as (_, stub, channel):
        embedded = await stub.Embed(pb.EmbedRequest(model="m", texts=["a"]))
        assert list(embedded.embeddings[0].values) == [1.0]
        request = pb.CountTokensRequest(model="m", messages=ask().messages)
        assert (await stub.CountTokens(request)).token_count == 3
        assert [model.id for model in (await stub.ListModels(pb.ListModelsRequest())).models] == ["m"]
        models = models_pb2_grpc.ModelServiceStub(channel)
        assert (await models.GetModel(models_pb.GetModelRequest(model="a"))).model.id == "a"
        assert (await models.UnloadModel(models_pb.UnloadModelRequest(model="a"))).model.id == "a"
        await models.DeleteModel(models_pb.DeleteModelRequest(model="a"))
        loads = [event async for event in models.LoadModel(models_pb.LoadModelRequest(model="a"))]
        assert [event.WhichOneof("event") for event in loads] == ["loaded"]
        pulls = [event async for event in models.PullModel(models_pb.PullModelRequest(model="a"))]
        assert [event.WhichOneof("event") for event in pulls] == ["pulled"]
        with pytest.raises(grpc.aio.AioRpcError, match="name a model"):
            await models.GetModel(models_pb.GetModelRequest())


async def test_a_unary_call_that_is_cancelled_cancels_the_engine() -> None:
    left = asyncio.Event()

    class Slow(Engine):
        async def embed(self, call: Call[pb.EmbedRequest]) -> pb.EmbedResponse:
            try:
                await asyncio.Event().wait()
            finally:
                left.set()
            raise AssertionError

    async with mesh(Slow()) as (up, stub, _channel):
        call = stub.Embed(pb.EmbedRequest(model="m", texts=["a"]))
        async with asyncio.timeout(2):
            while up.inflight.count == 0:
                await asyncio.sleep(0.01)
            call.cancel()
            await left.wait()


async def test_health_is_told_for_every_service_and_watched() -> None:
    engine = Engine()
    async with serving(settings(), inference=engine) as up, connect(up.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        name = "forebay.inference.v1.InferenceService"
        for service in ("", name):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=name))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await up.set_ready(True)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        await up.set_ready(False, "the engine is gone")
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()


async def health_of(channel: grpc.aio.Channel, service: str) -> bool:
    stub = health_pb2_grpc.HealthStub(channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_busy_is_told_apart_while_a_call_waits_for_its_turn() -> None:
    go = asyncio.Event()

    async def queued(call: Call[pb.GenerateRequest], send: Send) -> None:
        waiting = pb.Progress(stage=pb.Progress.STAGE_QUEUED)
        await send(pb.GenerateResponse(progress=waiting))
        await go.wait()
        await three(call, send)

    async with mesh(Engine(queued)) as (_, stub, channel):
        assert await health_of(channel, "forebay.capacity")
        first, second = stub.Generate(ask()), stub.Generate(ask())
        await first.read()
        await second.read()
        assert not await health_of(channel, "forebay.capacity")
        assert await health_of(channel, "")  # busy is not down
        second.cancel()
        go.set()
        assert [bool(await first.read()) for _ in range(4)] == [True, True, True, False]
        async with asyncio.timeout(2):
            while not await health_of(channel, "forebay.capacity"):
                await asyncio.sleep(0.01)


async def test_degraded_is_told_apart_while_calls_fail_through_the_services_fault() -> None:
    fault: Failure | None = BackendError("the framework failed inside")

    async def fails(call: Call[pb.GenerateRequest], send: Send) -> None:
        if fault is not None:
            raise fault
        await three(call, send)

    async def call(stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await stub.Generate(ask()).read()

    async with mesh(Engine(fails)) as (up, stub, channel):
        for _ in range(4):
            await call(stub)
        assert await health_of(channel, "forebay.quality")
        await call(stub)
        assert not await health_of(channel, "forebay.quality")
        assert await health_of(channel, "")  # degraded is not down
        fault = ContextExceeded("the caller's own fault")
        for _ in range(9):
            await call(stub)
        assert not await health_of(channel, "forebay.quality")
        fault = None
        for _ in range(6):
            assert len([event async for event in stub.Generate(ask())]) == 3
        assert await up.inflight.wait_idle(1)
        assert await health_of(channel, "forebay.quality")


async def test_reflection_lists_the_services() -> None:
    async with mesh(Engine()) as (_, _stub, channel):
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        stream = stub.ServerReflectionInfo()
        await stream.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        answer = await stream.read()
        names = {service.name for service in answer.list_services_response.service}
        stream.cancel()
    assert {"forebay.inference.v1.InferenceService", "forebay.models.v1.ModelService"} <= names


async def test_a_drain_takes_as_long_as_the_last_call_and_no_longer() -> None:
    go = asyncio.Event()

    async def hold(call: Call[pb.GenerateRequest], send: Send) -> None:
        await send(started())
        await go.wait()
        await send(finished())

    async with mesh(Engine(hold), notice=timedelta(milliseconds=20)) as (up, stub, channel):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
        await watch.read()
        stream = stub.Generate(ask())
        await stream.read()
        draining = asyncio.create_task(up.drain())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        async with asyncio.timeout(2):
            while not up.inflight.draining:
                await asyncio.sleep(0.01)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(ask()).read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert detail(caught.value, error_details_pb2.ErrorInfo).reason == "DRAINING"
        assert not draining.done()
        go.set()
        last = await stream.read()
        assert isinstance(last, pb.GenerateResponse)
        assert last.WhichOneof("event") == "finished"
        async with asyncio.timeout(2):  # the open watch does not hold it up
            await draining


async def test_a_call_that_outlasts_the_grace_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    async def hold(call: Call[pb.GenerateRequest], send: Send) -> None:
        await send(started())
        await asyncio.Event().wait()

    async with mesh(Engine(hold), grace=timedelta(milliseconds=50)) as (up, stub, _channel):
        stream = stub.Generate(ask())
        await stream.read()
        await up.drain()
        await up.drain()  # a second one has nothing to do
        await up.set_ready(True)  # and nothing turns health on again
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "1 calls did not end" in caplog.text


async def test_a_taken_port_is_refused_and_its_holder_named() -> None:
    async with serving(settings(), inference=Engine()) as up:
        with pytest.raises(StartError, match=r"it is taken by .* \(pid \d+\)"):
            async with serving(settings(address=up.address), inference=Engine()):
                raise AssertionError


async def test_a_unix_socket_is_for_its_owner_alone_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    async with mesh(Engine(), address=f"unix:{path}") as (up, stub, _channel):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
        assert [event.sequence async for event in stub.Generate(ask())] == [0, 1, 2]
        assert up.address == f"unix:{path}"
    assert not path.exists()


async def test_without_reflection_nothing_is_listed() -> None:
    async with mesh(Engine(), reflection=False) as (_, _stub, channel):
        stream = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()

        async def list_services() -> None:
            await stream.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            await stream.read()

        with pytest.raises(grpc.aio.AioRpcError) as caught:  # at the write or at the read, as it comes
            await list_services()
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_stranger_without_a_token_is_refused_and_health_is_open() -> None:
    digest = hashlib.sha256(b"open sesame").hexdigest()
    async with mesh(Engine(), auth_token_digests=(digest,)) as (_, stub, channel):
        for metadata in ((), (("authorization", "Bearer wrong"),), (("authorization", "open sesame"),)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(ask(), metadata=metadata).read()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert "sesame" not in str(caught.value)
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        metadata = (("authorization", "Bearer open sesame"),)
        assert [event.sequence async for event in stub.Generate(ask(), metadata=metadata)] == [0, 1, 2]


async def test_nobody_with_a_token_can_pass_for_the_holder_of_another() -> None:
    tokens = ("anna's", "bert's")
    engine = Engine()
    digests = tuple(hashlib.sha256(token.encode()).hexdigest() for token in tokens)
    async with mesh(engine, auth_token_digests=digests) as (_, stub, _channel):
        for token in tokens:
            metadata = (("authorization", f"Bearer {token}"), ("forebay-caller", "anna"))
            [event async for event in stub.Generate(ask(), metadata=metadata)]
        [event async for event in stub.Generate(ask(), metadata=metadata[:1])]
    first, second, third = (call.caller for call in engine.calls)
    assert first != second
    assert second == f"{third}/anna"
    assert not any(token in caller for token in tokens for caller in (first, second, third))


async def test_a_certificate_says_who_asks(tmp_path: Path) -> None:
    authority = trustme.CA()
    pair, mine = authority.issue_cert("localhost"), authority.issue_cert("anna.example")
    pair.private_key_pem.write_to_path(tmp_path / "key.pem")
    pair.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    engine = Engine()
    tls = settings(
        address="localhost:0",
        tls_certificate=tmp_path / "cert.pem",
        tls_key=tmp_path / "key.pem",
        tls_client_roots=tmp_path / "ca.pem",
    )
    credentials = grpc.ssl_channel_credentials(
        authority.cert_pem.bytes(), mine.private_key_pem.bytes(), mine.cert_chain_pems[0].bytes()
    )
    async with (
        serving(tls, inference=engine) as up,
        grpc.aio.secure_channel(up.address, credentials) as channel,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        assert [event.sequence async for event in stub.Generate(ask())] == [0, 1, 2]
    assert engine.calls[0].caller == "certificate:anna.example"


async def test_tls_is_served_and_plaintext_refused(tmp_path: Path) -> None:
    authority = trustme.CA()
    pair = authority.issue_cert("localhost")
    pair.private_key_pem.write_to_path(tmp_path / "key.pem")
    pair.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    tls = settings(address="localhost:0", tls_certificate=tmp_path / "cert.pem", tls_key=tmp_path / "key.pem")
    async with serving(tls, inference=Engine()) as up:
        async with connect(up.address, tls_roots=tmp_path / "ca.pem") as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            assert [event.sequence async for event in stub.Generate(ask())] == [0, 1, 2]
        async with connect(up.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await inference_pb2_grpc.InferenceServiceStub(channel).Generate(ask()).read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_missing_key_file_is_one_readable_line(tmp_path: Path) -> None:
    tls = settings(tls_certificate=tmp_path / "cert.pem", tls_key=tmp_path / "key.pem")
    with pytest.raises(StartError, match=r"key\.pem cannot be read: No such file"):
        async with serving(tls, inference=Engine()):
            raise AssertionError


class Spans:
    """Telemetry that keeps its spans."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.telemetry = Telemetry(provider.get_tracer("test"), provider)

    async def one(self) -> ReadableSpan:
        async with asyncio.timeout(2):
            while not self._exporter.get_finished_spans():
                await asyncio.sleep(0.01)
        (span,) = self._exporter.get_finished_spans()
        return span


async def test_a_span_continues_the_callers_trace() -> None:
    spans = Spans()
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with mesh(Engine(), telemetry=spans.telemetry) as (_, stub, _channel):
        [event async for event in stub.Generate(ask(), metadata=(("traceparent", parent),))]
        span = await spans.one()
    assert span.parent is not None
    assert trace.format_trace_id(span.context.trace_id) == "0af7651916cd43dd8448eb211c80319c"
    assert trace.format_span_id(span.parent.span_id) == "b7ad6b7169203331"
    assert span.attributes is not None
    assert span.attributes["rpc.method"] == "forebay.inference.v1.InferenceService/Generate"
    assert span.attributes["rpc.response.status_code"] == "OK"
    assert span.kind is trace.SpanKind.SERVER


@pytest.mark.parametrize(
    ("ending", "code", "is_error"),
    [
        ("failure", "NOT_FOUND", False),
        ("crash", "INTERNAL", True),
        ("cancel", "CANCELLED", False),
        ("late", "DEADLINE_EXCEEDED", False),
    ],
)
async def test_every_ending_ends_its_span_once_with_its_code(ending: str, code: str, is_error: bool) -> None:
    async def generate(call: Call[pb.GenerateRequest], send: Send) -> None:
        await send(started())
        if ending == "failure":
            raise ModelNotFound("no such model")
        if ending == "crash":
            raise RuntimeError("the secret prompt")
        await asyncio.Event().wait()

    spans = Spans()
    async with mesh(Engine(generate), telemetry=spans.telemetry) as (_, stub, _channel):
        stream = stub.Generate(ask(), timeout=0.3 if ending == "late" else None)
        await stream.read()
        if ending == "cancel":
            stream.cancel()
        else:
            with pytest.raises(grpc.aio.AioRpcError):
                await stream.read()
        span = await spans.one()
    assert span.attributes is not None
    assert span.attributes["rpc.response.status_code"] == code
    assert (span.status.status_code is trace.StatusCode.ERROR) is is_error
    assert "secret" not in span.to_json()
