"""Promises of the MLX service with real workers: tiny models, real processes, real mlx."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
import grpc.aio
import psutil
import pytest

import tiny_models
from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc as rpc
from forebay.kit.failure import from_rpc_error
from forebay.mlx_service import requirements
from forebay.testing import grammar
from forebay.testing.calls import ask
from forebay.testing.processes import ServiceProcess
from promptly import promptly

pytestmark = [
    pytest.mark.mlx,
    pytest.mark.skipif(bool(requirements.missing()), reason=requirements.missing()),
]


def service(tmp_path: Path, **settings: object) -> ServiceProcess:
    """Returns the service as a process of its own, with one tiny model."""
    models = tmp_path / "models"
    if not models.exists():
        tiny_models.build_random(models / "tiny")
    values = {
        "address": "127.0.0.1:0",
        "model_folders": json.dumps([str(models)]),
        "cache_dir": str(tmp_path / "cache"),
        "huggingface_cache": "false",
        "fetch_default_model": "false",
        "preload": json.dumps(["tiny"]),
        "restart_backoff_min": "0s",
        "health_timeout": "1s",
        **settings,
    }
    environment = {f"FOREBAY_MLX__{key.upper()}": str(value) for key, value in values.items()}
    return ServiceProcess("forebay.mlx_service", environment=environment, folder=tmp_path)


def workers(process: ServiceProcess) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def long_ask() -> pb.GenerateRequest:
    """Asks for as much as the model's context holds, the same each time."""
    request = ask(model="tiny", token_count=1900)
    request.sampling.temperature = 0
    return request


async def ready(stub: rpc.InferenceServiceStub) -> None:
    """Returns when the tiny model has served a call."""
    async for _ in stub.Generate(ask(model="tiny", token_count=1)):
        pass


async def interrupted(stub, act) -> tuple[list[pb.GenerateResponse], str, float]:
    """Breaks a reply off in the middle; returns its events, the reason, and how long it took to be told."""
    events: list[pb.GenerateResponse] = []
    since = 0.0
    call = stub.Generate(long_ask())
    try:
        async for event in call:
            events.append(event)
            if len(grammar.deltas(events)) == 5:
                since = time.monotonic()
                act()
    except grpc.aio.AioRpcError as error:
        return events, from_rpc_error(error, backend="mlx").reason, time.monotonic() - since
    raise AssertionError("the call did not fail")


async def whole(stub) -> str:
    return grammar.text([e async for e in stub.Generate(long_ask())])


async def test_a_killed_worker_leaves_a_prefix_is_told_at_once_and_the_next_call_is_served(tmp_path):
    async with (
        service(tmp_path) as process,
        grpc.aio.insecure_channel(process.address) as channel,
    ):
        stub = rpc.InferenceServiceStub(channel)
        await ready(stub)
        reply = await whole(stub)

        async def killed() -> float:
            (worker,) = workers(process)
            events, reason, seconds = await interrupted(stub, worker.kill)
            assert reason == "STREAM_INTERRUPTED"
            grammar.check(events, complete=False)
            await ready(stub)
            (other,) = workers(process)
            assert other.pid != worker.pid
            text = grammar.text(events)
            assert text
            assert reply.startswith(text)
            assert reply != text
            return seconds

        await promptly(0.1, killed, tries=3)
        assert await whole(stub) == reply


async def test_a_frozen_worker_is_told_within_3_s_and_the_next_call_is_served(tmp_path):
    async with (
        service(tmp_path) as process,
        grpc.aio.insecure_channel(process.address) as channel,
    ):
        stub = rpc.InferenceServiceStub(channel)
        await ready(stub)

        async def frozen() -> float:
            (worker,) = workers(process)
            events, reason, seconds = await interrupted(stub, worker.suspend)
            assert reason == "STREAM_INTERRUPTED"
            grammar.check(events, complete=False)
            await ready(stub)
            assert not worker.is_running()
            return seconds

        await promptly(3.0, frozen, tries=2)


async def test_a_caller_that_leaves_frees_its_row_within_100_ms(tmp_path):
    async with (
        service(tmp_path, max_rows=1) as process,
        grpc.aio.insecure_channel(process.address) as channel,
    ):
        stub = rpc.InferenceServiceStub(channel)
        await ready(stub)

        async def left() -> float:
            first = stub.Generate(long_ask())
            async for event in first:
                if event.HasField("delta"):
                    break
            waiting = stub.Generate(ask(model="tiny", token_count=2))
            while (await waiting.read()).progress.stage != pb.Progress.STAGE_QUEUED:
                pass
            since = time.monotonic()
            first.cancel()
            while True:
                event = await waiting.read()
                assert isinstance(event, pb.GenerateResponse)
                if event.HasField("delta"):
                    break
            seconds = time.monotonic() - since
            waiting.cancel()
            return seconds

        await promptly(0.1, left)


async def test_nothing_is_left_after_a_stop(tmp_path):
    async with service(tmp_path) as process:
        async with grpc.aio.insecure_channel(process.address) as channel:
            await ready(rpc.InferenceServiceStub(channel))
        (worker,) = workers(process)
        assert await process.stop() == 0
        assert not worker.is_running()


async def test_a_service_that_is_killed_leaves_no_worker_behind(tmp_path):
    async with service(tmp_path) as process:
        async with grpc.aio.insecure_channel(process.address) as channel:
            await ready(rpc.InferenceServiceStub(channel))
        (worker,) = workers(process)
        process.signal(signal.SIGKILL)
        await process.wait()
        async with asyncio.timeout(5):
            while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
                await asyncio.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what a process has mapped")
async def test_the_process_that_serves_grpc_never_maps_mlx(tmp_path):
    async with (
        service(tmp_path) as process,
        grpc.aio.insecure_channel(process.address) as channel,
    ):
        await ready(rpc.InferenceServiceStub(channel))
        assert "libmlx" not in Path(f"/proc/{process.pid}/maps").read_text()
        (worker,) = workers(process)
        assert "libmlx" in Path(f"/proc/{worker.pid}/maps").read_text()


def test_no_module_of_the_front_imports_mlx():
    code = (
        "import sys, forebay.mlx_service.__main__, forebay.mlx_service.service, forebay.mlx_service.fetch; "
        "print([name for name in sys.modules if name.split('.')[0] in {'mlx', 'mlx_lm', 'transformers'}])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ended.stdout.strip() == "[]"
