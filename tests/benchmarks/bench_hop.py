"""What a hop costs: the same backend called directly and through the orchestrator, in turn, in one run.

The backend is a scripted process, so that only the hop is measured. Ratios and
differences are printed and nothing is asserted: a shared machine has no opinion.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path

from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc
from forebay.kit.channel import connect
from forebay.testing.processes import ServiceProcess

ROUNDS = 200
STREAMS = 8
TOKENS = 500


def request(tokens: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model="m",
        messages=[pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="hello")])],
        limits=pb.GenerationLimits(max_output_token_count=tokens),
    )


async def first_token(stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> float:
    begin = time.perf_counter()
    first = 0.0
    async for event in stub.Generate(request(1)):
        if event.HasField("delta") and not first:
            first = time.perf_counter() - begin
    return first


async def unary(stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> float:
    begin = time.perf_counter()
    await stub.CountTokens(pb.CountTokensRequest(model="m", messages=request(1).messages))
    return time.perf_counter() - begin


async def rate(stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> float:
    async def one() -> int:
        return sum([event.delta.token_count async for event in stub.Generate(request(TOKENS))])

    begin = time.perf_counter()
    tokens = sum(await asyncio.gather(*(one() for _ in range(STREAMS))))
    return tokens / (time.perf_counter() - begin)


async def test_the_hop(tmp_path: Path) -> None:
    async with ServiceProcess(
        "forebay.testing.scripted",
        [
            "--name",
            "a",
            "--models",
            "m",
            "--token-count",
            str(TOKENS),
            "--token-delay",
            "0ms",
            "--slots",
            "64",
        ],
    ) as backend:
        config = tmp_path / "forebay.toml"
        config.write_text(
            '[orchestrator]\naddress = "127.0.0.1:0"\n'
            f'[[orchestrator.backends]]\nname = "a"\nframework = "scripted"\naddress = "{backend.address}"\n'
        )
        async with (
            ServiceProcess("forebay.orchestrator", ["--config", str(config)]) as orchestrator,
            connect(backend.address) as near,
            connect(orchestrator.address) as far,
        ):
            direct = inference_pb2_grpc.InferenceServiceStub(near)
            relayed = inference_pb2_grpc.InferenceServiceStub(far)
            async with asyncio.timeout(30):
                while not (await relayed.ListModels(pb.ListModelsRequest())).models:
                    await asyncio.sleep(0.05)
            rows = []
            for name, measure, rounds, unit in (
                ("unary call", unary, ROUNDS, "ms"),
                ("first token", first_token, ROUNDS, "ms"),
                (f"tokens/s, {STREAMS} streams", rate, 5, ""),
            ):
                await measure(direct), await measure(relayed)
                pairs = [(await measure(direct), await measure(relayed)) for _ in range(rounds)]
                a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
                scale = 1000 if unit else 1
                rows.append((name, a * scale, b * scale, statistics.median(y / x for x, y in pairs), unit))
    print(f"\n{'':24}{'direct':>12}{'through':>12}{'ratio':>8}{'added':>12}")
    for name, a, b, ratio, unit in rows:
        added = f"{b - a:.2f} {unit}" if unit else ""
        print(f"{name:24}{a:>12.2f}{b:>12.2f}{ratio:>8.2f}{added:>12}")
