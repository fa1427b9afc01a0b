"""A client that is not asyncio gets the same service.

The fixtures are pytest-grpc's, which are blocking. Its server is replaced by a
real process of ours: what is tested is the generated blocking stub, from
threads, against our asyncio server.
"""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc
from forebay.kit.failure import ModelNotFound, from_rpc_error
from forebay.models.v1 import models_pb2 as models_pb
from forebay.models.v1 import models_pb2_grpc
from forebay.testing import grammar
from forebay.testing.calls import ask, message, with_options
from forebay.testing.processes import ServiceProcess
from forebay.testing.scripted import ScriptedEngine

TIMEOUT = 20.0


@pytest.fixture(scope="module")
def grpc_server() -> Iterator[ServiceProcess]:
    with asyncio.Runner() as runner:
        process = ServiceProcess("forebay.testing.scripted", ["--token-delay", "1ms", "--unloaded"])
        runner.run(process.start())
        try:
            yield process
        finally:
            assert runner.run(process.stop()) == 0


@pytest.fixture(scope="module")
def grpc_addr(grpc_server: ServiceProcess) -> str:
    return grpc_server.address


@pytest.fixture(scope="module")
def grpc_stub_cls() -> type[inference_pb2_grpc.InferenceServiceStub]:
    return inference_pb2_grpc.InferenceServiceStub


def test_a_reply_can_be_iterated(grpc_stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    events = list(grpc_stub.Generate(ask(), timeout=TIMEOUT))
    grammar.check(events)
    assert grammar.text(events) == ScriptedEngine().expected(ask())


def test_replies_on_many_threads_are_not_mixed(grpc_stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    requests = [ask(f"number {n}") for n in range(24)]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda r: list(grpc_stub.Generate(r, timeout=TIMEOUT)), requests))
    for request, events in zip(requests, replies, strict=True):
        grammar.check(events)
        assert grammar.text(events) == ScriptedEngine().expected(request)


def test_a_stream_can_be_cancelled_from_another_thread(
    grpc_stub: inference_pb2_grpc.InferenceServiceStub,
) -> None:
    call = grpc_stub.Generate(with_options(ask(), token_count=2000, token_delay="20ms"), timeout=TIMEOUT)
    next(call)
    timer = threading.Timer(0.1, call.cancel)
    timer.start()
    with pytest.raises(grpc.RpcError) as raised:
        list(call)
    timer.join()
    assert raised.value.code() is grpc.StatusCode.CANCELLED


def test_a_deadline_ends_a_stream(grpc_stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    request = with_options(ask(), fault="STALL@1")
    with pytest.raises(grpc.RpcError) as raised:
        list(grpc_stub.Generate(request, timeout=0.3))
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_errors_have_their_details(grpc_stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        list(grpc_stub.Generate(ask(model="nobody"), timeout=TIMEOUT))
    failure = from_rpc_error(raised.value, backend="scripted")
    assert isinstance(failure, ModelNotFound)
    assert failure.metadata["model"] == "nobody"


def test_unary_calls_block_until_they_are_answered(
    grpc_stub: inference_pb2_grpc.InferenceServiceStub,
) -> None:
    response = grpc_stub.Embed(pb.EmbedRequest(model="scripted", texts=["a", "b"]), timeout=TIMEOUT)
    assert len(response.embeddings) == 2
    request = pb.CountTokensRequest(model="scripted", messages=[message("a b")])
    assert grpc_stub.CountTokens(request, timeout=TIMEOUT).token_count == 5
    models = grpc_stub.ListModels(pb.ListModelsRequest(), timeout=TIMEOUT).models
    assert [model.id for model in models] == ["scripted"]


def test_models_are_managed_and_health_is_told(grpc_channel: grpc.Channel) -> None:
    models = models_pb2_grpc.ModelServiceStub(grpc_channel)
    models.UnloadModel(models_pb.UnloadModelRequest(model="scripted"), timeout=TIMEOUT)
    events = list(models.LoadModel(models_pb.LoadModelRequest(model="scripted"), timeout=TIMEOUT))
    assert events[-1].loaded.model.state == pb.Model.STATE_ACTIVE
    health = health_pb2_grpc.HealthStub(grpc_channel)
    status = health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT).status
    assert status == health_pb2.HealthCheckResponse.SERVING
