"""The Ollama bridge as a process, beside the emulator as a process."""

from __future__ import annotations

import asyncio

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.testing.calls import ask
from forebay.testing.client import client
from forebay.testing.fake_ollama import FakeOllama, main
from forebay.testing.processes import ServiceProcess


async def serving(address: str, wanted: str, *, within: float = 20.0) -> None:
    """Waits until the health of an address is as wanted."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    async with client(address) as peer, asyncio.timeout(within):
        stub = health_pb2_grpc.HealthStub(peer.channel)
        while True:
            try:
                answer = await stub.Check(health_pb2.HealthCheckRequest())  # type: ignore[attr-defined]  # set at run time
            except grpc.aio.AioRpcError:
                pass
            else:
                if health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status) == wanted:
                    return
            await asyncio.sleep(0.02)


async def test_the_bridge_waits_for_its_server_and_preloads() -> None:
    fake = FakeOllama()
    url = await fake.start()
    port = int(url.rpartition(":")[2])
    await fake.stop()
    environment = {
        "FOREBAY_OLLAMA__BASE_URL": url,
        "FOREBAY_OLLAMA__PROBE_INTERVAL": "50ms",
        "FOREBAY_OLLAMA__PRELOAD": '["llama3.2"]',
        "FOREBAY_OLLAMA__NAME": "pond",
    }
    arguments = ["--address", "127.0.0.1:0"]
    async with ServiceProcess("forebay.ollama_bridge", arguments, environment=environment) as bridge:
        await serving(bridge.address, "NOT_SERVING")
        await fake.start(port=port)
        try:
            await serving(bridge.address, "SERVING")
            async with asyncio.timeout(10):
                while not fake.scheduler.loads["llama3.2:latest"]:
                    await asyncio.sleep(0.02)
            async with client(bridge.address) as peer:
                events = await peer.generate(ask(model="llama3.2"))
                begin = next(e.started for e in events if e.HasField("started"))
                assert begin.backend == "pond"
        finally:
            await fake.stop()
        await serving(bridge.address, "NOT_SERVING")


async def test_the_emulator_runs_by_itself() -> None:
    arguments = ["--models", "mine,yours:7b", "--token-seconds", "0"]
    async with ServiceProcess("forebay.testing.fake_ollama", arguments) as fake:
        environment = {"FOREBAY_OLLAMA__BASE_URL": fake.address}
        bridged = ServiceProcess(
            "forebay.ollama_bridge", ["--address", "127.0.0.1:0"], environment=environment
        )
        async with bridged as bridge, client(bridge.address) as peer:
            await serving(bridge.address, "SERVING")
            assert {"mine:latest", "yours:7b"} <= {model.id for model in await peer.list_models()}
            reply = await peer.generate(ask(model="yours:7b"))
            assert reply[-1].finished.reason == pb.FINISH_REASON_STOP


def test_the_emulator_refuses_names_that_are_none() -> None:
    with pytest.raises(SystemExit, match="not a model name"):
        main(["--models", "a b"])
