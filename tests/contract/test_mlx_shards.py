"""A model that two processes share says what the whole one says, and the two live and die together."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import tiny_models
from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc as rpc
from forebay.mlx_service import requirements
from forebay.testing import grammar
from forebay.testing.processes import ServiceProcess

pytestmark = [
    pytest.mark.mlx,
    pytest.mark.skipif(bool(requirements.missing()), reason=requirements.missing()),
]

SECONDS = 60.0
HERE = ("127.0.0.1", "127.0.0.1")


@dataclass
class Worker:
    process: asyncio.subprocess.Process
    stub: rpc.InferenceServiceAsyncStub
    channel: grpc.aio.Channel

    async def ready(self) -> Worker:
        watch = health_pb2_grpc.HealthStub(self.channel).Watch(health_pb2.HealthCheckRequest())
        async with asyncio.timeout(SECONDS):
            async for update in watch:
                if update.status == health_pb2.HealthCheckResponse.SERVING:
                    break
        watch.cancel()
        return self

    async def end(self) -> tuple[int, str]:
        assert self.process.stderr is not None
        async with asyncio.timeout(SECONDS):
            said = await self.process.stderr.read()
            return await self.process.wait(), said.decode()

    @property
    def others(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    async def tokens(self, request: pb.GenerateRequest) -> list[int]:
        async with asyncio.timeout(SECONDS):
            events = [event async for event in self.stub.Generate(request)]
        return [token for event in events for token in event.delta.token_ids]


@asynccontextmanager
async def worker(model: Path, **shards: object) -> AsyncIterator[Worker]:
    arguments = ["--shards", json.dumps(shards)] if shards else []
    with tempfile.TemporaryDirectory(prefix="fb") as folder:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "forebay.mlx_service.worker", "--model", str(model), "--model-id", "m"),
            *("--address", f"unix:{folder}/w.sock", "--grace", "5", "--prefix-cache", "1000000"),
            *("--cpu-weights", "stored", *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        assert process.stdout is not None
        assert process.stdin is not None
        async with asyncio.timeout(SECONDS):
            await process.stdout.readline()
        channel = grpc.aio.insecure_channel(f"unix:{folder}/w.sock")
        try:
            yield Worker(process, rpc.InferenceServiceStub(channel), channel)  # type: ignore[arg-type]  # one class for both
        finally:
            await channel.close()
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            process.stdin.close()


def request(text: str, most: int = 12, **more: object) -> pb.GenerateRequest:
    more.setdefault("sampling", pb.Sampling(temperature=0))
    return pb.GenerateRequest(
        model="m",
        messages=[pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text=text)])],
        limits=pb.GenerationLimits(max_output_token_count=most),
        include_token_ids=True,
        **more,  # type: ignore[arg-type]  # a test's shorthand
    )


REQUESTS = (
    request("hi"),
    request("the man in the other tent is on a train " * 3),
    request("What then?", sampling=pb.Sampling(temperature=1.0, seed=5)),
    request("x", sampling=pb.Sampling(temperature=0.7, seed=9, top_p=0.9, repetition_penalty=1.3)),
    request("a number", output_format=pb.OutputFormat(regex="[0-9]{4}")),
)


async def answer(stub: rpc.InferenceServiceAsyncStub) -> str:
    """Returns a reply's text. A service that has not noticed yet that its worker is gone is asked again."""
    async with asyncio.timeout(SECONDS):
        while True:
            try:
                return grammar.text([event async for event in stub.Generate(request("hi"))])
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                await asyncio.sleep(0.05)


async def gone(processes: list[psutil.Process]) -> None:
    """Returns when processes have ended, whether or not somebody collected them."""
    async with asyncio.timeout(SECONDS):
        while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
            await asyncio.sleep(0.02)


