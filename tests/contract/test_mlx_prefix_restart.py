"""A worker that starts again goes on from what an earlier process read."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import tiny_models
from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc
from forebay.kit import prefixes

pytestmark = pytest.mark.mlx

pytest.importorskip("mlx.core", reason="MLX has no build for this machine")

SECONDS = 60.0
SYSTEM = "You are a lighthouse keeper who answers every question with the weather of the day before. " * 2


class Worker:
    def __init__(self, process: asyncio.subprocess.Process, channel: grpc.aio.Channel) -> None:
        self.process = process
        self._channel = channel
        self.stub = inference_pb2_grpc.InferenceServiceStub(channel)

    async def ask(self, request: pb.GenerateRequest, caller: str = "ann") -> tuple[str, int]:
        """The reply's text, and how many tokens of the prompt were found."""
        await self.loaded()
        text, cached = "", -1
        call = self.stub.Generate(request, metadata=(("forebay-caller", caller),), wait_for_ready=True)
        async for event in call:
            text += event.delta.text
            if event.HasField("finished"):
                cached = event.finished.usage.cached_token_count
        return text, cached

    async def loaded(self) -> None:
        watch = health_pb2_grpc.HealthStub(self._channel).Watch(health_pb2.HealthCheckRequest())
        async with asyncio.timeout(SECONDS):
            async for update in watch:
                if update.status == health_pb2.HealthCheckResponse.SERVING:
                    break
        watch.cancel()

    async def held(self, digest: int) -> pb.Model:
        """Waits until the worker says that it holds a beginning."""
        await self.loaded()
        async with asyncio.timeout(SECONDS):
            while True:
                answer = await self.stub.ListModels(pb.ListModelsRequest(), wait_for_ready=True)
                if digest in answer.models[0].prefix_digests:
                    return answer.models[0]
                await asyncio.sleep(0.05)

    async def end(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        async with asyncio.timeout(SECONDS):
            await self.process.wait()


@asynccontextmanager
async def worker(model: Path, disk: Path, write: str) -> AsyncIterator[Worker]:
    with tempfile.TemporaryDirectory(prefix="fb") as folder:
        address = f"unix:{folder}/w.sock"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "forebay.mlx_service.worker", "--model", str(model), "--model-id", "m"),
            *("--address", address, "--grace", "5", "--prefix-cache", str(64 << 20), "--isolate-callers"),
            *("--prefix-disk", str(disk), "--prefix-disk-bytes", str(64 << 20), "--prefix-disk-write", write),
            *("--digests", str(disk.parent / "digests")),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=None,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        assert process.stdout is not None
        async with asyncio.timeout(SECONDS):
            assert (await process.stdout.readline()).startswith(b"forebay mlx-worker listening")
        channel = grpc.aio.insecure_channel(address)
        try:
            yield Worker(process, channel)
        finally:
            await channel.close()
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            assert process.stdin is not None
            process.stdin.close()


def talk(*texts: str) -> pb.GenerateRequest:
    roles = [pb.ROLE_SYSTEM, *[pb.ROLE_USER, pb.ROLE_ASSISTANT] * 5]
    messages = [
        pb.Message(role=role, parts=[pb.Part(text=text)])
        for role, text in zip(roles, (SYSTEM, *texts), strict=False)
    ]
    return pb.GenerateRequest(
        model="m",
        messages=messages,
        sampling=pb.Sampling(temperature=0),
        limits=pb.GenerationLimits(max_output_token_count=12),
    )


async def test_conversations_go_on_where_they_were_over_restarts(tmp_path: Path) -> None:
    model, disk = tiny_models.build_random(tmp_path / "m", plain=True), tmp_path / "prefixes"
    first = talk("Will it rain?")
    digest = prefixes.digests(first, model="m", caller="ann")[-1]
    async with worker(model, disk, "evicted") as running:
        reply, cached = await running.ask(first)
        assert cached == 0
        assert (await running.held(digest)).weights.digest.startswith("sha256:")
        await running.end(signal.SIGTERM)
        assert running.process.returncode == 0
    second = talk("Will it rain?", reply, "And tomorrow?")
    async with worker(model, disk, "finished") as running:
        await running.held(digest)
        before = len(files(disk))
        assert (await running.ask(first, "bob")) == (reply, 0), "another caller finds nothing"
        again, cached = await running.ask(first)
        assert again == reply
        assert cached > len(SYSTEM) // 4
        longer, _ = await running.ask(second)
        async with asyncio.timeout(SECONDS):
            while len(files(disk)) < before + 2:  # bob's, and what is new of ann's
                await asyncio.sleep(0.05)
        await running.end(signal.SIGKILL)
    async with worker(model, disk, "evicted") as running:
        await running.held(prefixes.digests(second, model="m", caller="ann")[-1])
        again, more = await running.ask(second)
        assert again == longer
        assert more > cached


def files(disk: Path) -> list[Path]:
    return list(disk.glob("*/*/*.safetensors"))
