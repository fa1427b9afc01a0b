"""The MLX engine beside `mlx_lm.server`: the same tiny model, the same machine, in turn, in one run.

The model is so small that its arithmetic is nearly nothing: what is compared
is scheduling, reuse and memory, not kernels, which are the same. Ratios are
printed and nothing is asserted: a shared machine has no opinion.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

import aiohttp
import pytest

import tiny_models
from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc
from forebay.kit.channel import connect
from forebay.mlx_service import blas
from forebay.testing.processes import ServiceProcess
from llama import free_port, running

pytestmark = pytest.mark.mlx

ROUNDS = 5
WIDTHS = (1, 4, 8, 16)
TOKENS = 200
LONG_PROMPT = "the rain in the mountains " * 80
"""About a thousand tokens."""

_fresh = itertools.count()


class Side(Protocol):
    """One of the two servers."""

    async def generate(self, text: str, tokens: int, started: asyncio.Event | None = None) -> float:
        """Generates to the end. Returns the seconds to the first token, and sets `started` at it."""


class Ours:
    def __init__(self, stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> None:
        self._stub = stub

    async def generate(self, text: str, tokens: int, started: asyncio.Event | None = None) -> float:
        request = pb.GenerateRequest(
            model="m",
            messages=[pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text=text)])],
            limits=pb.GenerationLimits(max_output_token_count=tokens),
            sampling=pb.Sampling(temperature=0),
        )
        begin = time.perf_counter()
        first = 0.0
        async for event in self._stub.Generate(request):
            if event.HasField("delta") and not first:
                first = time.perf_counter() - begin
                if started is not None:
                    started.set()
        return first


class Theirs:
    def __init__(self, session: aiohttp.ClientSession, url: str, model: Path) -> None:
        self._session = session
        self._url = url
        self._model = str(model)

    async def generate(self, text: str, tokens: int, started: asyncio.Event | None = None) -> float:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
        }
        begin = time.perf_counter()
        first = 0.0
        async with self._session.post(f"{self._url}/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if not line.startswith(b"data: {") or first:
                    continue
                choices = json.loads(line[6:]).get("choices")
                if choices and choices[0]["delta"].get("content"):
                    first = time.perf_counter() - begin
                    if started is not None:
                        started.set()
        return first


def fresh(text: str = "") -> str:
    """A text that nobody asked before, so that nothing of it is known."""
    return f"{next(_fresh):08d} {text}"


async def idle(side: Side) -> float:
    return await side.generate(fresh(), 1)


async def under_load(side: Side) -> float:
    """Time to first token while another stream decodes."""
    started = asyncio.Event()
    other = asyncio.create_task(side.generate(fresh(), 1500, started))
    await started.wait()
    took = await side.generate(fresh(), 1)
    other.cancel()
    await asyncio.gather(other, return_exceptions=True)
    return took


def rate(width: int) -> Callable[[Side], object]:
    async def measure(side: Side) -> float:
        texts = [fresh() for _ in range(width)]
        begin = time.perf_counter()
        await asyncio.gather(*(side.generate(text, TOKENS) for text in texts))
        return width * TOKENS / (time.perf_counter() - begin)

    return measure


async def repeated(side: Side) -> tuple[float, float]:
    """Time to first token of a long prompt, and of the same again."""
    text = fresh(LONG_PROMPT)
    return await side.generate(text, 1), await side.generate(text, 1)


def kv_held(model: Path) -> list[tuple[int, int]]:
    """Bytes held, and useful ones, for a row of 720 tokens with seven of 12: by lanes and by one batch."""
    from forebay.mlx_service.worker.batch import Batch
    from forebay.mlx_service.worker.lanes import Lanes
    from forebay.mlx_service.worker.load import load_weights
    from forebay.mlx_service.worker.memory import probe
    from forebay.mlx_service.worker.runtime import BatchGenerator, BatchKVCache
    from forebay.mlx_service.worker.sampling import SamplingParams, sampler

    loaded = load_weights(model)
    prompts = [[5] * count for count in (720, *[12] * 7)]
    lanes = Lanes(lambda _: Batch(loaded, rows=8, prefill_step=512, end_tokens=[]))
    for prompt in prompts:
        greedy = sampler(SamplingParams(temperature=0), position=0)
        lanes.insert(prompt, most=2000, sampler=greedy, processors=())
    written: list[int] = []
    while len(set(written)) < len(prompts):
        written += [token.uid for token in lanes.step()[1]]
    size = probe(loaded).per_token
    ours = lanes.cache_bytes, (sum(map(len, prompts)) + len(written)) * size
    step, BatchKVCache.step = BatchKVCache.step, 256
    generator = BatchGenerator(loaded, completion_batch_size=8, prefill_batch_size=8)
    generator.insert(prompts, [2000] * 8)
    written.clear()
    while len(set(written)) < len(prompts):
        written += [token.uid for token in generator.next()[1]]
    theirs = int(generator.prompt_cache_nbytes), (sum(map(len, prompts)) + len(written)) * size
    BatchKVCache.step = step
    return [ours, theirs]


@asynccontextmanager
async def sides(model: Path, home: Path) -> AsyncIterator[tuple[Side, Side]]:
    """Both servers, ready and warm."""
    port = free_port()
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1"]
    env = {"PATH": os.environ.get("PATH", ""), "HOME": str(home), "HF_HUB_OFFLINE": "1"}
    env |= {name: value for name, value in os.environ.items() if name.startswith("OPENBLAS_")}  # kernels too
    if found := blas.load(is_global=False):  # both multiply with the same library
        env |= {"LD_PRELOAD": found.path, "OPENBLAS_NUM_THREADS": str(found.threads)}
    arguments = ["--model", str(model), "--model-id", "m", "--address", "127.0.0.1:0"]
    arguments += ["--max-rows", "16", "--prefix-cache", str(256 << 20)]
    with running(command, port=port, log=home / "mlx.log", env=env) as up:
        async with (
            ServiceProcess("forebay.mlx_service.worker", arguments) as worker,
            connect(worker.address) as channel,
            aiohttp.ClientSession() as session,
        ):
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            both = (Ours(stub), Theirs(session, up.url, model))
            for side in both:
                async with asyncio.timeout(60):
                    while True:
                        try:
                            await side.generate(fresh(), 5)
                            break
                        except Exception:
                            await asyncio.sleep(0.2)
            yield both


async def test_the_engine(tmp_path: Path) -> None:
    model = tiny_models.build_random(tmp_path / "m", hidden=128, layers=4, plain=True, context=4096).resolve()
    rows: list[tuple[str, float, float, str]] = []
    async with sides(model, tmp_path) as (ours, theirs):
        measures = [("first token, idle", idle, "ms"), ("first token, under load", under_load, "ms")]
        measures += [(f"tokens/s, {width} rows", rate(width), "") for width in WIDTHS]  # type: ignore[list-item]
        for name, measure, unit in measures:
            pairs = [(await measure(ours), await measure(theirs)) for _ in range(ROUNDS)]
            a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
            scale = 1000 if unit else 1
            rows.append((name, a * scale, b * scale, unit))
        again = []
        for side in (ours, theirs):
            turns = [await repeated(side) for _ in range(ROUNDS)]
            again.append([statistics.median(turn) * 1000 for turn in zip(*turns, strict=True)])
    rows.append(("first token, long prompt", again[0][0], again[1][0], "ms"))
    rows.append(("  the same again", again[0][1], again[1][1], "ms"))
    held, held_by_batch = (held / useful for held, useful in kv_held(model))
    rows.append(("KV held / useful, 720 + 7x12", held, held_by_batch, ""))
    print(f"\n{'':28}{'forebay':>12}{'mlx_lm':>12}{'ratio':>8}")
    for name, a, b, unit in rows:
        print(f"{name:28}{a:>12.1f}{b:>12.1f}{a / b:>8.2f} {unit}")
    print(f"the same again / the first time: {again[0][1] / again[0][0]:.3f}")
