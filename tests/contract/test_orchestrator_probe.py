"""What the orchestrator makes of backends that answer oddly, or not at all."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from contract.orchestrator_mesh import Mesh, reason, until
from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc
from forebay.kit.rpc import INFERENCE_SERVICE
from forebay.models.v1 import models_pb2 as models_pb
from forebay.models.v1 import models_pb2_grpc
from forebay.orchestrator.build import Orchestrator
from forebay.orchestrator.config import OrchestratorSettings
from forebay.orchestrator.fleet.endpoint import Endpoint, State
from forebay.testing.calls import ask
from forebay.testing.scripted import ScriptedEngine

SERVING = health_pb2.HealthCheckResponse.SERVING


class Odd(
    inference_pb2_grpc.InferenceServiceServicer,
    models_pb2_grpc.ModelServiceServicer,
    health_pb2_grpc.HealthServicer,
):
    """A backend whose answers are set by the test."""

    def __init__(self) -> None:
        self.watches = 0
        self.lists: asyncio.Future[pb.ListModelsResponse] | pb.ListModelsResponse = pb.ListModelsResponse()

    async def ListModels(self, request: object, context: object) -> pb.ListModelsResponse:
        if isinstance(self.lists, pb.ListModelsResponse):
            return self.lists
        return await self.lists

    async def Watch(self, request: object, context: grpc.aio.ServicerContext) -> None:
        self.watches += 1
        await context.write(health_pb2.HealthCheckResponse(status=SERVING))

    async def LoadModel(self, request: object, context: grpc.aio.ServicerContext) -> None:
        await context.write(models_pb.LoadModelResponse(progress=models_pb.LoadProgress()))


@asynccontextmanager
async def backend(
    folder: Path, odd: Odd, *, has_health: bool = True, **probe: object
) -> AsyncIterator[tuple[Endpoint, Orchestrator]]:
    """Serves the odd backend, and watches it."""
    address = f"unix:{folder}/odd"
    server = grpc.aio.server()
    server.add_insecure_port(address)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(odd, server)
    models_pb2_grpc.add_ModelServiceServicer_to_server(odd, server)
    if has_health:
        servicer = health.aio.HealthServicer()
        await servicer.set(INFERENCE_SERVICE, SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    await server.start()
    settings = OrchestratorSettings.model_validate(
        {"backends": [{"name": "odd", "address": address}], "probe": {"models_interval": "50ms", **probe}}
    )
    orchestrator = Orchestrator(settings, source=random.Random(0))
    try:
        async with orchestrator.fleet as fleet:
            yield fleet["odd"], orchestrator
    finally:
        await server.stop(None)


async def test_a_server_without_health_is_no_backend(tmp_path: Path) -> None:
    async with backend(tmp_path, Odd(), has_health=False) as (endpoint, _):
        await until(lambda: "it does not serve grpc.health.v1" in endpoint.detail)
        assert endpoint.state is State.UNREACHABLE


async def test_a_list_that_fails_is_told_and_the_last_one_kept(tmp_path: Path) -> None:
    odd = Odd()
    odd.lists = pb.ListModelsResponse(models=[pb.Model(id="m")])
    async with backend(tmp_path, odd, timeout="50ms") as (endpoint, _):
        await until(lambda: endpoint.find("m") is not None)
        odd.lists = asyncio.get_running_loop().create_future()
        await until(lambda: "did not answer in time" in endpoint.detail)
        odd.lists = asyncio.get_running_loop().create_future()
        odd.lists.set_exception(RuntimeError("odd"))
        await until(lambda: "cannot be listed" in endpoint.detail and "in time" not in endpoint.detail)
        assert endpoint.state is State.ACTIVE
        assert endpoint.find("m") is not None
        odd.lists = pb.ListModelsResponse()
        await until(lambda: not endpoint.models)
        assert endpoint.detail == ""


async def test_a_watch_that_ends_is_a_lost_backend_and_is_begun_anew(tmp_path: Path) -> None:
    odd = Odd()
    address = f"unix:{tmp_path}/odd"
    server = grpc.aio.server()
    server.add_insecure_port(address)
    health_pb2_grpc.add_HealthServicer_to_server(odd, server)
    await server.start()
    settings = OrchestratorSettings.model_validate({"backends": [{"name": "odd", "address": address}]})
    async with Orchestrator(settings).fleet as fleet:
        await until(lambda: odd.watches >= 2)
        await until(lambda: fleet["odd"].detail == "it ended the watch of its health")
    await server.stop(None)


async def test_a_load_that_ends_without_an_end_is_broken(tmp_path: Path) -> None:
    odd = Odd()
    odd.lists = pb.ListModelsResponse(models=[pb.Model(id="m")])
    events: list[models_pb.LoadModelResponse] = []

    async def send(event: models_pb.LoadModelResponse) -> None:
        events.append(event)

    async with backend(tmp_path, odd) as (endpoint, orchestrator):
        await until(lambda: endpoint.find("m") is not None)
        with pytest.raises(Exception, match="the stream ended without loaded") as caught:
            await orchestrator.models.load_model(models_pb.LoadModelRequest(model="m"), send)
    assert type(caught.value).__name__ == "BrokenStream"
    assert events, "it was told that the load began"


async def test_a_fault_in_a_backends_code_is_the_backends(tmp_path: Path) -> None:
    from forebay.testing.script import Fault, Script

    one, other = ScriptedEngine(name="one", models=["m"]), ScriptedEngine(name="other", models=["m"])
    async with Mesh(tmp_path, one, other) as mesh:
        request = ask(model="m")
        request.routing.backends.extend(["one", "other"])
        one.then(Script(fault=Fault.parse("CRASH@before")))
        assert (await mesh.generate(request))[0].started.backend == "other"
        assert mesh.fleet["one"].to_proto().failed_call_count == 1
        one.then(Script(fault=Fault.parse("CRASH@before")))
        request.routing.max_attempt_count = 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.generate(request)
        assert reason(caught.value) == "BACKEND_ERROR"
        one.assert_used()


async def test_a_crash_of_a_probe_ends_the_orchestrator_and_is_not_swallowed(tmp_path: Path) -> None:
    settings = OrchestratorSettings.model_validate(
        {"backends": [{"name": "odd", "address": f"unix:{tmp_path}/odd"}]}
    )
    orchestrator = Orchestrator(settings)
    orchestrator.fleet["odd"].lose = _crash  # type: ignore[method-assign]  # a fault in our own code
    with pytest.raises(ExceptionGroup) as caught:
        async with orchestrator.fleet:
            await asyncio.sleep(30)
    assert caught.group_contains(ZeroDivisionError)


async def test_a_failure_of_the_block_is_raised_as_it_is(tmp_path: Path) -> None:
    settings = OrchestratorSettings.model_validate(
        {"backends": [{"name": "odd", "address": f"unix:{tmp_path}/odd"}]}
    )
    with pytest.raises(ZeroDivisionError):
        async with Orchestrator(settings).fleet:
            _crash("")


def _crash(detail: str) -> None:
    raise ZeroDivisionError(detail)
