"""What a hop costs: the same backend called directly, through the orchestrator and through a bare relay.

All in turn, in one run. The backend is a scripted process, so that only the hop
is measured, and the relay is grpc.aio with nothing of ours. Ratios and
differences are printed and nothing is asserted: a shared machine has no opinion.

Client, orchestrator and backend are three processes, and where they share two
cores the tokens a second are those of all three. So the processor time of the
orchestrator alone is printed too, and what one core could relay by it.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import psutil

import bare_relay
import forebay
from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc
from forebay.kit.channel import connect
from forebay.testing.processes import ServiceProcess

ROUNDS = 200
CALLS = 1000  # by which processor time is measured: it is counted in hundredths of a second
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


async def spent(process: psutil.Process, rounds: int, measure: Callable[[], Awaitable[float]]) -> float:
    """Returns the processor seconds of a process for each of so many rounds."""
    before = process.cpu_times()
    for _ in range(rounds):
        await measure()
    after = process.cpu_times()
    return (after.user + after.system - before.user - before.system) / rounds


def _with_tests() -> dict[str, str]:
    """Returns what lets a process find a module of the tests beside the project's own."""
    places = (Path(bare_relay.__file__).parent, *(Path(path).parent for path in forebay.__path__))
    return {"PYTHONPATH": os.pathsep.join(map(str, places))}


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
            ServiceProcess("bare_relay", [backend.address], environment=_with_tests()) as relay,
            connect(backend.address) as near,
            connect(orchestrator.address) as far,
            connect(relay.address) as beside,
        ):
            direct = inference_pb2_grpc.InferenceServiceStub(near)
            relayed = inference_pb2_grpc.InferenceServiceStub(far)
            bare = inference_pb2_grpc.InferenceServiceStub(beside)
            async with asyncio.timeout(30):
                while not (await relayed.ListModels(pb.ListModelsRequest())).models:
                    await asyncio.sleep(0.05)
            rows = []
            process = psutil.Process(orchestrator.pid)
            processor: dict[str, float] = {}
            for name, measure, rounds, unit in (
                ("unary call", unary, ROUNDS, "ms"),
                ("first token", first_token, ROUNDS, "ms"),
                (f"tokens/s, {STREAMS} streams", rate, 5, ""),
            ):
                await measure(direct), await measure(relayed)
                pairs = [(await measure(direct), await measure(relayed)) for _ in range(rounds)]
                a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
                # By itself: another process in the same turns would cost the others their caches.
                await measure(bare)
                pairs_bare = [(await measure(direct), await measure(bare)) for _ in range(rounds)]
                c, d = (statistics.median(side) for side in zip(*pairs_bare, strict=True))
                processor[name] = 1e6 * (
                    await spent(process, CALLS, partial(measure, relayed))
                    if unit
                    else await spent(process, 5, partial(measure, relayed)) / (STREAMS * TOKENS)
                )
                scale = 1000 if unit else 1
                ratio = statistics.median(y / x for x, y in pairs)
                rows.append((name, a * scale, b * scale, ratio, (d - c) * scale if unit else d, unit))
    print(f"\n{'':24}{'direct':>12}{'through':>12}{'ratio':>8}{'added':>12}{'bare relay':>14}")
    for name, a, b, ratio, relayed_bare, unit in rows:
        added, plain = (
            (f"{b - a:.2f} {unit}", f"{relayed_bare:.2f} {unit}") if unit else ("", f"{relayed_bare:.2f}")
        )
        print(f"{name:24}{a:>12.2f}{b:>12.2f}{ratio:>8.2f}{added:>12}{plain:>14}")
    print("\nprocessor time of the orchestrator")
    for name, micros in processor.items():
        each = "token" if name.startswith("tokens") else name.removesuffix(" call")
        print(f"{each:24}{micros:>9.0f} us{1e6 / micros:>12.0f} a second on one core")
