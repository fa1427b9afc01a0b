"""What putting small calls for embeddings together gains: 50 callers of an orchestrator, with and without."""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import AsyncExitStack
from pathlib import Path

import bridge_table
from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc
from forebay.kit.channel import connect
from forebay.testing.processes import ServiceProcess

CALLERS = 50
EACH = 20
ROUNDS = 5


async def rate(stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> float:
    async def one(caller: int) -> None:
        for number in range(EACH):
            answer = await stub.Embed(
                pb.EmbedRequest(model="all-minilm:latest", texts=[f"{caller} {number}"])
            )
            assert len(answer.embeddings) == 1

    begin = time.perf_counter()
    await asyncio.gather(*(one(caller) for caller in range(CALLERS)))
    return CALLERS * EACH / (time.perf_counter() - begin)


async def test_gathering(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        url = await enter(bridge_table.emulator("fake_ollama", "--parallel", "64", "--token-seconds", "0"))
        bridge = await enter(bridge_table.bridge("ollama_bridge", "ollama", url, tmp_path, slots=64))
        await bridge_table.models(bridge, 4)
        stubs = []
        for window in ("0s", "3ms"):
            path = tmp_path / f"{window}.toml"
            path.write_text(
                f'[orchestrator]\naddress = "127.0.0.1:0"\ngather = {{ window = "{window}" }}\n'
                f'[[orchestrator.backends]]\nname = "ollama"\naddress = "{bridge}"\nslots = 8\n'
            )
            up = await enter(ServiceProcess("forebay.orchestrator", ["--config", str(path)]))
            channel = await enter(connect(up.address))
            stubs.append(inference_pb2_grpc.InferenceServiceStub(channel))
            async with asyncio.timeout(30):
                while not (await stubs[-1].ListModels(pb.ListModelsRequest())).models:
                    await asyncio.sleep(0.05)
        for stub in stubs:
            await rate(stub)
        pairs = [(await rate(stubs[0]), await rate(stubs[1])) for _ in range(ROUNDS)]
    alone, together = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(f"\ntexts embedded a second, {CALLERS} callers, one text a call, through orchestrator and bridge")
    print(f"each by itself {alone:,.0f}   gathered {together:,.0f}   ratio {together / alone:.2f}")