def qwen2(folder: Path) -> Path:
    """Writes a tiny model of a family that can be shared by layers."""
    return tiny_models.build_random(folder, layers=3, family="qwen2")


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (tiny_models.build_random, "tensor"),
        pytest.param(qwen2, "tensor", marks=pytest.mark.soak),
        pytest.param(qwen2, "pipeline", marks=pytest.mark.soak),
    ],
    ids=["llama tensor", "qwen2 tensor", "qwen2 pipeline"],
)
async def test_two_ranks_say_what_one_says_alone_and_together(
    tmp_path: Path, build: Callable[[Path], Path], kind: str
) -> None:
    model = build(tmp_path / "m")
    async with worker(model) as alone, worker(model, hosts=HERE, kind=kind) as shared:
        await alone.ready()
        await shared.ready()
        (other,) = shared.others
        expected = [await alone.tokens(each) for each in REQUESTS]
        assert all(expected)
        assert [await shared.tokens(each) for each in REQUESTS] == expected
        # A row that leaves in the middle of a batch leaves on both.
        leaving = shared.stub.Generate(request("long", 400))
        await leaving.read()
        async with asyncio.TaskGroup() as tasks:
            together = [tasks.create_task(shared.tokens(each)) for each in REQUESTS]
            leaving.cancel()
        assert [task.result() for task in together] == expected
        shared.process.send_signal(signal.SIGTERM)
        code, _ = await shared.end()
        assert code == 0
        await gone([other])


@pytest.mark.soak
async def test_a_rank_that_dies_ends_the_group_and_says_which(tmp_path: Path) -> None:
    model = tiny_models.build_random(tmp_path / "m")
    async with worker(model, hosts=HERE) as shared:
        await shared.ready()
        call = shared.stub.Generate(request("hi", 1500))
        await call.read()
        shared.others[0].kill()
        code, said = await shared.end()
        assert code == 70
        assert "rank 1 of the model ended with -9" in said


@pytest.mark.soak
async def test_when_rank_0_dies_the_others_end(tmp_path: Path) -> None:
    model = tiny_models.build_random(tmp_path / "m")
    async with worker(model, hosts=HERE) as shared:
        await shared.ready()
        others = shared.others
        call = shared.stub.Generate(request("hi", 1500))
        await call.read()
        shared.process.kill()
        await gone(others)


async def test_the_service_starts_the_whole_group_again(tmp_path: Path) -> None:
    tiny_models.build_random(tmp_path / "models" / "m")
    values = {
        "address": "127.0.0.1:0",
        "model_folders": json.dumps([str(tmp_path / "models")]),
        "cache_dir": str(tmp_path / "cache"),
        "huggingface_cache": "false",
        "ollama_models": "false",
        "fetch_default_model": "false",
        "preload": "[]",
        "health_timeout": "30s",
        "cpu_weights": "stored",
        "restart_backoff_min": "0s",
        "shards": json.dumps({"m": {"hosts": HERE}}),
    }
    environment = {f"FOREBAY_MLX__{key.upper()}": value for key, value in values.items()}

    def ranks() -> list[psutil.Process]:
        return psutil.Process(process.pid).children(recursive=True)

    async with (
        ServiceProcess("forebay.mlx_service", environment=environment, folder=tmp_path) as process,
        grpc.aio.insecure_channel(process.address) as channel,
    ):
        stub = rpc.InferenceServiceStub(channel)
        first = await answer(stub)
        before = ranks()
        assert len(before) == 2
        max(before, key=lambda rank: rank.pid).kill()
        await gone(before)
        again = await answer(stub)
        assert again == first
        assert not {rank.pid for rank in before} & {rank.pid for rank in ranks()}


@pytest.mark.soak
async def test_a_model_that_cannot_be_shared_so_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = tiny_models.build_random(tmp_path / "m")
    async with worker(model, hosts=HERE, kind="pipeline") as shared:
        code, said = await shared.end()
        assert code == 3
        assert "models of family llama cannot be shared by layers" in said
