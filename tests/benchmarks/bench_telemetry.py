"""What telemetry costs: an orchestrator that traces 1 % or all of its requests beside one that traces none.

All have one scripted backend and are asked in turn. What counts is processor time: a wait costs a
shared machine nothing.
"""

from __future__ import annotations

import asyncio
import statistics
from contextlib import AsyncExitStack
from pathlib import Path

import psutil

from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc
from forebay.kit.channel import connect
from forebay.testing.otlp import OtlpReceiver
from forebay.testing.processes import ServiceProcess

ROUNDS = 15
CALLS = 200
KINDS = {
    "nothing": ("", ""),
    "traces of 1 %": ("0.01", "none"),
    "metrics and traces of 1 %": ("0.01", "otlp"),
    "metrics and traces of all": ("1", "otlp"),
}
"""What is told: the share of requests that are traced, and where metrics go."""


async def seconds(process: psutil.Process, stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> float:
    """Returns the processor seconds of a call."""
    request = pb.GenerateRequest(
        model="m",
        messages=[pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="hello")])],
        limits=pb.GenerationLimits(max_output_token_count=20),
    )

    async def one() -> None:
        async for _ in stub.Generate(request):
            pass

    before = process.cpu_times()
    for _ in range(CALLS // 4):
        await asyncio.gather(*(one() for _ in range(4)))
    after = process.cpu_times()
    return (after.user + after.system - before.user - before.system) / CALLS


async def test_telemetry(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        otlp = await enter(OtlpReceiver())
        backend = await enter(
            ServiceProcess("forebay.testing.scripted", ["--name", "a", "--models", "m", "--slots", "64"])
        )
        sides = []
        for number, (share, exporter) in enumerate(KINDS.values()):
            config = tmp_path / f"{number}.toml"
            telemetry = f'[telemetry]\notlp_endpoint = "{otlp.endpoint}"\n' if share else ""
            config.write_text(
                f'{telemetry}[orchestrator]\naddress = "127.0.0.1:0"\n'
                f'[[orchestrator.backends]]\nname = "a"\naddress = "{backend.address}"\n'
            )
            environment = {
                "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
                "OTEL_TRACES_SAMPLER_ARG": share,
                "OTEL_METRICS_EXPORTER": exporter,
            }
            up = await enter(
                ServiceProcess(
                    "forebay.orchestrator",
                    ["--config", str(config)],
                    environment=environment if share else {},
                )
            )
            stub = inference_pb2_grpc.InferenceServiceStub(await enter(connect(up.address)))
            async with asyncio.timeout(30):
                while not (await stub.ListModels(pb.ListModelsRequest())).models:
                    await asyncio.sleep(0.05)
            sides.append((psutil.Process(up.pid), stub))
        for side in sides:
            await seconds(*side)
        rounds = [[await seconds(*side) for side in sides] for _ in range(ROUNDS)]
    medians = [statistics.median(column) * 1e6 for column in zip(*rounds, strict=True)]
    print("\nprocessor time of the orchestrator for a reply of 20 tokens")
    for name, micros in zip(KINDS, medians, strict=True):
        print(f"{name:28} {micros:8.0f} us   {micros / medians[0]:5.2f} times")
